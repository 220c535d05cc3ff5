"""What a person meets at the terminal: help, tables, and one clear line for every mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentopd.cli import main

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs/quickstart.toml"


@dataclass(frozen=True)
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def agentopd(monkeypatch, capsys) -> Callable[..., Done]:
    """The entry point, called in this process: what it imports is there already."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str, **env: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as here:
            here.setattr(sys, "argv", ["agentopd", *arguments])
            for name, value in env.items():
                here.setenv(name, value)
            code = 0
            try:
                main()
            except SystemExit as done:
                code = done.code or 0
        return Done(int(code), *capsys.readouterr())

    return call


@pytest.fixture
def refused(agentopd) -> Callable[..., str]:
    """The one line a mistake gets; exit code 2, nothing on stdout."""

    def call(*arguments: str, **env: str) -> str:
        done = agentopd(*arguments, **env)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.strip().splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and not done.stdout, done
        return lines[0]

    return call


def in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_names_every_command():
    done = in_a_process("-m", "agentopd.cli", "--help")
    assert done.returncode == 0
    commands = ("train", "resume", "eval", "retention", "compare", "report", "verify", "envs", "presets", "micro")
    for command in (*commands, "doctor", "sandbox"):
        assert command in done.stdout


def test_presets_are_visible(agentopd, refused):
    assert "verifier_calibrated" in agentopd("presets", "list", "--plain").stdout
    shown = agentopd("presets", "show", "verifier_calibrated").stdout
    assert "w_conflict" in shown and "top_k" in shown
    assert "did you mean 'opd'" in refused("presets", "show", "opdd")


def test_ctrl_c_ends_any_command_with_130(agentopd, monkeypatch):
    def interrupted(plain):
        raise KeyboardInterrupt

    monkeypatch.setattr("agentopd.commands.presets_list", interrupted)
    done = agentopd("presets", "list")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_looking_at_environments_does_not_wait_for_the_libraries_of_models():
    done = in_a_process("-X", "importtime", "-m", "agentopd.cli", "envs", "describe", "tool_use")
    assert json.loads(done.stdout)["name"] == "tool_use"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "agentopd.certify" in imported and not {"torch", "transformers"} & imported


