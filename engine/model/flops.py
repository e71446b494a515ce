"""Floating-point operations of the models, counted from configuration and shape.

A multiplication and an addition count as two. Counted are matrix products and attention of what the model is,
whatever the kernels do: nothing that is recomputed, no rows of padding that are merged (every sample attends
to all text_len tokens), no norms. A backward takes as many for the inputs as the forward, and as many again
for weights that are trained; in attention twice as many as the forward.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.wan import WanConfig

# Dense products of bfloat16 a second, as NVIDIA publishes them, by the whole name of the processor. A part of
# one (MIG) has another name.
_PEAKS = {
    r"NVIDIA A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": 989.4e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA B200": 2250e12,
}


def peak(name: str) -> float | None:
    """The most FLOP/s of a processor in bfloat16, by torch's name of it; None where it is not known."""
    return next((rate for pattern, rate in _PEAKS.items() if re.fullmatch(pattern, name)), None)


class Work(NamedTuple):
    """FLOPs of a forward."""

    tokens: float
    """Products of weights with the tokens of the latent."""
    context: float
    """Products of weights with the tokens of text and image."""
    attention: float
    updates: float = 0
    """Products of low-rank updates."""

    def __mul__(self, n: float) -> "Work":
        return Work(*(n * a for a in self))

    def plus(self, other: "Work") -> "Work":
        """The sum of both."""
        return Work(*map(sum, zip(self, other, strict=True)))

    @property
    def products(self) -> float:
        """All but attention."""
        return self.tokens + self.context + self.updates

    @property
    def forward(self) -> float:
        """All of a forward."""
        return sum(self)

    def backward(self, trained: bool) -> float:
        """All of a backward; trained: with gradients of the weights, not of updates alone."""
        return (1 + trained) * (self.tokens + self.context) + 2 * (self.attention + self.updates)


def block_work(c: WanConfig, tokens: int, rank: int = 0) -> Work:
    """A block's forward of one sample of so many tokens: self-attention, cross-attention, FFN. rank: of
    low-rank updates of all its linear layers."""
    context = c.text_len + IMAGE_TOKENS * c.clip
    linear = 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim)
    updates = 2 * rank * (tokens * (14 * c.dim + 2 * c.ffn_dim) + 4 * context * c.dim)
    return Work(linear, 4 * context * c.dim**2, 4 * tokens * c.dim * (tokens + context), updates)


def end_work(c: WanConfig, tokens: int, head: bool = True) -> Work:
    """The forward before and after the blocks: patches, text, image and time, and the head."""
    patch, out = math.prod(c.patch_size), c.out_dim * head
    time = c.freq_dim * c.dim + 7 * c.dim**2
    image = IMAGE_TOKENS * (IMAGE_DIM**2 + IMAGE_DIM * c.dim) if c.clip else 0
    text = c.text_len * (c.text_dim * c.dim + c.dim**2)
    return Work(2 * (tokens * c.dim * patch * (c.in_dim + out) + time), 2 * (text + image), 0)


class Costs(NamedTuple):
    """What a sample of some shape costs."""

    tokens: int
    flops: dict[str, float]
    """By phase: rollout, a step; graded, a step with its backward; earlier, the backward of a window's step
    before that, whose forward is the rollout's; flow_matching and reward, forward and backward; judged, a
    reward's forward."""


def costs(
    c: WanConfig,
    shape: Sequence[int],
    rank: int = 0,
    reward: tuple[WanConfig, int] | None = None,
    reward_trained: bool = False,
) -> Costs:
    """FLOPs of every phase for one sample of latents [*, *shape].

    rank: of low-rank updates of all linear layers of the generator's blocks, which alone are trained then; 0:
    its weights are. A rollout is counted without updates, as merged ones. reward: the configuration of the
    reward model and how many blocks of it run, without pooling; reward_trained: its weights are trained.
    """
    tokens = math.prod(n // p for n, p in zip(shape, c.patch_size, strict=True))
    plain = forward_work(c, c.num_layers, tokens)
    whole = plain._replace(updates=c.num_layers * block_work(c, tokens, rank).updates)
    forward, backward = whole.forward, whole.backward(not rank)
    both = forward + backward
    found = {"rollout": plain.forward, "graded": both, "earlier": backward, "flow_matching": both}
    if reward is not None:
        scored = forward_work(*reward, tokens, head=False)
        found["reward"] = scored.forward + scored.backward(reward_trained)
        found["judged"] = scored.forward
    return Costs(tokens, found)


def forward_work(c: WanConfig, blocks: int, tokens: int, head: bool = True) -> Work:
    """The forward of one sample through the first `blocks` blocks; head: and the head."""
    return (block_work(c, tokens) * blocks).plus(end_work(c, tokens, head))
