"""The feed-forward sublayer of a block as one operation that is told what to save for its backward.

    s  = x + y                                       the residual stream; y is the sublayer before, or None
    n  = LN(s) (1 + scale) + shift                   x, y [B, L, C]; shift, scale, gate [B, C]
    h  = n W1^T,  g = gelu_tanh(h + b1)              W1 [F, C]
    x' = s + gate (g W2^T + b2)                      W2 [C, F]

W1 and W2 may have a low-rank update each (LoRA, prfl_kernels.sublayers.products). Saved for the backward: s,
mean and 1/std of every token, the vectors and weights, and what `keep` names:

    mode         saves           bytes (16 bits)  recomputed in backward
    nothing      -                                n, h, g
    projections  hidden: h       2 L F            n, g
    all          and normed: n   2 L F + 2 L C    g

"attention" saves the same as "nothing": it is a mode of the attention sublayers. g is never saved: the
backward computes it in the pass that computes dh. g W2^T is never needed, see
prfl_kernels.sublayers.products. n is not saved where W1 and its update are frozen and h is saved. With
`chunk` the sublayer works on that many tokens at a time, forward and backward, so h where it is not saved,
g, their gradients and n never exist as a whole.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from prfl_kernels.bias_gelu import pair as gelu_pair
from prfl_kernels.jit import wide
from prfl_kernels.norm import op as add_norm
from prfl_kernels.sublayers import checks
from prfl_kernels.sublayers.chunks import numbers, pieces, together
from prfl_kernels.sublayers.operation import Operation, Shape
from prfl_kernels.sublayers.products import (
    GatedProduct,
    LowRank,
    Product,
    Sums,
    flattened,
    kept,
    linear,
    low_ranks,
    ready,
)

KEEP = {"nothing": (), "attention": (), "projections": ("hidden",), "all": ("hidden", "normed")}


class FFNWeights(NamedTuple):
    """Weights and biases of the two products, of any float dtype."""

    w1: Tensor  # [F, C]
    b1: Tensor  # [F]
    w2: Tensor  # [C, F]
    b2: Tensor  # [C]


class Inputs(NamedTuple):
    """x, y [B, L, C]; shift, scale, gate [B, C]; weights and updates as in FFNWeights and LowRank."""

    x: Tensor
    y: Tensor | None
    shift: Tensor
    scale: Tensor
    gate: Tensor
    w1: Tensor
    w1_bias: Tensor
    w2: Tensor
    w2_bias: Tensor
    w1_down: Tensor | None
    w1_up: Tensor | None
    w2_down: Tensor | None
    w2_up: Tensor | None


class Settings(NamedTuple):
    """What is not a tensor, as `modulated_ffn` takes it."""

    factors: tuple[float, float]  # of the updates of w1 and w2
    eps: float
    dtype: torch.dtype
    chunk: int | None


class Saves(NamedTuple):
    """What is saved."""

    residual: Annotated[bool, "s"]
    hidden: Annotated[bool, "h"]
    normed: Annotated[bool, "n"]


class Results(NamedTuple):
    """x', and what is saved: s, its statistics [2, B, L], h [B, L, F] and n [B, L, C]."""

    out: Tensor | None
    s: Tensor | None
    stats: Tensor
    h: Tensor
    n: Tensor


class Wants(NamedTuple):
    """The groups of gradients."""

    stream: Annotated[bool, "x", "y"]
    vectors: Annotated[bool, "shift", "scale"]
    gate: Annotated[bool, "gate"]
    w1: Annotated[bool, "w1", "w1_bias"]
    w2: Annotated[bool, "w2", "w2_bias"]
    low1: Annotated[bool, "w1_down", "w1_up"]
    low2: Annotated[bool, "w2_down", "w2_up"]


def _shapes(inputs: Inputs, settings: Settings) -> dict[str, Shape | None]:
    row, (batch, length) = tuple(inputs.x.shape), inputs.x.shape[:2]
    return {
        "out": (row, inputs.x.dtype),
        "s": None if inputs.y is None else (row, inputs.x.dtype),
        "stats": ((2, batch, length), wide(inputs.x.dtype)),
        "h": ((batch, length, len(inputs.w1)), settings.dtype),
        "n": (row, settings.dtype),
    }


def _begin(x, y, inputs: Inputs, settings: Settings):
    """(s, n, statistics) of a piece x, y of the tokens."""
    run = add_norm.pair("modulate" if y is None else "gated_add_modulate", x)[0]
    s, n, _, stats = run(x, y, None, inputs.scale, inputs.shift, 1.0, settings.eps, settings.dtype)
    return x if y is None else s, n, stats


