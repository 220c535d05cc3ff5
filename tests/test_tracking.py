"""The run directory: refuses to overwrite, survives a crash, resumes to exactly a step."""

import errno
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError
from safetensors import SafetensorError

from agentopd.config.run import TrackingConfig
from agentopd.errors import SandboxError, StorageError, UserError
from agentopd.trackers import JsonlTracker, open_tracker
from agentopd.tracking import (
    KeptEpisode,
    Provenance,
    QuarantinedEpisode,
    RunDirectory,
    Session,
    full_disk,
    read_jsonl,
    user_errors,
    write_atomic,
)
from agentopd.types import Episode, Record, StopReason, Turn, Verdict, VerdictStatus


class Stage(Record):
    """Stands for any record with a step."""

    step: int | None


def episode() -> Episode:
    turn = Turn(token_ids=(5, 6), rollout_logprobs=(-0.1, -0.2), observation_ids=(7,), text="hi")
    return Episode(
        id="e", task_id="t", task_hash="h", env="math", split="train", prompt_ids=(1, 2), turns=(turn,),
        stop_reason=StopReason.COMPLETED,
    )  # fmt: skip


def kept(step: int, **streams) -> KeptEpisode:
    verdict = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
    tokens = ("a", "b", "h", "i", "c")
    return KeptEpisode(step=step, skill="math", episode=episode(), verdict=verdict, tokens=tokens, **streams)


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", "seed = 0\n", Provenance(seed=0, models={"student": "abc"}))


def test_create_lays_out_the_run_and_open_finds_it(run):
    assert RunDirectory.open(run.path).config.read_text() == "seed = 0\n"
    assert {path.name for path in run.path.iterdir()} == {
        "config.toml", "provenance.json", "metrics.jsonl", "episodes", "eval", "checkpoints",
    }  # fmt: skip


def test_an_existing_run_is_not_overwritten(run):
    with pytest.raises(UserError, match=r"already holds files: continue it with `agentopd resume .*run`"):
        RunDirectory.create(run.path, "", Provenance(seed=1))


