"""What a weight sync reads from the learner's model, and leaves on disk."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agentopd.engines.weight_sync import Checkpoint
from agentopd.learner import runtime
from agentopd.weights import full_weights


def test_a_checkpoint_spells_out_a_tied_head(model: Any) -> None:
    checkpoint = Checkpoint(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    checkpoint.write()
    files = [load_file(path) for path in checkpoint.path.glob("*.safetensors")]
    stored = {name: weight for file in files for name, weight in file.items()}
    assert sum(map(len, files)) == len(stored) == len(dict(model.named_parameters())) + 1
    assert torch.equal(stored["lm_head.weight"], model.model.embed_tokens.weight)
    checkpoint.remove()
    assert not checkpoint.path.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.distributed.all_gather_into_tensor:FutureWarning")  # DeepSpeed's own call
def test_weights_that_zero_3_splits_are_gathered(model: Any) -> None:
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    deepspeed = runtime.start()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with runtime.quiet():
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
    assert all(weight.numel() == 0 for weight in model.parameters())
    found = dict(full_weights(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(weight.numel() == 0 for weight in model.parameters())
