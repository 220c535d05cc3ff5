"""A model's weights as others need them: whole where ZeRO-3 splits them, and with low-rank adapters folded in.

Adapters are added in place, so that the model stays the class it was; what is computed apart from the model's own
layers (its output head, its embedding) cannot have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from agentopd.config.model import LoRAConfig
from agentopd.errors import ConfigError

_BASE, _ADAPTER = ".base_layer.", ".lora_"


def add_lora(model: Any, config: LoRAConfig) -> None:
    """Give ``model`` trainable adapters and freeze the rest. Raises ``ConfigError``."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("model.lora needs peft: pip install 'agentopd[lora]', or leave it out") from None
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    apart = (model.get_input_embeddings(), model.get_output_embeddings())
    for name in (name for name, layer in model.named_modules() if layer in apart):
        if not isinstance(targets, str) and name.rpartition(".")[2] in targets:
            raise ConfigError(f"model.lora.targets {targets!r} name {name!r}, which cannot have one: leave it out")
    try:
        inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), model)
    except ValueError as exc:
        raise ConfigError(f"model.lora.targets {targets!r}: {str(exc).splitlines()[0]}") from None


def has_lora(model: nn.Module) -> bool:
    """Whether ``model`` has adapters."""
    return any(_ADAPTER in name for name, _ in model.named_parameters())


def keep_lora(module: nn.Module, state: dict[str, Any], *rest: object) -> None:
    """A post-hook of ``state_dict`` that leaves adapters alone in it."""
    for name in [name for name in state if _ADAPTER not in name]:
        del state[name]


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of every parameter, one at a time. Under ZeRO-3 every rank must read all of them."""
    for name, weight in model.named_parameters():
        if _ADAPTER in name:
            continue
        layer: Any = model.get_submodule(name.partition(_BASE)[0]) if name.endswith(f"{_BASE}weight") else None
        with gathered([weight] if layer is None else list(layer.parameters())):
            whole = weight.detach()
            if layer is not None:
                whole = whole + layer.get_delta_weight("default").detach()
            yield _plain_name(name), whole.clone() if hasattr(weight, "ds_id") else whole


def _plain_name(name: str) -> str:
    return name.replace(_BASE, ".")


def full_shapes(model: nn.Module) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what ``full_weights`` yields, in its order."""
    return [
        (_plain_name(name), weight.dtype, tuple(getattr(weight, "ds_shape", weight.shape)))
        for name, weight in model.named_parameters()
        if _ADAPTER not in name
    ]


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Whole ``parameters`` for a while, where ZeRO-3 splits them; every rank must enter."""
    split = [weight for weight in parameters if hasattr(weight, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[Any] = zero.GatheredParameters(split)
    return context
