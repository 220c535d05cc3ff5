"""One forward and backward pass of the micro student: our attention against transformers' ``sdpa`` and ``eager``."""

from __future__ import annotations

import torch

from agentopd.attention import ATTENTION
from agentopd.models import load_model
from benchmarks.harness import compare, report

ROWS, LENGTH = 24, 190


def main() -> None:
    torch.manual_seed(0)
    model = load_model("micro/student", "bfloat16")
    input_ids_BT = torch.randint(0, 500, (ROWS, LENGTH))

    def step(attention: str) -> None:
        model.config._attn_implementation = attention
        hidden = model.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        model.lm_head(hidden).float().log_softmax(-1)[..., 0].sum().backward()
        model.zero_grad()

    report(
        {
            "vs_sdpa": compare("learner step vs sdpa", lambda: step(ATTENTION), lambda: step("sdpa")),
            "vs_eager": compare("learner step vs eager", lambda: step(ATTENTION), lambda: step("eager")),
        }
    )


if __name__ == "__main__":
    main()
