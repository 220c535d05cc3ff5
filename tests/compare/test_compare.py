"""Comparisons: planned before anything runs, resumable, tabulated with paired tests."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentopd.build import load_skills
from agentopd.certify.certificate import is_certified
from agentopd.commands import CompareOutput, compare
from agentopd.compare import (
    comparison_table,
    everything,
    gather,
    left_out,
    make_plan,
    work,
    write_record,
    write_results,
)
from agentopd.compare.export import latex, markdown
from agentopd.compare.queue import finished
from agentopd.config import dump_toml
from agentopd.config.run import RunConfig
from agentopd.console import make_console
from agentopd.errors import ConfigError, UserError
from agentopd.evaluation.metrics import EvalResult, score_skill
from agentopd.trackers import JsonlTracker
from agentopd.tracking import Provenance, RunDirectory
from agentopd.types import Verdict, VerdictStatus

ROOT = Path(__file__).resolve().parents[2]
STUDIES = [path for path in sorted((ROOT / "configs/studies").glob("*.toml")) if "[arms." in path.read_text()]
OK = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
WRONG = Verdict(outcome=0.0, status=VerdictStatus.WRONG, reward=0.0)
# Solved of forty tasks at the end, by arm and seed: (old skill, new skill).
FINAL = {
    ("opd", 0): (30, 20),
    ("opd", 1): (31, 22),
    ("opd", 2): (29, 21),
    ("calibrated", 0): (36, 30),
    ("calibrated", 1): (36, 33),
    ("calibrated", 2): (36, 31),
}


def comparison(tmp_path: Path, **changes: str) -> Path:
    text = f"""
name = "demo"
config = "{ROOT}/configs/quickstart.toml"
out = "{tmp_path}/out"
seeds = [0, 1, 2]
set = {{ "train.steps" = 2, "suite.retention.tolerated_drop" = 0.02 }}
[arms.opd]
preset = "opd"
[arms.calibrated]
preset = "verifier_calibrated"
set = ["objective.router.w_conflict=0.5"]
"""
    for old, new in changes.items():
        text = text.replace(old, new)
    path = tmp_path / "comparison.toml"
    path.write_text(text)
    return path


def evaluation(step: int, **passed: int) -> EvalResult:
    tasks = {
        skill: score_skill({f"{skill}{i}": [OK if i < good else WRONG] for i in range(40)}, k=1)
        for skill, good in passed.items()
    }
    return EvalResult(tasks=tasks, model="student", step=step)


def pretend(run, old: int, new: int, patch: float = 2.0) -> None:
    """A finished run on disk, as training leaves it; passing patches shrink from 4 lines to ``patch``."""
    directory = RunDirectory.create(run.path, dump_toml(run.config), Provenance(seed=run.seed))
    tracker = JsonlTracker(directory.metrics)
    used = {"rollout/tokens": 500.0, "replay/tokens": 100.0, "teacher/tokens": 900.0, "time/cpu": 1.5}
    for step, lines in ((1, 4.0), (2, patch)):
        tracker.log(step, used | {"repair/diff_cost": lines})
    tracker.close()
    directory.save_eval("base", evaluation(0, math=36, repair=4, store=4))
    directory.save_eval("final", evaluation(2, math=old, repair=new, store=new))
    (run.path / "model").mkdir()
    (run.path / "model/config.json").write_text("{}")


@pytest.fixture
def done(tmp_path):
    plan = make_plan(comparison(tmp_path))
    for run in plan.runs:
        pretend(run, *FINAL[run.arm, run.seed])
    return plan


def test_a_plan_resolves_every_run_seed_by_seed(tmp_path):
    plan = make_plan(comparison(tmp_path))
    assert [run.name for run in plan.runs[:3]] == ["opd-seed-0", "calibrated-seed-0", "opd-seed-1"]
    assert {run.config.objective.preset for run in plan.runs} == {"opd", "verifier_calibrated"}
    assert len({run.path for run in plan.runs}) == 6 and not (tmp_path / "out").exists()
    assert all(run.config.seed == run.seed and run.config.train.steps == 2 for run in plan.runs)
    assert plan.runs[1].config.objective.router.w_conflict == 0.5


def test_an_arm_may_set_lists_and_tables(tmp_path):
    arm = """
