"""Seconds of a block's forward and backward, by a roofline: FLOPs and bytes over rates."""

from typing import NamedTuple

from prfl_engine.memory.policy import INNER, NAMES, BlockPolicy
from prfl_engine.model.flops import block_work
from prfl_engine.planner.setup import Setup
from prfl_engine.planner.stored import coming, unpacked
from prfl_kernels.sublayers import self_attention
from prfl_kernels.sublayers.cross_attention import KEEP as CROSS_KEEP

KEEP = {"attend": self_attention.KEEP, "cross": CROSS_KEEP}


class Rates(NamedTuple):
    """Of an H100 SXM: products and copies as measured there once, attention as published for
    FlashAttention-3; the link to the host, one way, and products in e4m3 are assumptions. FLOP/s, bytes/s."""

    products: float = 798e12
    attention: float = 648e12
    attention_backward: float = 561e12
    memory: float = 3.0e12
    link: float = 50e9
    products_fp8: float | None = 1300e12  # None: the GPU has none
    attention_fp8: float = 900e12


def recomputed(policy: BlockPolicy, setup: Setup, rates: Rates) -> float:
    """Seconds to recompute once what a block does not save: products, attention, and the reads and writes of
    norms."""
    c, tokens = setup.config, setup.tokens
    values = tokens * c.dim
    product, attention = 2 * values * c.dim / rates.products, 4 * values / rates.attention
    norm, norm_of_residual = 4 * values / rates.memory, 6 * values / rates.memory  # 16 bits; float32 in
    cost = {
        "normed": norm_of_residual, "projections": 3 * product, "rotated": 2 * norm,
        "attention": attention * tokens / setup.latent[0],
        "after_attention": product + 10 * values / rates.memory,
        "cross_normed": norm_of_residual, "cross_projections": product, "cross_queries": norm,
        "cross_attention": attention * c.text_len, "after_cross": product,
        "ffn_normed": norm_of_residual, "hidden": product * c.ffn_dim / c.dim,
    }  # fmt: skip
    twice = {  # by the rerun of a sublayer and by its backward
        name for sublayer, result in (("attend", "after_attention"), ("cross", "after_cross"))
        if result not in policy.saved
        for name, own, _ in INNER[sublayer]
        if own not in KEEP[sublayer][policy.rerun] and not (name == "attention" and name in policy.saved)
    }  # fmt: skip
    return sum(cost[name] * (1 + (name in twice)) for name in NAMES if name not in policy.saved)


def block_seconds(
    policy: BlockPolicy, setup: Setup, host: int, rates: Rates, frozen: bool = False
) -> float:
    """Predicted seconds of forward and backward of one block; frozen: without weight gradients."""
    size = setup.latent[0]
    work = block_work(setup.config, setup.tokens // size) * size
    linear, pairs = work.tokens / rates.products, work.attention
    forward = linear + pairs / rates.attention
    backward = linear * (1 if frozen else 2) + 2.5 * pairs / rates.attention_backward
    backward += recomputed(policy, setup, rates)
    weights = setup.config, setup.weight_dtype, setup.storage
    made, weights = unpacked(*weights) / rates.memory, coming(*weights)
    # Copies overlap with computation; what exceeds it is waited for. A forward copies both ways at once.
    forward = max(forward + made, max(host, weights) / rates.link)
    return forward + max(backward + made, (host + weights) / rates.link)
