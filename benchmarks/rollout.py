"""The in-process engine against Hugging Face ``generate``: the same student, prompts, lengths and temperature.

Prints tokens per CPU second as ratios; 64 prompts in groups of 4, ragged ends. ``generate`` returns no log-probs here,
ours always does.
"""

from __future__ import annotations

from itertools import islice

import torch

from agentopd.build import build_policy
from agentopd.config.run import RolloutConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd_envs.micro import store
from agentopd_envs.tool_use import ToolUseEnvironment
from benchmarks.harness import compare, report

PROMPTS, COPIES, NEW = 16, 4, 64


def main() -> None:
    torch.manual_seed(0)
    policy = build_policy("micro/student", "bfloat16", RolloutConfig())
    tasks = list(islice(store.tasks("train", None, 0), PROMPTS))
    opened = [policy.renderer.open(task.prompt, ToolUseEnvironment.tool_schemas(task)) for task in tasks]
    prompts = [ids for ids in opened for _ in range(COPIES)]
    stop = policy.renderer.end_of_turn_ids
    params = SamplingParams(temperature=1.0, max_tokens=NEW, stop_ids=stop)
    requests = [GenerationRequest(tuple(ids), params, seed) for seed, ids in enumerate(prompts)]

    longest = max(map(len, prompts))
    padded = torch.tensor([[policy.pad_id] * (longest - len(ids)) + ids for ids in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor([[len(ids)] for ids in prompts])).long()

    def ours() -> None:
        policy.engine.generate_now(requests)

    def theirs() -> None:
        with torch.no_grad():
            policy.model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=NEW,
                eos_token_id=list(stop),
                pad_token_id=policy.pad_id,
            )

    report({"vs_hf_generate": compare("rollout vs transformers generate", ours, theirs)})


if __name__ == "__main__":
    main()