[arms.staged]
preset = "opd"
[arms.staged.set]
"model.lora" = { rank = 4, targets = ["q_proj", "v_proj"] }
"tracking.tensorboard" = true
[[arms.staged.set."objective.stages"]]
name = "it's \\"gold\\""
until = 0.25
source = { kind = "gold" }
divergence = { kind = "none" }
anchor = { kind = "gold_nll" }
[arms.calibrated]"""
    run = next(run for run in make_plan(comparison(tmp_path, **{"[arms.calibrated]": arm})).runs if run.arm == "staged")
    (stage,) = run.config.objective.stages
    assert (stage.name, stage.until, stage.source.kind) == ('it\'s "gold"', 0.25, "gold")
    assert run.config.model.lora.targets == ("q_proj", "v_proj") and run.config.tracking.tensorboard


def test_arms_and_seeds_can_be_picked(tmp_path):
    plan = make_plan(comparison(tmp_path), ["calibrated"], 2)
    assert [run.name for run in plan.runs] == ["calibrated-seed-0", "calibrated-seed-1"]


def test_a_run_config_is_compared_by_presets():
    plan = make_plan(ROOT / "configs/quickstart.toml", ["opd", "sft"], 1)
    assert [(run.arm, run.seed) for run in plan.runs] == [("opd", 0), ("sft", 0)]
    with pytest.raises(ConfigError, match="--arms opd,grpo"):
        make_plan(ROOT / "configs/quickstart.toml")


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({'preset = "opd"': 'preset = "exopdd"'}, "arm 'opd'.*did you mean 'exopd'"),
        ({"[arms.opd]": "[arms.base]"}, "untrained student"),
        ({"seeds = [0, 1, 2]": "seeds = [0, 0]"}, "distinct seeds"),
        ({'name = "demo"': 'name = "demo"\nbaseline = "grpo"'}, "'grpo' is no arm"),
        ({'"train.steps" = 2': '"train.stepz" = 2'}, "did you mean 'steps'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, changes, needle):
    with pytest.raises(ConfigError, match=needle):
        make_plan(comparison(tmp_path, **changes))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_resolve(path):
    plan = make_plan(path)
    assert len(plan.runs) >= 6
    assert (plan.start is None) == ("[start]" not in path.read_text())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_train_on_what_is_certified(path):
    suites = {repr(run.config.suite): run.config.suite for run in make_plan(path, num_seeds=1).runs}
    skills = [skill for suite in suites.values() for skill in load_skills(suite).values()]
    assert [skill.config.env for skill in skills if not is_certified(skill)] == []


def test_nothing_is_trained_while_an_arm_is_not_certified(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path / "empty"))
    shorter = '["objective.router.w_conflict=0.5", "suite.skills.repair.limits.max_turns=3"]'
    plan = make_plan(comparison(tmp_path, **{'["objective.router.w_conflict=0.5"]': shorter}))
    with pytest.raises(UserError, match=r"calibrated-seed-0: skill 'repair': .* run `agentopd envs validate --suite"):
        work(plan, make_console(plain=True))
    assert not plan.out.exists()


def test_results_have_the_promised_shape(done):
    results = gather(done)
    stored = json.loads(results.model_dump_json())
    assert {"arms", "machine", "versions"} <= stored.keys()
    (first, *_) = stored["arms"]["calibrated"]["seeds"]
    assert first["seed"] == 0 and first["skills"] == {"math": 0.9, "repair": 0.75, "store": 0.75}
    assert first["forgetting"] == 0.0 and first["new_skills"] == 0.75
    assert (first["tokens"], first["replay_tokens"], first["teacher_tokens"]) == (1000, 200, 1800)
    assert first["cpu_seconds"] == 3.0 and [point["step"] for point in first["curve"]] == [0, 2]
    assert stored["arms"]["base"]["seeds"][0]["skills"]["repair"] == 0.1
    lost = stored["arms"]["opd"]["seeds"][0]
    assert lost["forgetting"] == pytest.approx(0.15) and lost["broken"] == ["math"]


def test_a_column_in_which_no_arm_differs_is_left_out(tmp_path):
    plan = make_plan(comparison(tmp_path))
    for run in plan.runs:
        pretend(run, *FINAL[run.arm, run.seed], patch=3.5 if run.arm == "opd" else 2.0)
    results = gather(plan)
    assert [results.arms[arm].seeds[0].patch_cost for arm in ("opd", "calibrated", "base")] == [3.5, 2.0, None]
    table = markdown(results).splitlines()
    assert "patch lines" in table[0] and "replayed" not in table[0], "every arm replayed the same number of tokens"
    assert sum(" 3.5 " in line for line in table) == 1


def test_arms_are_tested_against_the_baseline_and_corrected(done):
    tests = {test.measure: test for test in gather(done).tests}
    assert set(tests) == {"new_skills", "retention"} and tests["new_skills"].arm == "calibrated"
    assert tests["new_skills"].difference.mean == pytest.approx(31 / 3 / 40)
    assert tests["new_skills"].difference.p_value < 0.01
    assert all(test.difference.p_value <= test.p_bh <= test.p_holm for test in tests.values())


def test_tables_and_curves_are_written(done):
    results = gather(done)
    paths = write_results(results, done.out)
    assert {path.name for path in paths} == {"results.json", "table.md", "table.tex", "curves.csv", "compare.html"}
    table = markdown(results)
    assert "| `calibrated` | 3 |" in table and "3/3" in table and "0/3" in table and "(p=" in table
    text = latex(results)
    assert r"new skills \%" in text and text.count(r" \\") == 4 and "_" not in text.replace(r"\_", "")
    rows = list(csv.DictReader(io.StringIO((done.out / "curves.csv").read_text())))
    assert len(rows) == 6 * 2 * 3 + 3 * 0 and {row["skill"] for row in rows} == {"math", "repair", "store"}
    page = (done.out / "compare.html").read_text()
    assert "http" not in page and page.count("<figure") == page.count("data-chart=") == 3
    buffer = io.StringIO()
    make_console(plain=True, file=buffer).print(comparison_table(results))
    shown = buffer.getvalue().splitlines()
    (row,) = (number for number, line in enumerate(shown) if line.startswith(" calibrated "))
    assert "CPU s" in buffer.getvalue(), "no column falls off"
    assert "(p=" in shown[row + 1] and "(p=" not in shown[row], "a difference stands below what differs"


def test_an_unfinished_comparison_still_has_results(tmp_path):
    plan = make_plan(comparison(tmp_path))
    assert gather(plan).arms == {} and gather(plan).planned == 6
    pretend(plan.runs[0], 30, 20)
    results = gather(plan)
    assert results.finished == 1 and set(results.arms) == {"base", "opd"} and results.tests == ()
    assert "1 of 6 runs finished" in markdown(results)


def test_a_directory_of_another_config_is_not_passed_off(done, tmp_path):
    other = make_plan(comparison(tmp_path, **{"w_conflict=0.5": "w_conflict=0.6"}))
    with pytest.raises(UserError, match="made with another config"):
        work(other, make_console(plain=True))
    with pytest.raises(UserError, match="made with another config"):
        gather(other)


def test_arms_of_another_start_are_not_passed_off(tmp_path, monkeypatch):
    """Their own configs name the start by its place, which is the same."""

    def at_once(command, **_):
        run = next(run for run in runs if f"{run.name}.toml" in command[-2])
        pretend(run, 30, 20)
        return SimpleNamespace(poll=lambda: 0)

    def plan(steps):
        start = f'[start]\nconfig = "{ROOT}/configs/quickstart.toml"\nset = {{ "train.steps" = {steps} }}\n[arms.opd]'
        return make_plan(comparison(tmp_path, **{"[arms.opd]": start}), ["opd"], 1)

    monkeypatch.setattr(subprocess, "Popen", at_once)
    first, second = plan(4), plan(5)
    runs = [first.start, *first.runs]
    assert work(first, make_console(plain=True)) == [] and gather(first).finished == 1
    shutil.rmtree(first.start.path)
    with pytest.raises(UserError, match="opd/seed-0' was made with another config, model or start"):
        gather(second)
    with pytest.raises(UserError, match="opd/seed-0' was made with another config, model or start"):
        work(second, make_console(plain=True))


def test_finished_runs_are_not_trained_again(done):
    before = {run.name: run.path.stat().st_mtime_ns for run in done.runs}
    assert work(done, make_console(plain=True, file=io.StringIO())) == []
    assert before == {run.name: run.path.stat().st_mtime_ns for run in done.runs}
    assert not (done.out / "logs").exists()


RECORD = {'name = "demo"': 'name = "demo"\nrecord = "kept/demo.json"'}


@pytest.fixture
def sitting(tmp_path):
    """A first sitting's runs, recorded, and their directories gone."""
    plan = make_plan(comparison(tmp_path, **RECORD), ["opd"], 2)
    for run in plan.runs:
        pretend(run, *FINAL[run.arm, run.seed])
    results = gather(plan)
    write_record(plan, everything(plan))
    shutil.rmtree(plan.out)
    return results