def test_environments_are_visible(agentopd, refused):
    assert "code_repair" in agentopd("envs", "list", "--plain").stdout
    described = json.loads(agentopd("envs", "describe", "code_repair").stdout)
    assert {tool["name"] for tool in described["tools"]} >= {"edit", "submit"}
    assert "did you mean 'tool_use'" in refused("envs", "describe", "tool_us")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["train", "nowhere.toml"], ["no config file", "nowhere.toml"]),
        (["train", str(QUICKSTART), "--set", "learner.lrr=1"], ["lrr", "did you mean 'lr'"]),
        (["train", str(QUICKSTART), "--set", "train.steps=soon"], ["train.steps", "soon"]),
        (["train", str(QUICKSTART), "--set", "model.student=./no/model"], ["./no/model"]),
        (["train", str(QUICKSTART), "--set", "suite.skills.math.env=maths"], ["maths", "did you mean 'math'"]),
        (["train", str(QUICKSTART), "--set", "suite.skills.math.source=aime"], ["aime", "gsm8k"]),
        (["train", str(QUICKSTART), "--set", "run_dir=/proc/nowhere/run"], ["/proc/nowhere/run", "run_dir"]),
        (["train", str(QUICKSTART), "--set", "sandbox.backend=jial"], ["jial", "did you mean 'jail'"]),
        # Before a model is loaded, which may take minutes.
        (["train", str(QUICKSTART), "--set", "sandbox.backend=jial", "--set", "model.student=nowhere"], ["jial"]),
        (["resume", "runs/none"], ["runs/none"]),
        (["report", "runs/none"], ["runs/none"]),
        (["eval", "--suite", "configs/suites/micro.toml"], ["--model", "--policy"]),
        (["eval", "--suite", "configs/suites/micro.toml", "--policy", "silver"], ["silver", "gold"]),
        (["eval", "--suite", "configs/suites/none.toml", "--policy", "gold"], ["none.toml"]),
        (["eval", "--suite", "configs/suites/micro.toml", "--policy", "gold", "--limit", "0"], ["--limit"]),
        (["verify", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["micro", "build", "nowhere.toml"], ["nowhere.toml"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
@pytest.mark.slow
def test_mistakes_get_one_line_that_names_them(refused, arguments, needles):
    line = refused(*arguments)
    for needle in needles:
        assert needle in line


@pytest.mark.slow
def test_an_empty_suite_and_missing_data_are_refused(refused, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text('name = "empty"\n')
    assert "suite is empty" in refused("eval", "--suite", str(empty), "--policy", "gold")
    line = refused("eval", "--suite", "configs/suites/real.toml", "--policy", "gold", AGENTOPD_DATA="")
    assert "AGENTOPD_DATA" in line


@pytest.mark.slow
def test_a_teacher_with_another_vocabulary_is_refused(refused, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in (ROOT / "agentopd/assets/micro/teacher").iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            vocab = json.loads(text)
            table = vocab["model"]["vocab"]
            one, two = sorted(table, key=table.get)[300:302]
            table[one], table[two] = table[two], table[one]
            text = json.dumps(vocab).encode()
        (teacher / file.name).write_bytes(text)
    run = tmp_path / "run"
    line = refused("train", str(QUICKSTART), "--set", f"teachers.default.model={teacher}", "--set", f"run_dir={run}")
    assert "token id 300" in line and "default" in line
    assert not run.exists()


@pytest.mark.slow
def test_a_missing_tracker_is_found_before_anything_is_written(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refused("train", str(QUICKSTART), "--set", f"run_dir={tmp_path / 'run'}", "--set", "tracking.wandb=true")
    assert "`pip install wandb`, or set tracking.wandb = false" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_used_run_directory_is_never_overwritten(refused, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    line = refused("train", str(QUICKSTART), "--set", f"run_dir={tmp_path}")
    assert str(tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["gold", "noop", "starter"])
def test_scripts_score_as_they_must_on_the_micro_world(agentopd, policy):
    done = agentopd("eval", "--policy", policy, "--suite", "configs/suites/micro.toml", "--limit", "20", "--json")
    scores = json.loads(done.stdout)["tasks"]
    assert set(scores) == {"math", "repair", "store"}
    for score in scores.values():
        assert set(score) == {"avg_at_k", "pass_at_k", "n", "ci95", "infra_errors"}
        assert (score["avg_at_k"], score["n"], score["infra_errors"]) == (float(policy == "gold"), 20, 0)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("policy", "expected"), [("gold", 1.0), ("noop", 0.0), ("starter", 0.0)])
def test_scripts_score_as_they_must_on_every_real_row(agentopd, policy, expected, data_dir):
    done = agentopd("eval", "--policy", policy, "--suite", "configs/suites/real.toml", "--json")
    scores = json.loads(done.stdout)["tasks"]
    rows = {name: (score["avg_at_k"], score["n"], score["infra_errors"]) for name, score in scores.items()}
    assert rows == {
        "gsm8k": (expected, 200, 0),
        "quixbugs": (expected, 20, 0),
        "humanevalfix": (expected, 40, 0),
        "bfcl_single_turn": (expected, 64, 0),
    }


@pytest.mark.slow
@pytest.mark.data
def test_the_micro_student_runs_on_real_rows_without_a_fault(agentopd, data_dir):
    done = agentopd(
        "eval", "--model", "micro/student", "--suite", "configs/suites/real.toml", "--limit", "10", "--json"
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["tasks"]
    assert all(score["infra_errors"] == 0 and score["n"] == 10 for score in scores.values())
