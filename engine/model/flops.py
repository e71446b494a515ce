"""Floating-point operations of the models, counted from configuration and shape.

A multiplication and an addition count as two. Counted are matrix products and attention of what the model is,
whatever the kernels do: nothing that is recomputed, no rows of padding that are merged (every sample attends
to all text_len tokens), no norms. A backward takes as many for the inputs as the forward, and as many again
for weights that are trained; in attention twice as many as the forward.
"""

import math
import re
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

    def __mul__(self, n: float) -> "Work":
        return Work(*(n * a for a in self))

    @property
    def forward(self) -> float:
        """All of a forward."""
        return sum(self)

    def backward(self, trained: bool) -> float:
        """All of a backward; trained: with gradients of the weights."""
        return (1 + trained) * (self.tokens + self.context) + 2 * self.attention


def block_work(c: WanConfig, tokens: int) -> Work:
    """A block's forward of one sample of so many tokens: self-attention, cross-attention, FFN."""
    context = c.text_len + IMAGE_TOKENS * c.image
    linear = 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim)
    return Work(linear, 4 * context * c.dim**2, 4 * tokens * c.dim * (tokens + context))


def _ends(c: WanConfig, tokens: int) -> Work:
    """The forward before and after the blocks: patches, text, image and time, and the head."""
    patch = math.prod(c.patch_size)
    time = c.freq_dim * c.dim + 7 * c.dim**2
    image = IMAGE_TOKENS * (IMAGE_DIM**2 + IMAGE_DIM * c.dim) if c.image else 0
    text = c.text_len * (c.text_dim * c.dim + c.dim**2)
    return Work(2 * (tokens * c.dim * patch * (c.in_dim + c.out_dim) + time), 2 * (text + image), 0)


class Costs(NamedTuple):
    """What a sample of some shape costs."""

    tokens: int
    flops: dict[str, float]
    """By phase: rollout, a step; graded, a step with its backward; earlier, the backward of a window's step
    before that, whose forward is the rollout's; flow_matching and reward, forward and backward."""


def costs(
    c: WanConfig,
    shape: tuple[int, int, int],
    trained: bool = True,
    reward: tuple[WanConfig, int] | None = None,
    reward_trained: bool = False,
) -> Costs:
    """FLOPs of every phase for one sample of latents [*, *shape].

    trained: the generator's weights are, not an adapter (whose own FLOPs are not counted). reward: the
    configuration of the reward model and how many blocks of it run; reward_trained: its weights are trained.
    """
    tokens = math.prod(n // p for n, p in zip(shape, c.patch_size, strict=True))
    whole, ends = block_work(c, tokens) * c.num_layers, _ends(c, tokens)
    whole = Work(*map(sum, zip(whole, ends, strict=True)))
    forward, backward = whole.forward, whole.backward(trained)
    both = forward + backward
    found = {"rollout": forward, "graded": both, "earlier": backward, "flow_matching": both}
    if reward is not None:
        theirs, blocks = reward
        scored = block_work(theirs, tokens) * blocks
        found["reward"] = scored.forward + scored.backward(reward_trained)
    return Costs(tokens, found)
