import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentopd.engines.sampling import UniformStreams, sample

logits = st.lists(st.floats(-8, 8), min_size=2, max_size=12)


def grid(count: int) -> torch.Tensor:
    return (torch.arange(count) + 0.5) / count


@given(logits, st.floats(0.3, 2.0))
def test_a_grid_of_uniforms_reproduces_the_distribution(row: list[float], temperature: float) -> None:
    count = 4000
    tokens, logprobs = sample(torch.tensor([row]).expand(count, -1), grid(count), temperature, 1.0)
    expected = torch.softmax(torch.tensor(row) / temperature, -1)
    frequencies = torch.bincount(tokens, minlength=len(row)) / count
    assert torch.allclose(frequencies, expected, atol=2 / count)
    assert torch.allclose(logprobs.exp(), expected[tokens], atol=1e-5)


@given(logits, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set_and_renormalises(row: list[float], top_p: float) -> None:
    count = 400
    tokens, logprobs = sample(torch.tensor([row]).expand(count, -1), grid(count), 1.0, top_p)
    probs = torch.softmax(torch.tensor(row).double(), -1)  # rounded to fp32 first, as the sampler sees them
    chosen = sorted(set(tokens.tolist()))
    mass = sum(math.exp(logprobs[tokens == token][0].item()) for token in chosen)
    assert mass <= 1 + 1e-4
    # Tokens outside the nucleus: everything more probable than one of them already reached top_p.
    for token in chosen:
        assert probs[probs > probs[token]].sum() < top_p + 1e-5


def test_temperature_zero_is_a_point_mass() -> None:
    tokens, logprobs = sample(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), 0.0, 1.0)
    assert tokens.tolist() == [1] and logprobs.tolist() == [0.0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_never_pick_the_impossible(uniform: float) -> None:
    row = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    token, logprob = sample(row, torch.tensor([uniform]), 1.0, 1.0)
    assert token.item() in (1, 2) and torch.isfinite(logprob).all()


def test_streams_belong_to_their_seed() -> None:
    alone = UniformStreams([7])
    crowd = UniformStreams([3, -5, 7, 2**70])
    expected = [alone.draw().item() for _ in range(150)]
    seen = [crowd.draw()[2].item() for _ in range(100)]
    crowd.keep([0, 2])
    seen += [crowd.draw()[1].item() for _ in range(50)]
    assert seen == expected
    later = UniformStreams([9, 7, 7], [5, 77, 0])
    seen = [later.draw() for _ in range(73)]
    assert [row[1].item() for row in seen] == expected[77:]
    assert [row[2].item() for row in seen] == expected[:73]
    assert len(set(expected)) > 140 and min(expected) >= 0 and max(expected) < 1
    assert abs(np.mean(expected) - 0.5) < 0.1
