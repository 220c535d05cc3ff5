"""The transformer's body: hidden states at chosen positions, over packed rows where the model allows it.

B episodes, T padded length, N chosen positions, M packed tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from agentopd.attention import ATTENTION
from agentopd.errors import ConfigError
from agentopd.packing import Packed, pack

_TOLERANCE = 0.05
"""Relative difference of hidden states that bfloat16 explains; a token that sees another row's differs by about 1."""
_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def hidden_states(model: Any, input_ids_BT: Tensor, row_N: Tensor, position_N: Tensor) -> Tensor:
    """Hidden states (N, H) that predict the tokens at ``position_N`` of rows ``row_N``.

    Rows are packed, or right-padded for a model that cannot be: under causal attention padding cannot reach a token
    before it, so no mask is needed.
    """
    if not packs(model):
        return _padded_states(model, input_ids_BT)[row_N, position_N - 1]
    length_B = torch.zeros(len(input_ids_BT), dtype=torch.int64, device=row_N.device)
    packed = pack(input_ids_BT, length_B.scatter_reduce(0, row_N, position_N, "amax").tolist())
    return packed_states(model, packed)[packed.index_BT[row_N, position_N - 1]]


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether packed rows get the hidden states of padded ones; tried once for each model.

    They do not where attention is not ours, or where tokens meet otherwise (recurrent layers, say).
    """
    if model not in _packs:
        row_BT = torch.tensor([[1, 2, 3, 1], [1, 2, 2, 3]], device=model.device)
        _packs[model] = model.config._attn_implementation == ATTENTION
        if _packs[model]:
            packed = pack(row_BT, [4, 4])
            expected = _padded_states(model, row_BT).float()
            found = packed_states(model, packed)[packed.index_BT].float()
            _packs[model] = bool((found - expected).norm() <= _TOLERANCE * expected.norm())
    return _packs[model]


def checkpoint_activations(model: nn.Module) -> None:
    """Let every layer of ``model`` compute its activations again in the backward pass instead of keeping them.

    Raises ``ConfigError`` where transformers does not say which its layers are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"learner.activation_checkpointing: {type(model).__name__} cannot; set it to false")
    for layer in layers:
        # transformers' own switch acts in training mode alone, and training mode means dropout.
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _padded_states(model: Any, input_ids_BT: Tensor) -> Tensor:
    states_BTH: Tensor = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    return states_BTH


def packed_states(model: Any, packed: Packed, use_cache: bool = False, **kwargs: Any) -> Tensor:
    """Hidden states (M, H) of the packed tokens; further arguments go to the model."""
    states_1MH: Tensor = model.base_model(
        input_ids=packed.token_ids_M[None],
        position_ids=packed.positions_M[None],
        use_cache=use_cache,
        packed=packed,
        **kwargs,
    ).last_hidden_state
    return states_1MH[0]
