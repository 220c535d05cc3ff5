"""What SIGTERM and Ctrl-C do to a process that trains."""

import os
import signal

import pytest

from agentopd.train import _told_to_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_does_not_interrupt(number):
    before = signal.getsignal(number)
    with _told_to_stop() as stopping:
        assert not stopping()
        os.kill(os.getpid(), number)
        assert stopping()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once(capfd):
    with _told_to_stop():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
