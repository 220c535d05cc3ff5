"""The whole loop on the shipped micro models: real environments, real jail, real DeepSpeed."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentopd.build import Judge, build_policy, build_sandbox, load_skills
from agentopd.commands import _train
from agentopd.config import dump_toml, load_run_config
from agentopd.console import make_console
from agentopd.contracts import Generation
from agentopd.env_commands import What, envs_validate
from agentopd.errors import UserError
from agentopd.evaluation.metrics import EvalResult
from agentopd.runs import Run
from agentopd.teaching import build_teachers
from agentopd.tracking import Provenance, RunDirectory, read_jsonl
from agentopd.train import train
from benchmarks.faults import OF_THE_MACHINE

pytestmark = pytest.mark.slow


def metrics(path: Path) -> list[dict]:
    rows = read_jsonl(path / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)} for row in rows]


def run(config_path: Path, overrides: list[str]) -> Path:
    config = load_run_config(config_path, overrides)
    asyncio.run(train(Run.start(config), make_console(plain=True)))
    return Path(config.run_dir)


def test_a_run_leaves_everything_a_reader_needs(quickstart, small):
    started = Run.start(load_run_config(quickstart, small("train.steps=2")))
    _train(started, make_console(plain=True))
    path = Path(started.config.run_dir)
    rows = metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["distill/coverage"] > 0.9 for row in rows)
    assert {"math/success", "repair/success", "store/success", "loss/total"} <= set(rows[0])
    assert {file.stem for file in (path / "eval").glob("*.json")} == {"base", "teacher", "final"}
    assert (path / "model/model.safetensors").is_file() and (path / "model/tokenizer.json").is_file()
    assert (path / "report.html").stat().st_size > 20_000
    assert load_run_config(path / "config.toml") == started.config
    provenance = json.loads((path / "provenance.json").read_text())
    assert len(provenance["models"]["student"]) == 16
    kept = list(RunDirectory.open(path).kept_episodes())
    assert len(kept) == 8
    for item in kept:
        assert len(item.teacher_logprobs) == item.episode.num_sampled
        assert any(reason == "special" for reason in item.mask_reasons)
        assert all(not w for w, reason in zip(item.weights, item.mask_reasons, strict=True) if reason)
        assert len(item.agreement) == len(item.old_logprobs) == item.episode.num_sampled


def test_malformed_calls_end_evaluations_as_they_end_training(quickstart, small, monkeypatch):
    started = Run.start(load_run_config(quickstart, small("rollout.max_malformed=1")))
    policy, asked = started.policy, []
    said = tuple(policy.renderer.encode_turn("<tool_call>{</tool_call>"))

    async def generate(requests):
        asked.extend(requests)
        return [Generation(said, (-0.5,) * len(said), "stop") for _ in requests]

    monkeypatch.setattr(policy.engine, "generate", generate)
    asyncio.run(started.evaluate("base", ["store"]))
    assert len(asked) == len(started.heldout["store"]) == 4
    asyncio.run(started.aclose())


@pytest.mark.parametrize("example", ["my_env.py:Thermostat", "my_question.py:Backwards"])
def test_a_new_environment_trains_once_it_is_certified(example, quickstart, small, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path / "cache"))
    env = f"{Path(__file__).resolve().parents[2]}/examples/{example}"
    config = tmp_path / "mine.toml"
    config.write_text(
        f'[model]\nstudent = "micro/student"\n[teachers.default]\nmodel = "micro/teacher"\n'
        f'[[suite.skills]]\nname = "mine"\nenv = "{env}"\n'
    )
    with pytest.raises(UserError, match="agentopd envs validate"):
        Run.start(load_run_config(config, small()))
    envs_validate(What(env, False, None, None), None, as_json=False, plain=True)
    path = run(config, small("train.steps=1"))
    assert metrics(path)[0]["mine/episodes"] == 12


def test_skills_that_name_their_tasks_alike_are_kept_apart(small, tmp_path):
    lines = ['[objective]\npreset = "sft"\n']
    for skill, answers in (("easy", ("4", "6")), ("hard", ("40", "60"))):
        rows = [{"id": i, "q": f"{skill} question {i}?", "a": answer} for i, answer in enumerate(answers)]
        (tmp_path / skill).mkdir()
        (tmp_path / skill / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / skill / "data.toml").write_text(
            '[splits]\ntrain = "rows.jsonl"\neval = "rows.jsonl"\n[columns]\nid = "id"\nproblem = "q"\nanswer = "a"\n'
        )
        lines.append(f'[[suite.skills]]\nname = "{skill}"\nenv = "math"\nsource = "{tmp_path}/{skill}/data.toml"\n')
    config = tmp_path / "two.toml"
    config.write_text("".join(lines))
    overrides = small("train.steps=1", "train.prompts_per_step=4", "tracking.episodes_per_step=4")
    off = ("decontamination.action=off", "eval.tasks_per_skill=2")
    started = Run.start(load_run_config(config, [*overrides, *off]), allow_uncertified=["easy", "hard"])
    asyncio.run(train(started, make_console(plain=True)))
    kept = list(RunDirectory.open(started.root).kept_episodes())
    assert sorted((item.skill, item.task.hidden["answer"]) for item in kept) == [
        ("easy", "4"), ("easy", "6"), ("hard", "40"), ("hard", "60")
    ]  # fmt: skip
    assert all(item.verdict.passed and item.task.hash == item.episode.task_hash for item in kept)


OVERLAPPING = """
from agentopd.types import Limits, Message
from agentopd_envs import SingleTurnEnvironment, register_environment

