"""A data set registered by someone else is a task source of any environment."""

import pytest

from agentopd.build import load_skills
from agentopd.config import SuiteConfig
from agentopd.errors import ConfigError, RegistryError
from agentopd.registry import datasets
from agentopd.types import Message, Task
from agentopd_envs.math import MathEnvironment


def row(number, split):
    prompt = (Message(role="user", content=f"{number}+1?"),)
    return Task(id=f"own-{number}", env="math", split=split, prompt=prompt, hidden={"answer": str(number + 1)})


def loader(split, limit, seed):
    return [row(number, split) for number in range(5)][:limit]


def test_a_registered_loader_and_a_path_to_one_are_sources(tmp_path):
    datasets.register("own_rows")(loader)
    assert [task.id for task in MathEnvironment.load_tasks("eval", "own_rows", 2, 0)] == ["own-0", "own-1"]
    suite = SuiteConfig.model_validate({"skills": [{"name": "own", "env": "math", "source": "own_rows"}]})
    assert load_skills(suite)["own"].tasks("eval", None, 0)[4].hidden == {"answer": "5"}
    file = tmp_path / "rows.py"
    file.write_text("def load(split, limit, seed):\n    return []\n")
    suite = SuiteConfig.model_validate({"skills": [{"name": "own", "env": "math", "source": f"{file}:load"}]})
    with pytest.raises(ConfigError, match="no eval tasks"):
        load_skills(suite)["own"].tasks("eval", None, 0)


def test_an_unknown_source_names_what_there_is():
    suite = SuiteConfig.model_validate({"skills": [{"name": "own", "env": "math", "source": "aime"}]})
    with pytest.raises(ConfigError, match="gsm8k"):
        load_skills(suite)
    with pytest.raises(RegistryError, match="aime"):
        list(MathEnvironment.load_tasks("eval", "aime", 1, 0))
