"""Requests of the micro student, and the learner's own log-probs of what an engine made of them."""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from agentopd.contracts import Engine, Generation, GenerationRequest, SamplingParams
from agentopd.types import Episode, Turn
from agentopd_envs.micro import store
from agentopd_envs.tool_use import ToolUseEnvironment


def prompts(policy: Any, count: int = 6) -> list[list[int]]:
    tasks = islice(store.tasks("train", None, 0), count)
    return [policy.renderer.open(task.prompt, ToolUseEnvironment.tool_schemas(task)) for task in tasks]


def requests(
    rows: Sequence[Sequence[int]], temperature: float = 1.0, top_p: float = 1.0, stop_ids: tuple[int, ...] = ()
) -> list[GenerationRequest]:
    params = SamplingParams(temperature, top_p, 24, stop_ids)
    return [GenerationRequest(tuple(row), params, 2**63 + seed) for seed, row in enumerate(rows)]


def generate(engine: Engine, asked: Sequence[GenerationRequest]) -> list[Generation]:
    return asyncio.run(engine.generate(asked))


@torch.no_grad()
def learner_logprobs(model: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float) -> torch.Tensor:
    """Log-probs (N, V) of a plain forward pass."""
    logits = model(input_ids=torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def gaps_of(model: Any, request: GenerationRequest, made: Generation) -> torch.Tensor:
    """How far each log-prob (N,) is from the learner's own."""
    full = learner_logprobs(model, request.token_ids, made.token_ids, request.params.temperature)
    return (full.gather(1, torch.tensor(made.token_ids)[:, None])[:, 0] - torch.tensor(made.logprobs)).abs()


def largest_gap(model: Any, asked: Sequence[GenerationRequest], made: Sequence[Generation]) -> float:
    return max(float(gaps_of(model, *pair).max()) for pair in zip(asked, made, strict=True))


def turn_of(made: Generation) -> Turn:
    """As the rollout records it."""
    return Turn(
        token_ids=made.token_ids,
        rollout_logprobs=made.logprobs,
        weight_version=made.weight_version,
        updates=made.updates,
    )


def largest_gap_of_stretches(
    model: Any, weights: Mapping[int, Any], asked: Sequence[GenerationRequest], made: Sequence[Generation]
) -> float:
    """``largest_gap`` where each token is held to the version of the weights that sampled it; leaves the last in."""
    gaps = []
    for version, state in weights.items():
        model.load_state_dict(state)
        for request, generation in zip(asked, made, strict=True):
            versions = [which for which, size in turn_of(generation).weight_spans for _ in range(size)]
            mine = torch.tensor([which == version for which in versions])
            gaps += gaps_of(model, request, generation)[mine].tolist()
    return float(max(gaps))


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def nucleus_logprobs(model: Any, prompt: Sequence[int], sampled: Sequence[int], top_p: float) -> list[float]:
    """Log-probs of ``sampled`` within the nucleus of each position, at temperature 1."""
    found = []
    for token, full in zip(sampled, learner_logprobs(model, prompt, sampled, 1.0).exp(), strict=True):
        ordered = full.sort(descending=True).values
        nucleus = ordered[: int((ordered.cumsum(0) - ordered < top_p).sum())]
        found.append((full[token] / nucleus.sum()).log().item())
    return found


@torch.no_grad()
def largest_gap_of_episodes(model: Any, episodes: Sequence[Episode]) -> float:
    """Between the log-probs that whole episodes carry and a forward pass over their ids."""
    gaps = []
    for episode in episodes:
        ids, mask = torch.tensor(episode.token_ids), torch.tensor(episode.loss_mask).bool()
        full = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        picked = full.gather(1, ids[1:, None])[:, 0][mask[1:]]
        sampled = torch.tensor([x for turn in episode.turns for x in turn.rollout_logprobs])
        gaps.append(float((picked - sampled).abs().max()))
    return max(gaps)


async def cut_by_a_sync(engine: Any, model: Any, asked: list[GenerationRequest], is_under_way: Any) -> float:
    """Sync other weights amid turns, as version 7; ``largest_gap_of_stretches``, and the old weights are put back."""
    weights = {0: disturb(model), 7: weights_of(model)}
    call = asyncio.create_task(engine.generate(asked))
    while not is_under_way():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    await asyncio.to_thread(engine.sync_weights, 7)
    made = await call
    gap = largest_gap_of_stretches(model, weights, asked, made)
    model.load_state_dict(weights[0])
    await asyncio.to_thread(engine.sync_weights, 0)
    assert {len(x.token_ids) for x in made} == {x.params.max_tokens for x in asked}
    assert any([version for version, _ in turn_of(x).weight_spans] == [0, 7] for x in made)
    return gap


@torch.no_grad()
def disturb(model: Any) -> dict[str, torch.Tensor]:
    """Move every matrix of ``model`` by a twentieth of its spread; returns the weights before."""
    before = weights_of(model)
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=draw) if weight.dim() > 1 else 0.0)
    return before