def rows(split, limit, seed):
    for number in range(8 if split == "train" else 4):
        task = Words.new_task(f"Say {number}.", hidden={"answer": str(number)}, gold=[str(number)])
        yield task.model_copy(update={"id": f"{split}/{number}", "split": split})

@register_environment("words")
class Words(SingleTurnEnvironment):
    loaders = {"micro": rows}
    limits = Limits(max_tokens=4)

    @staticmethod
    def score(task, episode):
        return float(episode.final_text == task.hidden["answer"])
"""


def test_training_tasks_that_are_held_out_are_listed_and_not_trained_on(quickstart, small, tmp_path):
    (tmp_path / "words.py").write_text(OVERLAPPING)
    config = tmp_path / "words.toml"
    config.write_text(
        f'[objective]\npreset = "sft"\n[[suite.skills]]\nname = "words"\nenv = "{tmp_path}/words.py:Words"\n'
    )
    overrides = small("train.steps=1", "train.prompts_per_step=4", "tracking.episodes_per_step=4")
    started = Run.start(load_run_config(config, overrides), allow_uncertified=["words"])
    asyncio.run(train(started, make_console(plain=True)))
    path = Path(started.config.run_dir)
    assert [row["task_id"] for row in read_jsonl(path / "overlaps.jsonl")] == [f"train/{number}" for number in range(4)]
    trained = {item.episode.task_id for item in RunDirectory.open(path).kept_episodes()}
    assert trained == {f"train/{number}" for number in range(4, 8)}


def test_a_fixed_seed_gives_the_same_run_twice(quickstart, small):
    one = run(quickstart, small("train.steps=2", name="one"))
    two = run(quickstart, small("train.steps=2", name="two"))
    assert metrics(one) == metrics(two)


def test_a_run_that_was_told_to_stop_resumes_with_the_metrics_of_an_undisturbed_one(quickstart, small):
    schedule = ("train.steps=4", "train.retry_share=0.5")
    whole = run(quickstart, small(*schedule, name="whole"))
    assert any("repair/retry_success" in row for row in metrics(whole))
    arguments = [part for override in small(*schedule, name="ended") for part in ("--set", override)]
    command = [sys.executable, "-m", "agentopd.cli"]
    ended = whole.parent / "ended"
    process = subprocess.Popen(
        [*command, "train", str(quickstart), "--plain", *arguments], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not list(ended.glob("checkpoints/step-000002/state.json")):
        assert time.monotonic() < deadline and process.poll() is None, "the run ended before its second checkpoint"
        time.sleep(0.01)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 0 and f"agentopd resume {ended}" in said
    subprocess.run([*command, "resume", str(ended), "--plain"], check=True, stdout=subprocess.DEVNULL)
    assert metrics(ended) == metrics(whole)
    for stage in ("base", "final"):
        ours, theirs = (json.loads((path / f"eval/{stage}.json").read_text()) for path in (whole, ended))
        assert ours == theirs


def test_ctrl_c_before_the_first_step_is_saved_and_resumed(quickstart, small):
    whole = run(quickstart, small("train.steps=1", name="whole"))
    arguments = [part for override in small("train.steps=1", name="ended") for part in ("--set", override)]
    command = [sys.executable, "-m", "agentopd.cli"]
    ended = whole.parent / "ended"
    process = subprocess.Popen(
        [*command, "train", str(quickstart), "--plain", *arguments], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not (ended / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline and process.poll() is None, "the run ended before its first evaluation"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 0 and f"stopped after step 0, saved: agentopd resume {ended}" in said
    assert [path.name for path in (ended / "checkpoints").iterdir()] == ["step-000000"]
    subprocess.run([*command, "resume", str(ended), "--plain"], check=True, stdout=subprocess.DEVNULL)
    assert metrics(ended) == metrics(whole)


def test_a_run_does_not_begin_again_with_another_model(quickstart, small):
    config = load_run_config(quickstart, small())
    directory = RunDirectory.create(config.run_dir, dump_toml(config), Provenance(seed=0, models={"student": "other"}))
    before = directory.provenance.read_text()
    with pytest.raises(
        UserError, match=r"began with another student, and has no checkpoint yet: bring that model back"
    ):
        Run.resume(config.run_dir)
    assert directory.provenance.read_text() == before


def test_two_ranks_train_with_zero_2(quickstart, small):
    arguments = [
        part
        for override in small("train.steps=2", "learner.zero_stage=2", "train.retry_share=0.5")
        for part in ("--set", override)
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "agentopd.cli", "train", str(quickstart), "--plain", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    path = Path(small()[-1].removeprefix("run_dir="))
    rows = metrics(path)
    assert len(rows) == 2 and rows[0]["rollout/episodes"] == 12
    final = EvalResult.model_validate_json((path / "eval/final.json").read_text())
    assert all(score.start_kl is not None for score in final.tasks.values())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_rank_keeps_the_start_that_evaluations_measure_from(monkeypatch, quickstart, small, rank):
    monkeypatch.setenv("RANK", rank)
    config = load_run_config(quickstart, small())
    skills = load_skills(config.suite)
    policy = build_policy(config.model.student, "float32", config.rollout)
    teachers = build_teachers(config, policy, skills, Judge(skills.values(), build_sandbox(config.sandbox)), Path())
    assert (teachers.start is not None) == (rank == "0")