def test_a_comparison_goes_on_from_its_record(tmp_path, sitting):
    plan = make_plan(comparison(tmp_path, **RECORD))
    assert gather(plan).arms == sitting.arms and gather(plan).finished == 2
    for run in plan.runs[1:]:
        if run.name != "opd-seed-1":
            pretend(run, *FINAL[run.arm, run.seed])
    assert work(plan, make_console(plain=True, file=io.StringIO())) == [] and not (plan.out / "logs").exists()
    results = gather(plan)
    assert results.finished == 6 and [item.seed for item in results.arms["opd"].seeds] == [0, 1, 2]
    assert [test.difference.n for test in results.tests] == [3, 3]


def test_a_sitting_with_some_arms_keeps_what_the_record_has_of_others(tmp_path, sitting):
    plan = make_plan(comparison(tmp_path, **RECORD), ["calibrated"], 1)
    pretend(plan.runs[0], 36, 30)
    assert set(gather(plan).arms) == {"base", "calibrated"} and gather(plan).planned == 1
    write_record(plan, everything(plan))
    kept = gather(make_plan(comparison(tmp_path, **RECORD)))
    assert kept.arms["opd"] == sitting.arms["opd"] and kept.finished == 3


def test_runs_of_another_config_are_not_taken_from_the_record(tmp_path, sitting):
    assert gather(make_plan(comparison(tmp_path, **RECORD, **{"w_conflict=0.5": "w_conflict=0.6"}))).finished == 2
    assert gather(make_plan(comparison(tmp_path, **RECORD, **{'"train.steps" = 2': '"train.steps" = 3'}))).finished == 0


