"""Kept episodes as the compact JSON that the page's inspector reads, within a budget of bytes."""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from agentopd.tracking import KeptEpisode
from agentopd.types import JSON, StopReason, Turn

BUDGET_BYTES = 3_000_000  # the whole page stays under 5 MB and opens at once
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|$)", re.DOTALL)


def choose(episodes: Sequence[KeptEpisode], budget: int = BUDGET_BYTES) -> list[JSON]:
    """The episodes to embed, by step: all of them, or a fair share of each skill and outcome up to ``budget`` bytes.

    Shares take turns, each giving its latest, then its earliest, and so on, so that both ends of a run stay visible.
    """
    shares: dict[tuple[str, str], deque[tuple[int, KeptEpisode]]] = defaultdict(deque)
    for index, kept in enumerate(episodes):
        shares[kept.skill, outcome_class(kept)].append((index, kept))
    chosen: dict[int, JSON] = {}
    left, from_end = budget, True
    while shares:
        for key in list(shares):
            index, kept = shares[key].pop() if from_end else shares[key].popleft()
            shown = view(kept)
            size = len(json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode())
            if size <= left:
                chosen[index] = shown
                left -= size
            if not shares[key]:
                del shares[key]
        from_end = not from_end
    return [chosen[index] for index in sorted(chosen)]


def outcome_class(kept: KeptEpisode) -> str:
    """``passed``, ``failed`` or ``unjudged``."""
    if kept.verdict.outcome is None:
        return "unjudged"
    return "passed" if kept.verdict.passed else "failed"


def view(kept: KeptEpisode) -> JSON:
    """What the inspector shows of one episode. Numbers are rounded to what a reader can use."""
    episode, verdict = kept.episode, kept.verdict
    prompt = "".join(kept.tokens[: len(episode.prompt_ids)])
    return {
        "id": episode.id,
        "task": episode.task_id,
        "step": kept.step,
        "skill": kept.skill,
        "env": episode.env,
        "replay": kept.replay,
        "stop": episode.stop_reason.value,
        "cut": episode.stop_reason.truncated or episode.stop_reason is StopReason.ENV_ERROR,
        "error": episode.error,
        "seed": str(episode.seed),  # a 63-bit number is more than JavaScript can count to
        "temperature": episode.temperature,
        "class": outcome_class(kept),
        "status": verdict.status.value,
        "outcome": verdict.outcome,
        "reward": verdict.reward,
        "components": {name: round(value, 4) for name, value in verdict.components.items()},
        "flags": [[flag.code, flag.detail] for flag in verdict.flags],
        "certificates": [[c.turn, c.sign, c.kind, c.detail] for c in verdict.certificates],
        "detail": verdict.detail,
        "prompt": prompt_messages(prompt),
        "turns": _turns(kept),
        "diffs": diffs(kept),
    }


def prompt_messages(text: str) -> list[list[str]]:
    """[role, text] of a rendered prompt. Text that is not all ChatML is kept whole: nothing the model saw is hidden."""
    found = [[match[1], match[2]] for match in _CHATML.finditer(text)]
    if _CHATML.sub("", text).strip() or not found:
        return [["prompt", text]]
    return [[role, body] for role, body in found if body or role != "assistant"]


def diffs(kept: KeptEpisode) -> list[list[Any]]:
    """[title, lines] of what the episode changed: every value that its task began with and its final state ends with.

    Where the task names a gold program, its change follows for comparison.
    """
    if kept.task is None:
        return []
    start, end = kept.task.public, kept.episode.final_state or {}
    pairs = [(name, start[name], end[name]) for name in start if name in end]
    gold = kept.task.hidden.get("gold")
    if isinstance(gold, str) and isinstance(start.get("program"), str):
        pairs.append(("gold", start["program"], gold))
    found = [(name, _diff(_text(before), _text(after))) for name, before, after in pairs]
    return [[name, lines] for name, lines in found if lines]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)


def _diff(before: str, after: str) -> list[str]:
    """Lines with their sign (" ", "-" or "+") and two of context, without file names; empty where nothing changed."""
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2))[2:]


def _turns(kept: KeptEpisode) -> list[JSON]:
    position, sampled, turns = len(kept.episode.prompt_ids), 0, []
    for turn in kept.episode.turns:
        end = position + len(turn.token_ids)
        after = end + len(turn.observation_ids)
        span = slice(sampled, sampled + len(turn.token_ids))
        turns.append(
            {
                "tokens": list(kept.tokens[position:end]),
                "student": _rounded(kept.old_logprobs[span] or turn.rollout_logprobs),
                "teacher": _rounded(kept.teacher_logprobs[span]),
                "gate": _rounded(kept.agreement[span]),
                "weights": _rounded(kept.weights[span]),
                "masks": list(kept.mask_reasons[span]) if any(kept.mask_reasons[span]) else [],
                "calls": [[call.name, json.dumps(call.arguments, ensure_ascii=False)] for call in turn.tool_calls],
                "malformed": [[bad.reason, bad.raw] for bad in turn.malformed],
                "replies": _replies(turn, "".join(kept.tokens[end:after])),
                "finish": turn.finish_reason,
            }
        )
        position, sampled = after, span.stop
    return turns


def _replies(turn: Turn, observed: str) -> list[list[str]]:
    """[role, name, text] of what came back; the raw observation where there are no messages for it."""
    if turn.results:
        return [[message.role, message.name or "", message.content] for message in turn.results]
    return [["observation", "", observed]] if observed.strip() else []


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) + 0.0 for value in values]
