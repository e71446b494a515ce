"""FLOPs of a training step by phase, the one count for predictions and for MFU.

A product of [m, k] and [k, n] counts 2 m k n, attention 4 L S C for L queries and S keys of width C. A
backward counts two more products (one where the weights are frozen) and two more attentions. What a policy
recomputes is no model FLOP, nor is the half that attention's backward makes beyond two attentions.
"""

import math
from typing import NamedTuple

from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.wan import WanConfig
from prfl_engine.objectives import index_range
from prfl_engine.planner.setup import Setup


class Flops(NamedTuple):
    """FLOPs of linear layers and of attention."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.attention

    def times(self, products: float, attention: float | None = None) -> "Flops":
        """Each times its own factor; attention None: the same one."""
        attention = products if attention is None else attention
        return Flops(products * self.products, attention * self.attention)

    def plus(self, other: "Flops") -> "Flops":
        """The sum of both."""
        return Flops(self.products + other.products, self.attention + other.attention)


def block_flops(c: WanConfig, tokens: int, samples: int = 1, rank: int = 0) -> Flops:
    """The forward of a block for so many tokens of all samples together; rank: of low-rank updates of all of
    its linear layers."""
    image = IMAGE_TOKENS if c.image else 0
    linear = 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim)
    linear += samples * 4 * c.dim**2 * (c.text_len + image)  # keys and values of the context
    low = 2 * rank * (tokens * (14 * c.dim + 2 * c.ffn_dim) + samples * 4 * c.dim * (c.text_len + image))
    return Flops(linear + low, 4 * tokens * c.dim * (tokens / samples + c.text_len + image))


def end_flops(c: WanConfig, tokens: int, samples: int = 1, head: bool = True) -> Flops:
    """Embeddings of patches, text, time and image, and the head."""
    patch = math.prod(c.patch_size)
    per_sample = c.text_len * (c.text_dim * c.dim + c.dim**2) + c.freq_dim * c.dim + 7 * c.dim**2
    per_sample += IMAGE_TOKENS * (IMAGE_DIM**2 + IMAGE_DIM * c.dim) if c.image else 0
    values = tokens * patch * c.dim * (c.in_dim + (c.out_dim if head else 0))
    return Flops(2 * (values + samples * per_sample), 0.0)


def forward_flops(c: WanConfig, blocks: int, tokens: int, samples: int = 1, head: bool = True) -> Flops:
    """One forward of the first `blocks` blocks."""
    return block_flops(c, tokens, samples).times(blocks).plus(end_flops(c, tokens, samples, head))


def rollout_forwards(setup: Setup, groups: int = 1, padded: bool = False) -> float:
    """Forwards of one sample without gradient, on average, for all graded steps of a sample of a micro-batch.
    padded: `groups` ranks each make as many as the one that needs most."""
    r = setup.rollout
    first, last = index_range(r)
    steps, k = last + 1 - first, r.samples
    if r.mode == "persistent":  # a new chain makes the steps before the range
        return k * (r.stride - 1 + first * r.stride / steps)
    before, width = (k - 1) * steps / k, steps / k  # the last of k strata
    many = groups if padded else 1
    below = (min(1.0, max(0.0, (i + 1 - before) / width)) for i in range(steps))
    return first + sum(1 - share**many for share in below) + 1 - k


def worst_forwards(setup: Setup) -> int:
    """The same where the last graded step is the last of the range."""
    r = setup.rollout
    first, last = index_range(r)
    return r.samples * (first + r.stride - 1) if r.mode == "persistent" else last + 1 - r.samples


def graded_passes(setup: Setup) -> float:
    """Forwards with gradient, on average, for all graded steps of a sample: windows are cut at the noise."""
    first, last = index_range(setup.rollout)
    window = sum(min(setup.window, i + 1) for i in range(first, last + 1)) / (last + 1 - first)
    return setup.rollout.samples * window


def step_flops(setup: Setup, forwards: float | None = None) -> dict[str, float]:
    """Model FLOPs of one micro-batch on all ranks that share it, by phase: "flow matching", "rollout",
    "graded step", "reward". forwards: of one sample without gradient, made in fact; None: on average."""
    c, tokens, samples = setup.config, setup.tokens, setup.latent[0]
    rank = 0 if setup.lora is None else setup.lora.rank
    forward = block_flops(c, tokens, samples, rank).times(setup.count)
    backward = forward.times(1 if setup.lora is not None else 2, 2)
    ends = end_flops(c, tokens, samples)
    trained = forward.plus(backward).plus(ends.times(2 if setup.lora is not None else 3)).total
    found = {"flow matching": trained if setup.sft else 0.0}
    if not setup.reward_blocks:
        return found
    one = forward_flops(c, setup.count, tokens, samples).total / samples
    count = samples * rollout_forwards(setup) if forwards is None else forwards
    scored = forward_flops(setup.reward.config or c, setup.reward_blocks, tokens, samples, head=False)
    return found | {
        "rollout": count * one,
        "graded step": graded_passes(setup) * trained,
        "reward": setup.rollout.samples * scored.times(2, 3).total,
    }
