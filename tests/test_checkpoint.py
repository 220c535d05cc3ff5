"""Checkpoints: what was written comes back, and what was damaged since is refused."""

import json
import shutil
from pathlib import Path

import pytest

from agentopd.checkpoint import has_checkpoint, list_checkpoints, load_latest, load_step, save_checkpoint
from agentopd.config.run import TrainConfig
from agentopd.errors import UserError
from agentopd.mixture import MixtureState
from agentopd.trackers import JsonlTracker
from agentopd.tracking import Provenance, RunDirectory


class Blob:
    """A learner that is a string of bytes; ``error`` is what loading raises."""

    def __init__(self, weights: bytes = b"", error: Exception | None = None) -> None:
        self.weights, self.error = weights, error

    def save(self, directory: Path) -> None:
        (directory / "deep").mkdir(parents=True)
        (directory / "deep/weights.pt").write_bytes(self.weights)

    def load(self, directory: Path) -> None:
        if self.error is not None:
            raise self.error
        self.weights = (directory / "deep/weights.pt").read_bytes()


STATE = MixtureState(positions={"math": 3}, credits={"math": 0.5}, share=0.1)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two checkpoints of a run."""
    root = tmp_path / "run/checkpoints"
    for step in (2, 4):
        save_checkpoint(root, step, Blob(bytes([step]) * 10_000), STATE, keep=2)
    return root


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5_000:5_100] = bytes(byte ^ 0xFF for byte in data[5_000:5_100])
    path.write_bytes(data)


DAMAGE = {
    "flipped": (lambda newest: flip(newest / "learner/deep/weights.pt"), "weights.pt is not as it was written"),
    "empty": (lambda newest: (newest / "learner/deep/weights.pt").write_bytes(b""), "weights.pt is not as it was"),
    "gone": (lambda newest: shutil.rmtree(newest / "learner/deep"), "weights.pt: No such file"),
    "torn state": (
        lambda newest: (newest / "state.json").write_text('{"step": 4, "mix'),
        "state.json: JSONDecodeError",
    ),
    "other state": (lambda newest: (newest / "state.json").write_text('{"step": 4}'), "state.json: KeyError"),
    "binary state": (lambda newest: (newest / "state.json").write_bytes(b"\xff\xfe"), "state.json: UnicodeDecodeError"),
}


def test_what_remains_of_a_checkpoint_is_none_and_is_written_anew(root):
    torn = root / "step-000009/learner/torn"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    save_checkpoint(root, 9, Blob(b"whole"), STATE, keep=2)
    again = Blob()
    assert load_latest(root, again)[0] == 9 and again.weights == b"whole" and not torn.exists()


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(root, damage, why):
    older, newest = list_checkpoints(root)
    damage(newest)
    with pytest.raises(UserError) as caught:
        load_latest(root, Blob())
    said = str(caught.value)
    assert str(newest) in said and why in said and "\n" not in said
    assert said.endswith("delete it, and the same command continues from step-000002")
    shutil.rmtree(older)
    with pytest.raises(UserError, match="delete it, and start again"):
        load_latest(root, Blob())


def test_without_the_damaged_one_the_checkpoint_before_it_is_restored(root):
    shutil.rmtree(list_checkpoints(root)[-1])
    learner = Blob()
    assert load_latest(root, learner) == (2, STATE)
    assert learner.weights == b"\x02" * 10_000


def test_a_damaged_checkpoint_of_a_guard_is_refused(root):
    flip(root / "step-000002/learner/deep/weights.pt")
    with pytest.raises(UserError, match=r"weights.pt is not as it was written.*guard.roll_back = 1"):
        load_step(root, 2, Blob())


def test_a_state_that_is_written_again_keeps_its_checksums(root):
    save_checkpoint(root, 4, Blob(), STATE, keep=2, kept_step=4)
    assert load_latest(root, Blob()) == (4, STATE)
    flip(root / "step-000004/learner/deep/weights.pt")
    with pytest.raises(UserError, match="is not as it was written"):
        load_latest(root, Blob())


@pytest.mark.parametrize("error", [EOFError("Ran out of input"), AssertionError(), RuntimeError("no zip\nat 0x1")])
def test_a_checkpoint_of_an_earlier_version_loads_or_is_refused(root, error):
    for path in list_checkpoints(root):
        state = json.loads((path / "state.json").read_text())
        del state["files"]
        (path / "state.json").write_text(json.dumps(state))
    assert load_latest(root, Blob()) == (4, STATE)
    with pytest.raises(
        UserError, match=f"cannot be read \\({type(error).__name__}.*continues from step-000002"
    ) as caught:
        load_latest(root, Blob(error=error))
    assert "\n" not in str(caught.value)


def test_a_fault_beside_a_whole_checkpoint_is_not_called_damage(root):
    with pytest.raises(RuntimeError, match="out of memory"):
        load_latest(root, Blob(error=RuntimeError("out of memory")))


def begun(path: Path, *steps: int) -> RunDirectory:
    """A run of ten steps that took some, without a checkpoint."""
    directory = RunDirectory.create(path, "", Provenance(seed=0))
    for step in steps:
        JsonlTracker(directory.metrics).log(step, {})
    return directory


EVERY_FOUR = TrainConfig(steps=10, checkpoint_every=4)


@pytest.mark.parametrize("schedule", [EVERY_FOUR, TrainConfig(steps=4, checkpoint_every=None)])
def test_a_run_that_never_had_a_checkpoint_may_begin_again(tmp_path, schedule):
    for number, steps in enumerate([(), (1, 2), (1, 2, 3, 4)]):
        assert not has_checkpoint(begun(tmp_path / str(number), *steps), schedule)
    directory = begun(tmp_path / "kept", 1, 2, 3, 4, 5)
    save_checkpoint(directory.checkpoints, 4, Blob(), STATE, keep=2)
    assert has_checkpoint(directory, schedule)


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(tmp_path):
    lost = r"no checkpoint under .*, where one was after step 4: bring it back from a copy, or start again after `rm -r"
    with pytest.raises(UserError, match=lost):
        has_checkpoint(begun(tmp_path / "later", 1, 2, 3, 4, 5), EVERY_FOUR)
    ended = begun(tmp_path / "ended", 1, 2)
    (ended.path / "model").mkdir()
    with pytest.raises(UserError, match=lost):
        has_checkpoint(ended, EVERY_FOUR)
    torn = begun(tmp_path / "torn", 1, 2, 3, 4)
    (torn.checkpoints / "step-000004").mkdir()
    with pytest.raises(UserError, match=r"step-000004' cannot be read \(it has no state.json\): bring it back"):
        has_checkpoint(torn, EVERY_FOUR)
