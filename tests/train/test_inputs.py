"""What a preset needs to run for real: teacher rollouts, stored log-probs, candidates, a judge, another tokenizer."""

import asyncio
import json
import math
from pathlib import Path

import pytest

from agentopd.collect import store_rollouts
from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.errors import ConfigError, TeacherError
from agentopd.runs import Run
from agentopd.tracking import RunDirectory, read_jsonl
from agentopd.train import train

pytestmark = pytest.mark.slow
ONE_SKILL = (
    '[model]\nstudent = "micro/student"\n[teachers.default]\nmodel = "micro/teacher"\n'
    '[[suite.skills]]\nname = "store"\nenv = "tool_use"\n'
)


def metrics(path: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
        for row in read_jsonl(path / "metrics.jsonl")
    ]


def run(config_path: Path, overrides: list[str]) -> Path:
    config = load_run_config(config_path, overrides)
    asyncio.run(train(Run.start(config), make_console(plain=True)))
    return Path(config.run_dir)


@pytest.fixture
def one_skill(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(ONE_SKILL)
    return path


def test_a_teacher_plays_no_more_at_once_than_a_skill_allows(one_skill, small):
    overrides = small("objective.preset=seqkd", "suite.skills.store.max_live=2", "suite.skills.store.own_batches=true")
    started = Run.start(load_run_config(one_skill, overrides))
    options = started.teachers.demonstrators["default"].options
    assert (options.max_live, options.own_batches) == ({"store": 2}, {"store"})
    asyncio.run(started.aclose())


def test_phased_teacher_sampling_ends_and_is_cached(one_skill, small, tmp_path):
    shared = f"demonstrations.cache={tmp_path / 'shared'}"
    more = ("objective.preset=sg_opd", "objective.anchor.hold_until=0.5", "objective.anchor.off_from=0.5", shared)
    first = run(one_skill, small("train.steps=2", *more, name="first"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.jsonl")}
    assert len(files) == 1  # ceil(0.1 * 6) prompts at step 0, none at step 1
    rows = metrics(first)
    assert "loss/anchor" in rows[0] and rows[1].get("loss/anchor", 0.0) == 0.0
    second = run(one_skill, small("train.steps=2", *more, name="second"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.jsonl")} == files
    assert metrics(second) == rows


def test_stages_change_the_objective_and_resume_is_exact(one_skill, small, tmp_path):
    overrides = small("train.steps=5", "objective.preset=sparse_dense", name="whole", stages=True)
    whole = run(one_skill, overrides)
    rows = metrics(whole)
    assert ["loss/anchor" in row for row in rows] == [True, False, False, False, False]
    assert ["distill/coverage" in row for row in rows] == [False, True, True, True, False]
    for kept in RunDirectory.open(whole).path.glob("checkpoints/step-*"):
        assert kept.name in ("step-000004", "step-000005")
    half = run(one_skill, small("train.steps=5", "objective.preset=sparse_dense", name="half", stages=True))
    # Drop the last step as a crash would have, and take it again.
    for path in (half / "checkpoints/step-000005").rglob("*"):
        if path.is_file():
            path.unlink()
    resumed = Run.resume(half)
    assert resumed.step == 4
    asyncio.run(train(resumed, make_console(plain=True)))
    assert metrics(half) == rows


def test_rollouts_stored_before_an_interruption_are_not_made_again(one_skill, small):
    settings = ("train.steps=2", "objective.preset=lightning_opd", "suite.skills.store.num_train_tasks=8")
    whole = run(one_skill, small(*settings, name="whole"))
    cut = Run.start(load_run_config(one_skill, small(*settings, name="cut")))

    async def until_they_are_stored() -> None:
        await cut.open()
        await cut.evaluate("base")
        await store_rollouts(cut)
        await cut.aclose()

    asyncio.run(until_they_are_stored())
    stored = {path: path.stat().st_mtime_ns for path in (cut.root / "offline").rglob("*.*")}
    assert stored
    resumed = Run.resume(cut.root)
    assert not resumed.restored
    asyncio.run(train(resumed, make_console(plain=True)))
    assert {path: path.stat().st_mtime_ns for path in (cut.root / "offline").rglob("*.*")} == stored
    assert metrics(cut.root) == metrics(whole)


def test_stored_rollouts_are_scored_once_and_guarded(one_skill, small, tmp_path):
    store = tmp_path / "store"
    more = ("objective.preset=lightning_opd", f"objective.source.path={store}", "suite.skills.store.num_train_tasks=8")
    first = run(one_skill, small("train.steps=2", *more, name="first"))
    evidence = sorted(store.rglob("*.npz"))
    assert 8 <= len(evidence) <= 16 and len(list(store.rglob("*.jsonl"))) == 8  # equal episodes share their evidence
    assert metrics(first)[0]["rollout/episodes"] == 6 * 2
    stamps = [path.stat().st_mtime_ns for path in evidence]
    second = run(one_skill, small("train.steps=2", *more, name="second"))
    assert [path.stat().st_mtime_ns for path in evidence] == stamps
    assert metrics(first) == metrics(second)
    with pytest.raises(ConfigError, match="stored with teacher"):
        run(one_skill, small(*more, "teachers.default.model=micro/student", name="third"))


def test_stored_evidence_equals_online_evidence_at_the_first_step(one_skill, small, tmp_path):
    more = ("suite.skills.store.num_train_tasks=6", "rollout.group_size=1")
    offline = run(one_skill, small("train.steps=1", "objective.preset=lightning_opd", *more, name="offline"))
    config = load_run_config(one_skill, small("objective.preset=lightning_opd", *more, name="again"))
    live = Run.start(config)
    assert live.teachers.stored_rollouts.keep_unjudged
    rollouts = [path.read_text().splitlines()[1] for path in (offline / "offline/rollouts").rglob("*.jsonl")]
    from agentopd.types import Episode

    episodes = [Episode.model_validate(json.loads(line)["episode"]) for line in rollouts]
    stored = live.teachers.by_key["default"]
    fresh = asyncio.run(stored._live.score(episodes, 0))
    store = type(stored)("default", offline / "offline/evidence/default", stored._header)
    for one, other in zip(fresh, asyncio.run(store.score(episodes, 0)), strict=True):
        assert one.teacher_logprobs.tolist() == pytest.approx(other.teacher_logprobs.tolist(), abs=1e-2)
    asyncio.run(live.aclose())


def test_a_privileged_teacher_teaches_and_its_hint_stays_with_it(one_skill, small, tmp_path):
    more = ("teachers.default.model=micro/student", "teachers.default.context=hint", "objective.preset=opd")
    path = run(one_skill, small("train.steps=1", "tracking.episodes_per_step=8", *more))
    row = metrics(path)[0]
    assert row["distill/coverage"] > 0.9 and row["distill/reverse_kl"] != 0
    for kept in RunDirectory.open(path).kept_episodes():
        assert kept.task.privileged.hint
        assert kept.task.privileged.hint not in "".join(kept.tokens)


def test_rubrics_reward_and_the_verifier_still_measures(one_skill, small, honest_server):
    config = one_skill.read_text().replace(
        'model = "micro/teacher"', 'kind = "chat"\nmodel = "toy"\napi_key_env = "none"'
    )
    config = config.replace('kind = "chat"\n', f'kind = "chat"\nbase_url = "{honest_server.base_url}"\n')
    judge = f'[judge]\nbase_url = "{honest_server.base_url}"\nmodel = "toy"\napi_key_env = "none"\n'
    one_skill.write_text(config + judge)
    path = run(one_skill, small("train.steps=1", "objective.preset=ropd"))
    row = metrics(path)[0]
    assert math.isfinite(row["loss/total"]) and row["batch/unjudged"] == 0
    assert "store/success" in row
    asked = [request["messages"][0]["content"][:15] for request in honest_server.requests]
    assert asked.count("You grade answe") == 6


def test_a_judge_that_refuses_moves_nothing_and_the_run_says_so(one_skill, small, serve, caplog):
    server = serve(lambda question, messages: (200, "I would rather not."))
    judge = f'[judge]\nbase_url = "{server.base_url}"\nmodel = "toy"\napi_key_env = "none"\n'
    one_skill.write_text(one_skill.read_text() + judge)
    row = metrics(run(one_skill, small("train.steps=1", "objective.preset=ropd")))[0]
    assert row["batch/unjudged"] == 12 and row["learner/grad_norm"] == 0
    (said,) = [message for message in caplog.messages if "no group of this step could be judged" in message]
    assert "not the JSON that was asked for" in said


def test_a_judge_that_is_away_ends_the_run_with_its_fault(one_skill, small, serve):
    server = serve(lambda question, messages: (503, {"error": "down for repairs"}))
    judge = f'[judge]\nbase_url = "{server.base_url}"\nmodel = "toy"\napi_key_env = "none"\nmax_retries = 0\n'
    one_skill.write_text(one_skill.read_text() + judge)
    with pytest.raises(TeacherError, match=f"every episode of this step is unjudged.*{server.base_url}.*503"):
        run(one_skill, small("train.steps=1", "objective.preset=ropd"))
