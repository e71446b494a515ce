"""Seconds of a block's forward and backward, by a roofline: FLOPs and bytes over rates.

Pieces of the tokens (model.chunk) cost in addition, on every rank and in every block:

- results of pieces are copied into whole tensors;
- gradients of weights of every piece but the first are added to a sum in float32;
- q and k are recomputed once more in a backward, where the projections are not saved;
- products of few rows fill the processors less evenly: tiles of TILE run in waves of `Rates.processors`;
- kernels of pieces follow each other with gaps of GAP seconds.

TILE and GAP are assumptions; bytes, products and numbers of kernels are those of kernels/sublayers.
"""

import math
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
    processors: int = 132


TILE = 128, 256  # rows and columns of a product that one processor computes at a time
GAP = 2e-6  # seconds between two kernels in one stream
ASSUMED = "pieces (model.chunk): copies and sums counted, tiles of 128 x 256 and gaps of 2 us assumed"
KERNELS = 16, 34  # of a piece in a forward and in a backward: 5 and 12 products, norms, copies, sums


class Chunked(NamedTuple):
    """Seconds that pieces cost a rank in a block."""

    forward: float = 0.0
    backward: float = 0.0


def chunked(policy: BlockPolicy | None, setup: Setup, rates: Rates, frozen: bool = False) -> Chunked:
    """What model.chunk costs. policy None: of a forward alone; frozen: without weight gradients."""
    c, rows = setup.config, -(-setup.tokens // setup.sequence)
    n = 1 if setup.chunk is None else -(-rows // setup.chunk)
    if n == 1:
        return Chunked()
    r, b, values = setup.residual_dtype.itemsize, setup.compute_dtype.itemsize, rows * c.dim
    products = ((4, c.dim, c.dim), (1, c.ffn_dim, c.dim), (1, c.dim, c.ffn_dim))  # how many, columns, depth

    def uneven(columns: int, height: int) -> float:
        tiles = math.ceil(height / TILE[0]) * math.ceil(columns / TILE[1])
        return math.ceil(tiles / rates.processors) * rates.processors / tiles

    def lost(columns: int, depth: int) -> float:
        more = max(0.0, uneven(columns, setup.chunk) - uneven(columns, rows))
        return more * 2 * rows * columns * depth / rates.products

    copied = 2 * values * (4 * b + 2 * r), 2 * values * (2 * b + 2 * r)  # read and written
    forward = sum(m * lost(columns, depth) for m, columns, depth in products)
    forward += copied[0] / rates.memory + n * KERNELS[0] * GAP
    backward = sum(m * lost(depth, columns) for m, columns, depth in products)
    backward += copied[1] / rates.memory + n * KERNELS[1] * GAP
    if not frozen:  # a product of every piece is written, then read with the sum, which is written
        weights = sum(m * columns * depth for m, columns, depth in products)
        backward += (n - 1) * weights * 4 * 4 / rates.memory
    if policy is not None and "projections" not in policy.saved:
        backward += 4 * values * c.dim / rates.products + values * (r + b) / rates.memory
    return Chunked(forward, backward)


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
    """Predicted seconds of forward and backward of one block, of all ranks of a sample together; frozen:
    without weight gradients."""
    size = setup.latent[0]
    work = block_work(setup.config, setup.tokens // size) * size
    linear, pairs = work.tokens / rates.products, work.attention
    forward = linear + pairs / rates.attention
    backward = linear * (1 if frozen else 2) + 2.5 * pairs / rates.attention_backward
    backward += recomputed(policy, setup, rates)
    pieces = chunked(policy, setup, rates, frozen)
    forward += setup.sequence * pieces.forward
    backward += setup.sequence * pieces.backward
    weights = setup.config, setup.weight_dtype, setup.storage
    made, weights = unpacked(*weights) / rates.memory, coming(*weights)
    # Copies overlap with computation; what exceeds it is waited for. A forward copies both ways at once.
    forward = max(forward + made, max(host, weights) / rates.link)
    return forward + max(backward + made, (host + weights) / rates.link)
