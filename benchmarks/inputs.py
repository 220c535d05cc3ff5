"""Rows such as a step of the quickstart sees: prompts of one skill and answers of ragged length."""

from __future__ import annotations

from itertools import islice

import torch

from agentopd.build import Policy
from agentopd.types import Episode, StopReason, Turn
from agentopd_envs.micro import store
from agentopd_envs.tool_use import ToolUseEnvironment


def episodes(policy: Policy, prompts: int, copies: int, seed: int = 0) -> list[Episode]:
    """``copies`` of each prompt, opened by the student's own chat template, with a random answer each."""
    torch.manual_seed(seed)
    made = []
    for number, task in enumerate(islice(store.tasks("train", None, 0), prompts)):
        prompt = tuple(policy.renderer.open(task.prompt, ToolUseEnvironment.tool_schemas(task)))
        for copy in range(copies):
            size = int(torch.distributions.LogNormal(4.0, 0.5).sample().clamp(8, 300))
            answer = tuple(torch.randint(3, 500, (size,)).tolist())
            turn = Turn(token_ids=answer, rollout_logprobs=(-1.0,) * size)
            made.append(
                Episode(
                    id=f"{number}#{copy}",
                    task_id=task.id,
                    task_hash=str(number),
                    env="tool_use",
                    split="train",
                    skill="store",
                    group_id=str(number),
                    prompt_ids=prompt,
                    turns=(turn,),
                    stop_reason=StopReason.COMPLETED,
                )
            )
    return made
