"""Random numbers by key: (purpose, seed, position) alone decides a draw.

A position is that of a sample, so a draw does not depend on the batch that the sample is in. In training the
i-th sample of micro-batch p is at position p * data.batch_size + i; a smaller batch leaves
positions unused. Keys are hashed to 128 bits. Noise comes from numpy: the seeds of torch's CPU generator have
32 bits only.
"""

from collections.abc import Iterator
from enum import Enum, auto
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


class Purpose(Enum):
    """What random numbers are for. The position is that of a sample, or of what is in brackets."""

    WEIGHTS = auto()  # initial weights of a generator without model.path (0)
    REWARD_HEAD = auto()  # initial weights of a new reward model's head; its dropout in training goes on (0)
    LORA = auto()  # initial A of all updates (0)
    ORDER = auto()  # the order of the samples in an epoch (epoch)
    SUBSTITUTE = auto()  # training: the sample in place of a broken one
    CAPTION = auto()  # training: the dropped prompt, the short or the long caption
    LOSER = auto()  # the loser that a winner meets, and its caption
    SFT_LEVEL = auto()  # noise level of flow matching
    SFT_NOISE = auto()  # noise of flow matching
    ROLLOUT_INDEX = auto()  # graded steps of a rollout
    ROLLOUT_NOISE = auto()  # noise that a rollout starts from
    SEED_NOISE = auto()  # the same of the further seeds of a sample (seed_position)
    SEED_TURN = auto()  # which of two seeds of a sample is graded first
    POOL_PLACE = auto()  # where in the range a slot of a pool of chains starts (slot)
    POOL_ORDER = auto()  # the order in which the slots of a stratum are drawn (round and stratum)
    POOL_JUMP = auto()  # how far a round of draws runs ahead (round)
    REWARD_LEVEL = auto()  # noise level of reward training
    REWARD_NOISE = auto()  # noise of reward training
    REWARD_DRAW = auto()  # PRFL: noise that the result of a graded step gets before it is scored again
    DRIFT = auto()  # noise of the rollout whose drift is measured (0)
    VALIDATION_SFT = auto()  # validation: noise of flow matching
    VALIDATION_SAMPLE = auto()  # validation: noise that samples start from
    VALIDATION_SCORE = auto()  # validation: noise under which samples are scored
    ACCURACY = auto()  # validation of a reward model: noise of the latents
    SAMPLE = auto()  # prfl sample: noise that samples start from
    SCORE = auto()  # prfl score: noise under which all samples are scored (draw)
    ROUNDING = auto()  # stochastic rounding; the seed is the update's number (parameter and block of it)
    DEMO_SAMPLE = auto()  # the demo's comparison: noise that samples start from
    DEMO_SCORE = auto()  # the demo's comparison: noise under which samples are scored


def seeded(purpose: Purpose, seed: int, position: int) -> np.random.Generator:
    """The random generator of a key."""
    key = blake2b(f"{purpose.name} {seed} {position}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(key, "big"))


def each(purpose: Purpose, seed: int, first: int, count: int) -> Iterator[np.random.Generator]:
    """The generators of the samples at positions first, first + 1, ..."""
    return (seeded(purpose, seed, position) for position in range(first, first + count))


def noise_like(latent: Tensor, purpose: Purpose, seed: int, first: int) -> Tensor:
    """Gaussian noise of the shape of `latent` [B, ...], float32, the same on every device; row i is that of
    the sample at position first + i."""
    # Pinned: from other memory a copy of this size may wait for what the device has queued before it.
    noise = torch.empty(latent.shape, dtype=torch.float32, pin_memory=latent.is_cuda)
    for row, rng in zip(noise.numpy(), each(purpose, seed, first, len(noise)), strict=True):
        rng.standard_normal(dtype=np.float32, out=row)
    return noise.to(latent.device, non_blocking=True)


def seed_position(seed: int, position: int) -> int:
    """The position that further seed `seed` of the sample at a position has: of no other of either."""
    return (seed << 64) + position


def integers(below: int, purpose: Purpose, seed: int, first: int, count: int) -> Tensor:
    """Uniform whole numbers in 0..below-1 [count], long, on the CPU, of the samples from `first` on."""
    return torch.tensor([int(rng.integers(below)) for rng in each(purpose, seed, first, count)])


def torch_seed(purpose: Purpose, seed: int, position: int = 0) -> int:
    """A seed for a generator of torch; that of the CPU reads 32 bits of it."""
    return int(seeded(purpose, seed, position).integers(2**63))
