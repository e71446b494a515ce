"""Keys of random numbers: purpose, seed and position of the sample, all three, and nothing else."""

import numpy as np
import pytest
import torch

from prfl_engine.seeds import Purpose, each, integers, noise_like, seeded, torch_seed


def test_no_two_keys_share_numbers():
    """Positions that are padded, swapped, run together or beyond 32 and 64 bits too."""
    numbers = (0, 1, 2, 10, 12, 2**32, 2**32 + 1, 2**40, 2**64)
    keys = [(p, seed, at) for p in Purpose for seed in numbers for at in numbers]
    draws = {tuple(seeded(*key).integers(2**63, size=2).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert seeded(*keys[5]).random() == seeded(*keys[5]).random()
    with pytest.raises(TypeError):
        seeded(Purpose.SAMPLE, 0)


def test_purposes_have_noise_of_their_own():
    """CPU generators of torch have seeds of 32 bits; this noise is seeded with 128."""
    latent = torch.zeros(1, 16, 2, 4, 4)
    noise = torch.stack([noise_like(latent, p, 0, 0).flatten() for p in Purpose])
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 0.25  # five deviations of 1 / sqrt(512)
    assert len({torch_seed(p, 0) % 2**32 for p in Purpose}) == len(Purpose)


def test_noise_is_that_of_a_sample():
    latent = torch.zeros(5, 16, 1, 4, 4)
    whole = noise_like(latent, Purpose.SAMPLE, 3, 7)
    for sizes in ([1, 4], [2, 2, 1], [1, 1, 1, 1, 1]):
        starts = np.cumsum([7, *sizes])[:-1].tolist()
        parts = [noise_like(latent[:n], Purpose.SAMPLE, 3, at) for n, at in zip(sizes, starts, strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32 and whole.shape == latent.shape
    other = [noise_like(latent, Purpose.SAMPLE, 3, 8), noise_like(latent, Purpose.SAMPLE, 4, 7)]
    assert not any((a == whole).any() for a in other)


def test_noise_is_gaussian():
    noise = noise_like(torch.zeros(2, 50_000), Purpose.SAMPLE, 0, 0)
    # Five deviations: 5 / sqrt(n), and 5 sqrt(2 / n) for the variance.
    assert abs(noise.mean()) < 0.016
    assert abs(noise.var() - 1) < 0.023


def test_whole_numbers():
    drawn = integers(4, Purpose.SFT_LEVEL, 0, 0, 400)
    assert drawn.dtype == torch.long and set(drawn.tolist()) == set(range(4))
    assert torch.equal(integers(4, Purpose.SFT_LEVEL, 0, 100, 300), drawn[100:])
    assert [rng.random() for rng in each(Purpose.LOSER, 0, 5, 2)] == [
        seeded(Purpose.LOSER, 0, 5).random(), seeded(Purpose.LOSER, 0, 6).random(),
    ]  # fmt: skip