def _forward(inputs: Inputs, settings: Settings, saves: Saves) -> dict[str, Tensor | None]:
    low1, low2 = low_ranks(inputs, ("w1", "w2"), settings.factors)
    found = pieces(inputs.x, settings.chunk)
    w1, w2 = ready((inputs.w1, inputs.w2), settings.dtype, found)

    def run(at: slice):
        s, n, stats = _begin(inputs.x[:, at], None if inputs.y is None else inputs.y[:, at], inputs, settings)
        h = linear(n, w1, None, low1)
        if not saves.normed:
            n = None
        g = gelu_pair(h)[0](h, inputs.w1_bias)
        if not saves.hidden:
            h = None
        end = add_norm.pair("gated_add", s)[0]
        out = end(s, linear(g, w2, inputs.w2_bias, low2), inputs.gate, None, None, 0.0, 0.0, None)[0]
        return out, s if saves.residual and inputs.y is not None else None, stats, h, n

    return dict(zip(Results._fields, together(run, found, (1, 1, 2, 1, 1)), strict=True))


def _save(inputs: Inputs, r: Results) -> tuple[Inputs, Results]:
    """s in the place of x; of y its dtype."""
    if inputs.y is not None:
        inputs = inputs._replace(x=r.s, y=inputs.y.new_empty(0))
    return inputs, r._replace(out=None, s=None)


def _backward(dout, inputs: Inputs, saved: Results, settings: Settings, wants: Wants) -> dict[str, Tensor]:
    h, n, y_dtype = saved.h, saved.n, None if inputs.y is None else inputs.y.dtype
    found = pieces(inputs.x, settings.chunk)
    (ready1,) = ready((inputs.w1,), settings.dtype, found)
    low1, low2 = low_ranks(inputs, ("w1", "w2"), settings.factors)
    first = Product(low1, wants.w1, wants.low1)
    second = GatedProduct(
        inputs.gate, inputs.w2, inputs.w2_bias, low2, settings.dtype, wants.w2, wants.gate, wants.low2,
    )  # fmt: skip
    vectors = Sums()
    needs_n = wants.w1 or wants.low1 or not h.numel()

    def run(at: slice):
        d, x = dout[:, at].to(settings.dtype), inputs.x[:, at]
        n_at = n[:, at] if n.numel() else _begin(x, None, inputs, settings)[1] if needs_n else None
        h_at = h[:, at] if h.numel() else linear(n_at, ready1, None, low1)
        dg = second.input_gradient(d)
        dh, g, db1 = gelu_pair(h_at)[1](dg, h_at, inputs.w1_bias, wants.w1)
        del dg, h_at
        second.add(d, g)
        del d, g
        if wants.w1:
            first.sums.add("bias", db1)
        dn = first.backward(dh, n_at, ready1, bias=False)
        del dh, n_at
        back = add_norm.pair("modulate" if y_dtype is None else "gated_add_modulate", inputs.x)[1]
        dx, dy, _, dscale, dshift = back(
            dn.view(x.shape), dout[:, at], x, None, None, inputs.scale, numbers(saved.stats, at), 1.0,
            wants.vectors, y_dtype,
        )  # fmt: skip
        if wants.vectors:
            vectors.add("scale", dscale)
            vectors.add("shift", dshift)
        return dx, dy

    dx, dy = together(run, found, (1, 1))
    return {"x": dx, "y": dy, **vectors, **first.gradients("w1"), **second.gradients("w2")}


_OPERATION = Operation(
    "modulated_ffn", Inputs, Settings, Saves, Results, Wants,
    checks.modulated_ffn, _shapes, _forward, _save, _backward,
)  # fmt: skip


def modulated_ffn(
    x: Tensor,
    y: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    weights: FFNWeights,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    keep: str | Collection[str] = "all",
    low: Mapping[str, LowRank] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """x' = s + gate * FFN(LN(s) (1 + scale) + shift) with s = x + y, [B, L, C] in x.dtype.

    x [B, L, C] is the residual stream, y [B, L, C] the output of the sublayer before or None, shift, scale
    and gate [B, C]; products run in dtype (x.dtype if None). keep is a mode of KEEP or the names that it
    stands for; without gradient nothing is saved. low holds low-rank updates of "w1" and "w2"; chunk is the
    number of tokens (of all samples) to work on at a time, None for all. Raises ValueError for another
    `keep`, or names in `low`, or a chunk below 1.
    """
    names, lows, factors = kept("modulated_ffn", KEEP, keep), *flattened("modulated_ffn", low, ("w1", "w2"))
    inputs = Inputs(x, y, shift, scale, gate, *weights, *lows)
    graded = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs)
    hidden = graded and "hidden" in names
    first = any(a is not None and a.requires_grad for a in (weights.w1, weights.b1, *lows[:2]))
    normed = graded and "normed" in names and (first or not hidden)
    settings = Settings(factors, eps, dtype or x.dtype, chunk)
    return _OPERATION.call(*inputs, *settings, Saves(graded, hidden, normed))[0]
