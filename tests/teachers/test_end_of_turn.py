"""A teacher that ends its turns with another token than the student."""

from pathlib import Path

import pytest

from agentopd.build import build_policy
from agentopd.config import load_run_config
from agentopd.errors import ConfigError
from agentopd.teaching import _Faculty

CONFIG = Path(__file__).resolve().parents[2] / "configs/quickstart.toml"


def faculty(tmp_path, *overrides: str) -> _Faculty:
    config = load_run_config(CONFIG, ["objective.preset=opd", "objective.stages=[]", *overrides])
    policy = build_policy("micro/student", "float32", config.rollout)
    return _Faculty(config, list(config.objective.every_stage()), policy, {}, tmp_path)


def test_stored_answers_are_not_taken_from_one_to_the_other(tmp_path):
    plain = faculty(tmp_path).identity("default")
    other = faculty(tmp_path, "teachers.default.end_of_turn=<|endoftext|>").identity("default")
    assert other != plain and other.startswith(plain)


@pytest.mark.parametrize("token", ["<|im_end|>", "</turn>"])
def test_a_token_that_is_none_or_the_students_own_is_refused(tmp_path, token):
    made = faculty(tmp_path, f"teachers.default.end_of_turn={token}")
    chosen = made.config.teachers["default"]
    with pytest.raises(ConfigError, match=r"must be another token of it; the student ends its turns with '<\|im_end"):
        made._with_its_end_of_turn("default", None, chosen)
