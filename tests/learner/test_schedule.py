"""Learning rates at the corners of each schedule."""

import pytest

from agentopd.config.run import LearnerConfig
from agentopd.learner.schedule import learning_rate


def rates(steps, **settings):
    config = LearnerConfig(lr=1.0, min_lr_ratio=0.1, **settings)
    return [learning_rate(config, step, 12) for step in steps]


def test_warm_up_moves_from_its_first_step_and_ends_at_the_full_rate():
    assert rates(range(5), warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates([0], warmup_steps=0) == [1.0]


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)])
def test_decay_reaches_its_floor_and_stays(schedule, middle):
    end = 1.0 if schedule == "constant" else 0.1
    assert rates([2, 7, 12, 99], warmup_steps=2, schedule=schedule) == pytest.approx([1.0, middle, end, end])
