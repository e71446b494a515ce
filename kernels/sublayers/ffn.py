"""The feed-forward sublayer of a block as one operation that is told what to save for its backward.

    s  = x + y                                       the residual stream; y is the sublayer before, or None
    n  = LN(s) (1 + scale) + shift                   x, y [B, L, C]; shift, scale, gate [B, C], [B, 2, C]
    h  = n W1^T,  g = gelu_tanh(h + b1)              W1 [F, C]
    x' = s + gate (g W2^T + b2)                      W2 [C, F]

W1 and W2 may have a low-rank update each (LoRA, prfl_kernels.sublayers.products). Saved for the backward: s,
mean and 1/std of every token, the vectors and weights, and what `keep` names:

    mode         saves           bytes (16 bits)  recomputed in backward
    nothing      -                                n, h, g
    projections  hidden: h       2 L F            n, g
    all          and normed: n   2 L F + 2 L C    g

"attention" saves the same as "nothing": it is a mode of the attention sublayers. g is never saved: the
backward computes it in the pass that computes dh. g W2^T is not needed but for d gate of short samples, see
prfl_kernels.sublayers.products. n is not saved where W1 and its update are frozen and h is saved. With
`chunk` the sublayer works on that many tokens at a time, forward and backward, so h where it is not saved,
g, their gradients and n never exist as a whole. Of two vectors tokens before `boundary` take the first.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import bias_gelu
from prfl_kernels.dispatch import record
from prfl_kernels.jit import wide
from prfl_kernels.norm import op as add_norm
from prfl_kernels.sublayers import checks
from prfl_kernels.sublayers.chunks import numbers, pieces, together, within
from prfl_kernels.sublayers.operation import Operation, Shape, tensors
from prfl_kernels.sublayers.products import (
    LowRank,
    Product,
    Sums,
    flattened,
    gated_products,
    linear,
    low_rank_names,
    low_ranks,
    ready,
    saved_names,
)

KEEP = {"nothing": (), "attention": (), "projections": ("hidden",), "all": ("hidden", "normed")}


class FFNWeights(NamedTuple):
    """Weights and biases of the two products, of any float dtype."""

    w1: Tensor  # [F, C]
    b1: Tensor  # [F]
    w2: Tensor  # [C, F]
    b2: Tensor  # [C]


# x, y [B, L, C]; shift, scale, gate [B, C] or [B, 2, C]; weights and updates as in FFNWeights and LowRank.
Inputs = NamedTuple("Inputs", [
    ("x", Tensor), ("y", Tensor | None), *tensors(
        ("shift", "scale", "gate", "w1", "w1_bias", "w2", "w2_bias"), low_rank_names(("w1", "w2"))
    ),
])  # fmt: skip


class Settings(NamedTuple):
    """What is not a tensor, as `modulated_ffn` takes it."""

    factors: tuple[float, float]  # of the updates of w1 and w2
    eps: float
    dtype: torch.dtype
    chunk: int | None
    boundary: int


# x', s, statistics [2, B, L] of s, h [B, L, F] and n [B, L, C].
KEPT = {"residual": ("s",), "hidden": ("h",), "normed": ("n",)}
RESULTS = ("out?", "s?", "stats", "h", "n")
WANTS = {
    "residual": ("x", "y"), "vectors": ("shift", "scale"), "gate": ("gate",), "w1": ("w1", "w1_bias"),
    "w2": ("w2", "w2_bias"), "low1": ("w1_down", "w1_up"), "low2": ("w2_down", "w2_up"),
}  # fmt: skip


def _shapes(inputs: Inputs, settings: Settings) -> dict[str, Shape | None]:
    row, (batch, length) = tuple(inputs.x.shape), inputs.x.shape[:2]
    return {
        "out": (row, inputs.x.dtype),
        "s": None if inputs.y is None else (row, inputs.x.dtype),
        "stats": ((2, batch, length), wide(inputs.x.dtype)),
        "h": ((batch, length, len(inputs.w1)), settings.dtype),
        "n": (row, settings.dtype),
    }


def _begin(x, y, inputs: Inputs, settings: Settings, at: slice):
    """(s, n, statistics) of a piece x, y of the tokens, those `at`."""
    fill = record("modulate" if y is None else "gated_add_modulate", x).forward
    vectors, eps = (inputs.scale, inputs.shift), settings.eps
    boundary = within(settings.boundary, at)
    s, n, _, stats = add_norm.forward(fill, x, y, None, *vectors, 1.0, eps, settings.dtype, boundary)
    return x if y is None else s, n, stats


def _forward(inputs: Inputs, settings: Settings, saves) -> dict[str, Tensor | None]:
    low1, low2 = low_ranks(inputs, ("w1", "w2"), settings.factors)
    found = pieces(inputs.x, settings.chunk)
    w1, w2 = ready((inputs.w1, inputs.w2), settings.dtype, found)

    def run(at: slice):
        y = None if inputs.y is None else inputs.y[:, at]
        s, n, stats = _begin(inputs.x[:, at], y, inputs, settings, at)
        h = linear(n, w1, None, low1)
        if not saves.normed:
            n = None
        g = bias_gelu.forward(record("bias_gelu", h).forward, h, inputs.w1_bias)
        if not saves.hidden:
            h = None
        y = linear(g, w2, inputs.w2_bias, low2)
        boundary = within(settings.boundary, at)
        out = add_norm.forward(record("gated_add", s).forward, s, y, inputs.gate, boundary=boundary)[0]
        return out, s if saves.residual and inputs.y is not None else None, stats, h, n

    made = together(run, found, (1, 1, 2, 1, 1))
    return dict(zip(("out", "s", "stats", "h", "n"), made, strict=True))


def _save(inputs: Inputs, results) -> tuple[Inputs, NamedTuple]:
    """s in the place of x; of y its dtype."""
    if inputs.y is not None:
        inputs = inputs._replace(x=results.s, y=inputs.y.new_empty(0))
    return inputs, results._replace(out=None, s=None)


def _backward(dout, inputs: Inputs, saved, settings: Settings, wants) -> dict[str, Tensor]:
    h, n, y_dtype = saved.h, saved.n, None if inputs.y is None else inputs.y.dtype
    found = pieces(inputs.x, settings.chunk)
    (ready1,) = ready((inputs.w1,), settings.dtype, found)
    low1, low2 = low_ranks(inputs, ("w1", "w2"), settings.factors)
    first = Product(low1, wants.w1, wants.low1)
    second = gated_products(
        inputs.x.shape[1], inputs.gate, settings.boundary, inputs.w2, inputs.w2_bias, low2,
        settings.dtype, wants.w2, wants.gate, wants.low2,
    )  # fmt: skip
    vectors = Sums()
    needs_n = wants.w1 or wants.low1 or not h.numel()

    def run(at: slice):
        d, x = dout[:, at].to(settings.dtype), inputs.x[:, at]
        n_at = n[:, at] if n.numel() else _begin(x, None, inputs, settings, at)[1] if needs_n else None
        h_at = h[:, at] if h.numel() else linear(n_at, ready1, None, low1)
        dg = second.input_gradient(d, at)
        fill = record("bias_gelu", h_at).backward
        dh, g, db1 = bias_gelu.backward(fill, dg, h_at, inputs.w1_bias, wants.w1)
        del dg, h_at
        second.add(d, g, at)
        del d, g
        if wants.w1:
            first.sums.add("bias", db1)
        dn = first.backward(dh, n_at, ready1, bias=False)
        del dh, n_at
        dx, dy, _, dscale, dshift = add_norm.backward(
            record("modulate" if y_dtype is None else "gated_add_modulate", x).backward, dn.view(x.shape),
            dout[:, at], x, None, None, inputs.scale, numbers(saved.stats, at), 1.0, wants.vectors, y_dtype,
            within(settings.boundary, at),
        )  # fmt: skip
        if wants.vectors:
            vectors.add("scale", dscale)
            vectors.add("shift", dshift)
        return dx, dy

    dx, dy = together(run, found, (1, 1))
    return {"x": dx, "y": dy, **vectors, **first.gradients("w1"), **second.gradients("w2")}


_OPERATION = Operation(
    "modulated_ffn", Inputs, Settings, RESULTS, KEPT, WANTS, checks.modulated_ffn, _shapes,
    _forward, _save, _backward,
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
    boundary: int = 0,
) -> Tensor:
    """x' = s + gate * FFN(LN(s) (1 + scale) + shift) with s = x + y, [B, L, C] in x.dtype.

    x [B, L, C] is the residual stream, y [B, L, C] the output of the sublayer before or None, shift, scale
    and gate [B, C], or [B, 2, C]: those of the tokens before `boundary` (0 to L), and of the others; products
    run in dtype (x.dtype if None). keep is a mode of KEEP or the names that it
    stands for; without gradient nothing is saved. low holds low-rank updates of "w1" and "w2"; chunk is the
    number of tokens (of all samples) to work on at a time, None for all. Raises ValueError for another
    `keep`, or names in `low`, or a chunk below 1, or a boundary that does not fit.
    """
    names = saved_names("modulated_ffn", KEEP, keep)
    lows, factors = flattened("modulated_ffn", low, ("w1", "w2"))
    inputs = Inputs(x, y, shift, scale, gate, *weights, *lows)
    graded = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs)
    hidden = graded and "hidden" in names
    first = any(a is not None and a.requires_grad for a in (weights.w1, weights.b1, *lows[:2]))
    normed = graded and "normed" in names and (first or not hidden)
    settings = Settings(factors, eps, dtype or x.dtype, chunk, boundary)
    return _OPERATION.call(*inputs, *settings, (graded, hidden, normed))[0]
