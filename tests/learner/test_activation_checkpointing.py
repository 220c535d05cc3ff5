"""Activations computed again in the backward pass: the same update from less memory."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from agentopd.config.model import LoRAConfig
from agentopd.errors import ConfigError
from agentopd.learner.body import checkpoint_activations, hidden_states
from agentopd.weights import add_lora
from tests.tiny import qwen3

IDS = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(0))
ROW, POSITION = torch.arange(3).repeat_interleave(39), torch.arange(1, 40).repeat(3)


def passes(checkpointed: bool, lora: bool, dtype: torch.dtype) -> tuple[int, list[torch.Tensor]]:
    """Elements kept for the backward pass, and the gradients."""
    model = qwen3(64, num_hidden_layers=4).to(dtype)
    if lora:
        add_lora(model, LoRAConfig(rank=4))
    if checkpointed:
        checkpoint_activations(model)
    hidden_states(model, IDS, ROW, POSITION)  # finds out whether it packs
    kept = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal kept
        kept += args[0].numel() if checkpointed else 0  # held by the closure that computes the layer again

    for layer in model.model.layers:
        layer.register_forward_pre_hook(enter)
    with saved_tensors_hooks(keep, lambda x: x):
        found = hidden_states(model, IDS, ROW, POSITION)
    found.float().square().sum().backward()
    return kept, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_equal_and_memory_is_less(lora, dtype):
    plain, expected = passes(False, lora, dtype)
    less, found = passes(True, lora, dtype)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert less < plain / 4


def test_a_model_of_other_layers_is_refused():
    with pytest.raises(ConfigError, match="set it to false"):
        checkpoint_activations(nn.Linear(2, 2))