def test_what_the_record_has_of_another_config_stays_until_its_run_is_here(tmp_path, sitting, capsys):
    path = comparison(tmp_path, **RECORD, **{'"train.steps" = 2': '"train.steps" = 3'})
    kept = tmp_path / "kept/demo.json"
    before = kept.read_text()
    plan = make_plan(path)
    assert left_out(plan) == ["opd-seed-0", "opd-seed-1"] and gather(plan).arms == {}
    compare(path, None, None, None, CompareOutput(plain=True, as_json=False, results_only=True))
    assert kept.read_text() == before, "a look changes nothing"
    assert "of another config, left out: opd-seed-0, opd-seed-1" in capsys.readouterr().out
    run = next(run for run in plan.runs if run.name == "opd-seed-1")
    pretend(run, 33, 23)
    write_record(plan, everything(plan))
    (here,) = gather(plan).arms["opd"].seeds
    assert here.seed == 1 and left_out(plan) == ["opd-seed-0"], "replaced by its run, and by nothing else"
    shutil.rmtree(plan.out)
    first = sitting.arms["opd"].seeds[0]
    assert gather(make_plan(comparison(tmp_path, **RECORD))).arms["opd"].seeds == (first,)


def test_an_option_of_a_later_version_leaves_the_record_valid_until_it_is_set(tmp_path):
    class Later(RunConfig):
        new_option: int | None = None

    plan = make_plan(comparison(tmp_path))
    run = plan.runs[0]
    fields = {name: getattr(run.config, name) for name in RunConfig.model_fields}
    unset, used = (replace(run, config=Later.model_construct(**fields, new_option=value)) for value in (None, 3))
    assert plan.fingerprint(unset) == plan.fingerprint(run) != plan.fingerprint(used)


