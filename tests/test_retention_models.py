"""Which of several models taught a skill."""

import pytest

from agentopd.config.run import SuiteConfig
from agentopd.errors import UserError
from agentopd.retention import learned_at, stages_of

SKILLS = [{"name": "math", "env": "math", "role": "old"}, {"name": "repair", "env": "code_repair"}]


def suite(**retention) -> SuiteConfig:
    return SuiteConfig.model_validate({"name": "s", "skills": SKILLS, "retention": retention})


@pytest.mark.parametrize(("baseline", "shift"), [(None, 0), ("A", 0), ("start", 1)])
def test_models_are_counted_as_they_were_given(baseline, shift):
    declared, models = suite(baseline=baseline), ["A", "B", "C"]
    assert stages_of(models, declared)[shift:] == models
    assert learned_at({"repair": 1}, models, declared) == {"repair": 1 + shift}
    assert learned_at({"math": 0}, models, declared) == {"repair": 2 + shift, "math": shift}


@pytest.mark.parametrize("given", [{"repair": 3}, {"cooking": 0}])
def test_a_skill_or_model_that_is_not_there_is_named_before_anything_is_measured(given):
    with pytest.raises(UserError, match="name a skill of the suite and a model, 0 to 2"):
        learned_at(given, ["A", "B", "C"], suite(baseline="start"))
