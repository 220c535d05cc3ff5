"""Turns that weight updates cut: what is sampled, by which weights, and that nothing waits for the end of a turn."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentopd.contracts import Generation, GenerationRequest, SamplingParams
from agentopd.engines import HFEngine
from agentopd.engines import hf as hf_engine
from agentopd.engines.pieces import CUT, Pieces
from agentopd.types import Turn
from tests.engines.learner_view import disturb, largest_gap, largest_gap_of_stretches, turn_of, weights_of

TOKENS = tuple(range(10, 34))


def asked(room: int = len(TOKENS), drawn: int = 0) -> GenerationRequest:
    return GenerationRequest((5, 6, 7), SamplingParams(max_tokens=room), 3, "episode", drawn)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=6))
def test_pieces_make_the_turn_and_each_token_has_the_weights_that_sampled_it(cuts: list[tuple[int, int]]) -> None:
    pieces, done, version, versions = Pieces(asked()), 0, 0, []
    for size, step in [*((size, step) for size, step in cuts if size < len(TOKENS)), (len(TOKENS), 1)]:
        rest = pieces.rest
        assert rest.token_ids == (5, 6, 7, *TOKENS[:done]) and rest.drawn == done
        assert rest.params.max_tokens == len(TOKENS) - done
        made = TOKENS[done : min(done + size, len(TOKENS))]
        version += step
        is_last = done + size >= len(TOKENS)
        pieces.add(Generation(made, (-0.5,) * len(made), "stop" if is_last else CUT, version))
        versions += [version] * len(made)
        done += len(made)
        if is_last:
            break
    assert pieces.is_whole
    whole = pieces.generation()
    assert (whole.token_ids, whole.finish_reason, len(whole.logprobs)) == (TOKENS, "stop", len(TOKENS))
    turn = turn_of(whole)
    assert [version for version, size in turn.weight_spans for _ in range(size)] == versions
    assert len({version for version, _ in turn.weight_spans}) == len(turn.weight_spans)


@pytest.mark.parametrize("updates", [((0, 1),), ((3, 1),), ((2, 1), (2, 2)), ((2, 1), (1, 2))])
def test_updates_of_a_turn_divide_its_tokens(updates: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="do not divide 3 token_ids"):
        Turn(token_ids=(5, 6, 7), rollout_logprobs=(0.0,) * 3, updates=updates)


class Interrupted:
    """Updates the weights of ``engine`` after so many of its decoding steps, by what ``after`` has for them."""

    def __init__(self, engine: HFEngine, monkeypatch: pytest.MonkeyPatch, after: dict[int, Any]) -> None:
        self._engine, self._after, self._plain = engine, after, hf_engine._Batch.step
        self.steps = 0
        self.met: list[int] = []
        """The steps that were taken when an update began."""
        self.threads: list[threading.Thread] = []
        monkeypatch.setattr(hf_engine._Batch, "step", lambda batch: self._step(batch))

    def _step(self, batch: Any) -> None:
        self._plain(batch)
        self.steps += 1
        if (change := self._after.get(self.steps)) is not None:
            self.threads.append(threading.Thread(target=self._update, args=(change,)))
            self.threads[-1].start()
            while self._engine._no_update.is_set():
                time.sleep(0.001)

    def _update(self, change: Any) -> None:
        with self._engine.updating():
            self.met.append(self.steps)
            change()


@pytest.fixture
def started(model: Any) -> Iterator[Any]:
    before = weights_of(model)
    yield model
    model.load_state_dict(before)


def rows() -> list[GenerationRequest]:
    prompts = [(5, 6, 7), (9, 8, 7, 6, 5), (11,), (5, 6, 7)]
    return [GenerationRequest(row, SamplingParams(1.0, 1.0, 24), 50 + seed) for seed, row in enumerate(prompts)]


def test_a_cut_turn_goes_on_as_if_nothing_had_been_where_the_weights_are_the_same(started, monkeypatch) -> None:
    whole = HFEngine(started).generate_now(rows())
    engine = HFEngine(started, cut_turns=True)
    interrupted = Interrupted(engine, monkeypatch, {3: lambda: None, 10: lambda: engine.sync_weights(0)})
    made = engine.generate_now(rows())
    assert interrupted.met == [3, 10]
    assert [x.token_ids for x in made] == [x.token_ids for x in whole]
    for ours, theirs in zip(made, whole, strict=True):
        assert torch.tensor(ours.logprobs) == pytest.approx(torch.tensor(theirs.logprobs), abs=1e-5)
        assert (ours.weight_version, ours.updates, ours.finish_reason) == (0, (), "length")


def test_every_token_of_a_cut_turn_has_the_log_prob_of_the_weights_that_sampled_it(started, monkeypatch) -> None:
    engine = HFEngine(started, batch_size=2, cut_turns=True)
    old = weights_of(started)

    def change() -> None:
        disturb(started)
        engine.sync_weights(7)

    interrupted = Interrupted(engine, monkeypatch, {5: change})
    made = engine.generate_now(rows())
    assert interrupted.met == [5]
    # The first two rows were under way, the others not begun.
    assert sorted((x.weight_version, x.updates) for x in made) == [(0, ((5, 7),))] * 2 + [(7, ())] * 2
    weights = {0: old, 7: weights_of(started)}
    assert largest_gap_of_stretches(started, weights, rows(), made) < 1e-4 < largest_gap(started, rows(), made)


def test_without_cuts_an_update_waits_for_the_turns_under_way(started, monkeypatch) -> None:
    engine = HFEngine(started)
    interrupted = Interrupted(engine, monkeypatch, {5: lambda: engine.sync_weights(7)})
    made = engine.generate_now(rows())
    for thread in interrupted.threads:
        thread.join()
    assert interrupted.met == [24] and {(x.weight_version, x.updates) for x in made} == {(0, ())}
