"""A synthetic run: three skills, evaluations, metrics of 120 steps and a dozen kept episodes."""

import math
import random

import pytest

from agentopd.evaluation.metrics import EvalResult, score_skill
from agentopd.trackers import JsonlTracker
from agentopd.tracking import KeptEpisode, Provenance, RunDirectory, Session
from agentopd.types import (
    Episode,
    Flag,
    Message,
    StepCertificate,
    StopReason,
    ToolCall,
    Turn,
    Verdict,
    VerdictStatus,
)

CONFIG = """
seed = 7
[model]
student = "micro/student"
[objective]
preset = "verifier_calibrated"
[train]
steps = 120
[teachers.default]
model = "micro/teacher"
[suite]
name = "demo"
[[suite.skills]]
name = "math"
role = "old"
[[suite.skills]]
name = "repair"
[[suite.skills]]
name = "store"
"""
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028"
SKILLS = {"math": (52, 50), "repair": (18, 49), "store": (21, 44)}
TASKS = 60


def evaluation(step, share, seed=3):
    """Every skill on its way from its first to its second count of solved tasks."""
    tasks = {}
    for skill, (start, end) in SKILLS.items():
        passed = round(start + share * (end - start))
        verdicts = {f"{skill}-{i}": [_verdict(i < passed)] for i in range(TASKS)}
        tasks[skill] = score_skill(verdicts, k=1, seed=seed)
    return EvalResult(tasks=tasks, model="micro/student", step=step, seed=seed)


def _verdict(ok):
    if ok:
        return Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
    return Verdict(outcome=0.0, status=VerdictStatus.WRONG, reward=0.0)


def metrics(step, rng):
    share = 1 - math.exp(-step / 35)
    row = {
        f"{skill}/success": min(1, max(0, (a + share * (b - a)) / TASKS + rng.gauss(0, 0.06)))
        for skill, (a, b) in SKILLS.items()
    }
    row |= {f"{skill}/tokens": 60 - 20 * share + rng.gauss(0, 3) for skill in SKILLS}
    row |= {f"{skill}/infra_errors": 0 for skill in SKILLS}
    agree = 0.45 + 0.3 * share + rng.gauss(0, 0.02)
    conflict = 0.2 - 0.12 * share + rng.gauss(0, 0.01)
    return row | {
        "distill/reverse_kl": 0.9 * math.exp(-step / 40) + 0.08 + rng.gauss(0, 0.02),
        "learner/lr": 5e-4 * min(1, step / 5),
        "learner/grad_norm": 1.2 + rng.gauss(0, 0.2),
        "distill/agree": agree,
        "distill/neutral": 1 - agree - conflict,
        "distill/conflict": conflict,
        "distill/cap_hit": 0.05 * math.exp(-step / 30),
        "distill/coverage": 1.0,
        "distill/masked_special": 0.11 + rng.gauss(0, 0.004),
        "student/mismatch_kl": abs(rng.gauss(0, 1e-4)),
        "time/rollout": 1.4 + rng.random() / 4,
        "time/teacher": 0.5,
        "time/verify": 0.21,
        "time/learner": 1.9,
        "rollout/tokens": 5200.0,
    }


def kept(step, skill, index, status=VerdictStatus.OK):
    """A two-turn episode with a tool call, an observation and full evidence; its text is hostile."""
    rng = random.Random(index)
    first = ["<tool_call>", "\n", '{"name": "edit", "arg', 'uments": {"old": "a+b"', ', "new": "a-b"}}', "</tool_call>"]
    first.append("<|im_end|>")
    second = ["The", " bug", " is", " fixed", ": ", HOSTILE, "<|im_end|>"]
    prompt = ["<|im_start|>system\n", "Fix the bug", " & submit.<|im_end|>\n"]
    prompt += ["<|im_start|>user\n", f"def f(): {HOSTILE}", "<|im_end|>\n", "<|im_start|>assistant\n"]
    observation = ["\n", "ok", "\n"]

    def turn(tokens, observed, **fields):
        logprobs = tuple(-rng.expovariate(2.5) for _ in tokens)
        ids = tuple(range(len(tokens)))
        return Turn(
            token_ids=ids,
            rollout_logprobs=logprobs,
            observation_ids=tuple(range(len(observed))),
            text="".join(tokens),
            **fields,
        )

    call = ToolCall(name="edit", arguments={"old": "a+b", "new": "a-b"})
    reply = Message(role="tool", name="edit", content=f"ok {HOSTILE}")
    turns = (turn(first, observation, tool_calls=(call,), results=(reply,)), turn(second, []))
    episode = Episode(
        id=f"e{index}", task_id=f"{skill}-{index}", task_hash="0", env=skill, split="train", skill=skill,
        prompt_ids=tuple(range(len(prompt))), turns=turns, stop_reason=StopReason.COMPLETED, seed=index,
    )  # fmt: skip
    sampled = [p for t in turns for p in t.rollout_logprobs]
    teacher = tuple(p + rng.gauss(0.1, 1.1) for p in sampled)
    masks = tuple("special" if token == "<|im_end|>" else "" for token in first + second)
    return KeptEpisode(
        step=step, skill=skill, replay=skill == "math", episode=episode, verdict=_full_verdict(status),
        tokens=tuple(prompt + first + observation + second), teacher_logprobs=teacher, mask_reasons=masks,
        agreement=tuple(0.0 if mask else rng.choice((-1.0, 0.0, 1.0)) for mask in masks),
        weights=tuple(0.0 if mask else 0.5 for mask in masks),
    )  # fmt: skip


def _full_verdict(status):
    if status is VerdictStatus.INFRA_ERROR:
        return Verdict.unjudged(status, "the sandbox died")
    outcome = 1.0 if status is VerdictStatus.OK else 0.0
    return Verdict(
        outcome=outcome, status=status, reward=outcome, components={"cases": 0.5, "diff_penalty": -0.05},
        flags=() if outcome else (Flag(code="hardcoded", detail=HOSTILE),), detail="3 of 6 cases pass",
        certificates=(StepCertificate(turn=0, sign=1, kind="edit_applied"),),
    )  # fmt: skip


@pytest.fixture
def started(tmp_path):
    """A run that was interrupted: steps and a first evaluation, nothing after."""
    session = Session.now(["agentopd", "train", "configs/demo.toml"])
    run = RunDirectory.create(
        tmp_path / "demo <run>", CONFIG, Provenance(seed=7, models={"student": "9f" * 32}, sessions=(session,))
    )
    run.save_eval("base", evaluation(0, 0.0))
    rng, tracker = random.Random(1), JsonlTracker(run.metrics)
    for step in range(1, 121):
        tracker.log(step, metrics(step, rng))
    tracker.close()
    statuses = [VerdictStatus.OK, VerdictStatus.WRONG, VerdictStatus.INFRA_ERROR]
    for i, step in enumerate((1, 40, 80, 120)):
        run.keep_episodes(step, [kept(step, s, 3 * i + j, statuses[(i + j) % 3]) for j, s in enumerate(SKILLS)])
    return run


@pytest.fixture
def finished(started):
    """The same run, evaluated to its end, with its teacher's scores."""
    for step in (30, 60, 90):
        started.save_eval(f"step_{step:06d}", evaluation(step, 1 - math.exp(-step / 40)))
    started.save_eval("final", evaluation(120, 1.0))
    started.save_eval("teacher", evaluation(None, 1.25))
    return started