def test_how_long_ranks_wait_leaves_the_record_valid(tmp_path):
    plan = make_plan(comparison(tmp_path))
    run = plan.runs[0]
    learner = run.config.learner.model_copy(update={"collective_timeout_s": 60.0})
    patient = replace(run, config=run.config.model_copy(update={"learner": learner}))
    assert plan.fingerprint(patient) == plan.fingerprint(run)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_figure_of_the_study_is_of_its_config_as_it_is(study):
    """A change of defaults, or a new option, would orphan the runs of many hours."""
    plan = make_plan(study)
    assert plan.record.is_file() and left_out(plan) == []


def test_the_record_is_brought_up_to_date_after_every_run(tmp_path, monkeypatch):
    """So that a machine that goes away takes the runs under way with it, not those that had ended."""

    class Process:
        def poll(self) -> int:
            return 0

    def at_once(plan, run, lock):
        pretend(run, *FINAL[run.arm, run.seed])
        return Process()

    monkeypatch.setattr("agentopd.compare.queue._spawn", at_once)
    plan, kept = make_plan(comparison(tmp_path, **RECORD), ["opd"]), []

    def keep() -> None:
        write_record(plan, everything(plan))
        kept.append(gather(plan).finished)

    assert work(plan, make_console(plain=True), jobs=1, after_each=keep) == []
    assert kept == [1, 2, 3]
    assert len(json.loads((tmp_path / "kept/demo.json").read_text())["arms"]["opd"]["seeds"]) == 3


def test_a_record_that_is_none_is_an_error(tmp_path):
    path = comparison(tmp_path, **RECORD)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/demo.json").write_text('{"arms": 1}')
    with pytest.raises(ConfigError, match="holds no results of a comparison"):
        gather(make_plan(path))


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["eval/base.json", "checkpoints/step-000001/state.json"])
def test_a_killed_comparison_continues(tmp_path, seen):
    small = '"train.steps" = 2, "train.prompts_per_step" = 4, "rollout.group_size" = 2, "eval.tasks_per_skill" = 2, '
    path = comparison(
        tmp_path,
        **{'"train.steps" = 2, ': small + '"train.checkpoint_every" = 1, "threads" = 1, ', "[0, 1, 2]": "[0]"},
    )
    command = [sys.executable, "-m", "agentopd.cli", "compare", str(path), "--plain", "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    plan = make_plan(path)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 250
    while not (found := list((tmp_path / "out").glob(f"*/seed-0/{seen}"))):
        assert time.monotonic() < deadline and process.poll() is None, "it ended before that"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = found[0].stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert all(finished(run) for run in plan.runs)
    results = gather(plan)
    assert results.finished == 2
    assert found[0].stat().st_mtime_ns == made or "checkpoints" in seen  # what was measured is not measured again
    assert all(seed.cpu_seconds > 0 and seed.tokens > 0 for seed in results.arms["opd"].seeds)
