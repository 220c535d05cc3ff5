"""How many tasks a skill has where nobody says how many."""

from itertools import count, islice

import pytest

from agentopd.build import Skill
from agentopd.config.run import SkillConfig
from agentopd.errors import ConfigError
from agentopd.types import Source, Task


def skill(size: int | None, row: str) -> Skill:
    class Env:
        @staticmethod
        def load_tasks(split, source, limit, seed):
            made = Task(id="t", env="e", prompt=(), source=Source(dataset="d", row=row))
            return islice((made for _ in count()), size if limit is None else limit)

    return Skill(SkillConfig(name="s", env="e"), Env)


@pytest.mark.parametrize(
    ("size", "row", "expected"),
    [(40, "7", 40), (1319, "7", 1319), (1024, "7", 1024), (40, "", 40), (None, "", 200)],
    ids=["small", "gsm8k", "edge", "few made", "endless"],
)
def test_a_data_set_is_never_shortened_and_an_endless_source_is(size, row, expected):
    assert len(skill(size, row).tasks("eval", None, 0)) == expected
    assert len(skill(size, row).tasks("eval", 30, 0)) == 30


def test_rows_without_an_end_are_refused():
    with pytest.raises(ConfigError, match="more than 100000 eval tasks: say how many with --limit"):
        skill(None, "7").tasks("eval", None, 0)
