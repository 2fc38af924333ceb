"""NEFTune's noise: its size, its randomness, and that it goes on after a checkpoint."""

from __future__ import annotations

import pytest
import torch

from luthier.llm.rows import Group
from luthier.train.engine.noise import example_lengths, neftune


def test_noise_is_uniform_within_alpha_over_the_root_of_length_times_width() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([100.0] * 300 + [25.0] * 300)
    noise = neftune(torch.zeros(600, 64), 5.0, lengths)
    for rows, length in ((noise[:300], 100), (noise[300:], 25)):
        bound = 5.0 / (length * 64) ** 0.5
        assert float(rows.abs().max()) <= bound * 1.0001
        assert float(rows.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert float(rows.mean()) == pytest.approx(0, abs=0.01 * bound)


def test_noise_goes_on_from_a_saved_random_state() -> None:
    embeddings, lengths = torch.zeros(1, 6, 8), torch.full((6,), 6.0)
    state = torch.get_rng_state()
    first, second = neftune(embeddings, 5.0, lengths), neftune(embeddings, 5.0, lengths)
    torch.set_rng_state(state)
    assert torch.equal(neftune(embeddings, 5.0, lengths), first)
    assert not torch.equal(first, second)


def test_noise_keeps_number_type_and_gradient() -> None:
    embeddings = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    noisy = neftune(embeddings, 5.0, torch.full((4,), 4.0))
    noisy.sum().backward()
    assert noisy.dtype == torch.bfloat16
    assert embeddings.grad is not None
    assert bool((embeddings.grad == 1).all())


def test_without_alpha_nothing_is_added_or_drawn() -> None:
    embeddings, state = torch.randn(4, 8), torch.get_rng_state()
    assert neftune(embeddings, 0.0, torch.ones(4)) is embeddings
    assert torch.equal(torch.get_rng_state(), state)


def test_every_token_has_the_length_of_its_example_and_a_prefix_the_mean() -> None:
    groups = [Group(prefix=2, rest_lengths=(1, 3)), Group(prefix=0, rest_lengths=(2,))]
    assert example_lengths(groups).tolist() == [4, 4, 3, 5, 5, 5, 2, 2]
