"""Keys and values kept between the turns of an episode: less work, the same samples."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from agentopd.contracts import Generation, GenerationRequest, SamplingParams
from agentopd.engines import HFEngine
from agentopd.engines.cache import Row, TurnCache

EVERY_ID_STOPS = tuple(range(0, 40, 3))


def play(engine: HFEngine, openings: Sequence[Sequence[int]], turns: int, sessions: bool = True) -> list[list[Any]]:
    """Episodes of ``turns`` turns with a tool result of another length after each; what every turn sampled."""
    made: list[list[Generation]] = [[] for _ in openings]
    contexts = [list(opening) for opening in openings]
    for turn in range(turns):
        live = [row for row in range(len(openings)) if all(x.finish_reason == "stop" for x in made[row])]
        asked = [
            GenerationRequest(
                contexts[row],
                SamplingParams(1.0, 1.0, 8 + row % 3, EVERY_ID_STOPS),
                1000 * turn + row,
                f"episode {row}" if sessions else "",
            )
            for row in live
        ]
        for row, generation in zip(live, engine.generate_now(asked), strict=True):
            made[row].append(generation)
            contexts[row] += [*generation.token_ids, *[(7 * row + turn + i) % 37 + 3 for i in range((row + turn) % 4)]]
    return made


def openings(count: int = 9) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 40, (3 + 2 * i,), generator=draw).tolist() for i in range(count)]
    return [*rows, rows[0], rows[3]]


@pytest.fixture
def prefilled(model: Any) -> list[int]:
    """Token positions of every forward pass, padding included, decoding steps left out."""
    seen: list[int] = []
    play(HFEngine(model), openings(), turns=1)  # Tries once whether this model can be packed.

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            seen.append(kwargs["input_ids"].numel())

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("batch_size", [256, 4])
def test_kept_turns_change_no_sample(model: Any, batch_size: int) -> None:
    whole = play(HFEngine(model), openings(), turns=4, sessions=False)
    kept = play(HFEngine(model, batch_size), openings(), turns=4)
    assert max(map(len, whole)) == 4, "some episode must reach the last turn"
    for ours, theirs in zip(kept, whole, strict=True):
        assert [x.token_ids for x in ours] == [x.token_ids for x in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=1e-4)


def test_later_turns_prefill_the_tool_results_only(model: Any, prefilled: list[int]) -> None:
    rows = openings()
    play(HFEngine(model), rows, turns=1)
    first = sum(prefilled)
    prefilled.clear()
    play(HFEngine(model), rows, turns=4)
    with_sessions = sum(prefilled) - first
    prefilled.clear()
    play(HFEngine(model), rows, turns=4, sessions=False)
    assert with_sessions < 0.25 * (sum(prefilled) - first)


def test_new_weights_forget_every_turn(model: Any) -> None:
    engine = HFEngine(model)
    (first,) = engine.generate_now([_request([5, 6, 7, 8], "a")])
    longer = [5, 6, 7, 8, *first.token_ids, 9, 10]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.sync_weights(1)
    (ours,) = engine.generate_now([_request(longer, "a")])
    (fresh,) = HFEngine(model).generate_now([_request(longer, "")])
    assert ours.token_ids == fresh.token_ids and ours.logprobs == fresh.logprobs


def test_a_session_that_was_rewritten_is_computed_anew(model: Any) -> None:
    engine = HFEngine(model)
    engine.generate_now([_request([5, 6, 7, 8], "a")])
    other = [5, 6, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 4]
    (ours,) = engine.generate_now([_request(other, "a")])
    assert ours == HFEngine(model).generate_now([_request(other, "")])[0]


def test_no_memory_keeps_nothing(model: Any, prefilled: list[int]) -> None:
    play(HFEngine(model, turn_cache_mb=0), openings(), turns=3)
    without = list(prefilled)
    prefilled.clear()
    play(HFEngine(model), openings(), turns=3, sessions=False)
    assert without == prefilled


def test_the_oldest_rows_leave_first() -> None:
    cache = TurnCache(max_bytes=2 * 64)
    for name in "abc":
        cache.put(name, Row((1, 2), torch.zeros(2, 1, 2, 4)))
    assert cache.take("a", [1, 2, 3]) is None
    kept = cache.take("b", [1, 2, 3])
    assert kept is not None and cache.take("b", [1, 2, 3]) is None, "a row is taken once"
    assert cache.take("c", [1, 2]) is None, "nothing would be left to decode"
    cache.put("d", kept)
    cache.clear()
    assert cache.take("d", [1, 2, 3]) is None


def _request(token_ids: Sequence[int], session: str) -> GenerationRequest:
    return GenerationRequest(token_ids, SamplingParams(1.0, 1.0, 12, EVERY_ID_STOPS), 3, session)