def test_other_peoples_files_are_not_mixed_with_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="already holds files: choose another with --set run_dir=DIR"):
        RunDirectory.create(tmp_path, "", Provenance(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_place_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write run directory .*file/run.*choose another"):
        RunDirectory.create(tmp_path / "file" / "run", "", Provenance(seed=1))


@pytest.mark.parametrize(("make", "message"), [(False, "does not exist"), (True, "has no config.toml")])
def test_open_names_what_is_wrong(tmp_path, make, message):
    if make:
        (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=message):
        RunDirectory.open(tmp_path / "x")


def test_metrics_round_trip_and_mark_what_is_not_finite(run):
    tracker = open_tracker(run, TrackingConfig())
    tracker.log(1, {"math/success": 0.5, "loss": float("nan")})
    tracker.log(2, {"math/success": 1})
    tracker.close()
    tracker.close()
    assert read_jsonl(run.metrics) == [{"step": 1, "math/success": 0.5, "loss": None}, {"step": 2, "math/success": 1.0}]


def test_resume_forgets_everything_after_its_step(run):
    tracker = JsonlTracker(run.metrics)
    for step in (1, 2, 3, 4):
        tracker.log(step, {"x": step})
        run.keep_episodes(step, [kept(step)])
        run.save_eval(f"step_{step}", Stage(step=step))
    run.save_eval("teacher", Stage(step=None))
    tracker.close()
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "x"')  # the crash

    run.resume(Session.now(["agentopd", "resume", "run"], from_step=2))

    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert [episode.step for episode in run.kept_episodes()] == [1, 2]
    assert {path.stem for path in run.eval.iterdir()} == {"step_1", "step_2", "teacher"}
    after = JsonlTracker(run.metrics)
    after.log(3, {"x": 30})
    after.close()
    assert read_jsonl(run.metrics)[-1] == {"step": 3, "x": 30.0}
    (session,) = Provenance.model_validate_json(run.provenance.read_text()).sessions
    assert session.from_step == 2 and session.command[1] == "resume" and "torch" in session.packages


def test_a_run_that_begins_again_keeps_what_it_measured_before_its_first_step(run):
    JsonlTracker(run.metrics).log(1, {"x": 1})
    run.record(Stage(step=0))
    run.keep_episodes(1, [kept(1)])
    for name, step in (("base", 0), ("teacher", None), ("step_1", 1)):
        run.save_eval(name, Stage(step=step))
    run.resume(Session.now(["agentopd"]), restored=False)
    assert read_jsonl(run.metrics) == read_jsonl(run.events) == list(run.kept_episodes()) == []
    assert {path.stem for path in run.eval.iterdir()} == {"base", "teacher"}


def test_a_directory_is_a_run_once_it_can_be_resumed(tmp_path, monkeypatch):
    def dies(path, text):
        if path.name == "config.toml":
            assert all((path.parent / name).exists() for name in ("provenance.json", "metrics.jsonl", "checkpoints"))
            raise KeyboardInterrupt
        write_atomic(path, text)

    monkeypatch.setattr("agentopd.tracking.write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        RunDirectory.create(tmp_path / "run", "seed = 0\n", Provenance(seed=0))
    with pytest.raises(UserError, match=r"has no config\.toml"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("provenance.json", "{", r"provenance.json: not a Provenance: .*bring back the file"),
        ("provenance.json", None, r"provenance.json is missing: bring back the file"),
        ("eval/base.json", '{"step": ', r"base.json: not a.*bring back the file"),
        ("eval/base.json", "[1]", r"base.json: not a.*bring back the file"),
    ],
)
def test_a_damaged_record_stops_a_resume_before_it_changes_anything(run, name, text, says):
    run.save_eval("step_4", Stage(step=4))
    run.keep_episodes(4, [kept(4)])
    if text is None:
        (run.path / name).unlink()
    else:
        (run.path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        run.resume(Session.now(["agentopd"], from_step=2))
    assert (run.eval / "step_4.json").is_file() and [item.step for item in run.kept_episodes()] == [4]


def test_what_is_quarantined_is_read_back_with_its_numbers(run):
    given = QuarantinedEpisode(
        step=2, reason="nan", episode=episode(), verdict=kept(1).verdict, teacher_logprobs=(float("nan"), -1.0)
    )
    run.quarantine(2, [given])
    run.quarantine(3, [given])
    run.resume(Session.now([], from_step=2))
    (file,) = run.quarantined.iterdir()
    found = QuarantinedEpisode.model_validate_json(file.read_text())
    assert math.isnan(found.teacher_logprobs[0]) and found.episode == given.episode and found.reason == "nan"


def test_a_torn_last_line_is_dropped_and_a_bad_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: not JSON"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_kept_episodes_round_trip(run):
    given = kept(3, teacher_logprobs=(-1.0, -2.0), weights=(1.0, 0.0), mask_reasons=("", "special"))
    run.keep_episodes(3, [given])
    assert list(run.kept_episodes()) == [given]


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"teacher_logprobs": (-1.0,)}, "teacher_logprobs has 1 entries for 2 sampled tokens"),
        ({"weights": (1.0, 1.0, 1.0)}, "weights has 3 entries"),
        ({"teacher_logprobs": (-1.0, float("-inf"))}, "not finite"),
    ],
)
def test_kept_streams_must_line_up(streams, message):
    with pytest.raises(ValidationError, match=message):
        kept(1, **streams)


def test_a_spoilt_episode_file_is_named(run):
    (run.episodes / "step_000001.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(UserError, match=r"step_000001\.jsonl, line 1: not a kept episode"):
        list(run.kept_episodes())


@pytest.mark.parametrize("wrapped", [full_disk, user_errors])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "quota"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # what tokenizers raises
    ],
)
def test_a_full_disk_is_told_from_other_failures_whoever_writes(tmp_path, wrapped, error):
    with (
        pytest.raises(StorageError, match=r"is full: free some of it; .*`agentopd resume .*run`"),
        wrapped(tmp_path / "run"),
    ):
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), SandboxError("its own disk: No space left on device")])
def test_what_is_no_full_disk_passes_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as caught, full_disk(tmp_path):
        raise error
    assert caught.value is error


def test_atomic_write_leaves_the_old_file_and_no_litter_on_failure(tmp_path):
    target = tmp_path / "f"
    write_atomic(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(target, "\ud800")
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("name", "made"),
    [("tensorboard", "run/tensorboard/events*"), ("wandb", "run/wandb/offline-*/*.wandb"), ("trackio", "own/*.db")],
)
@pytest.mark.slow
def test_trackers_are_used_or_asked_for(run, tmp_path, name, made):
    """In a process of its own: these libraries read the environment once, and start threads."""
    script = f"""
from agentopd.config.run import TrackingConfig
from agentopd.trackers import open_tracker
from agentopd.tracking import RunDirectory
tracker = open_tracker(RunDirectory.open({str(run.path)!r}), TrackingConfig({name}=True))
for step in (1, 2):
    tracker.log(step, {{"math/success": 0.5, "loss/total": 1.0}})
tracker.close()
tracker.close()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "own"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if importlib.util.find_spec(name) is None:
        assert f"`pip install {name}`, or set tracking.{name} = false" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(made)), list(tmp_path.rglob("*"))
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
