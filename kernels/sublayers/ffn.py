"""The feed-forward branch of a block as one operation that decides itself what it keeps.

    s  = x + y                                       the residual stream; y is the branch before, or None
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
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.bias_gelu import pair as gelu_pair
from prfl_kernels.checks import checked
from prfl_kernels.jit import register, wide
from prfl_kernels.norm import op as add_norm
from prfl_kernels.sublayers import checks as branch_checks
from prfl_kernels.sublayers.chunks import numbers, pieces, together
from prfl_kernels.sublayers.products import (
    GatedProduct,
    LowRank,
    Product,
    Sums,
    flattened,
    kept,
    linear,
    low_rank,
    ready,
)

KEEP = {"nothing": (), "attention": (), "projections": ("hidden",), "all": ("hidden", "normed")}


class FFNWeights(NamedTuple):
    """Weights and biases of the two products, of any float dtype."""

    w1: Tensor  # [F, C]
    b1: Tensor  # [F]
    w2: Tensor  # [C, F]
    b2: Tensor  # [C]


def _begin(x, y, scale, shift, eps, dtype):
    """(s, n, statistics)."""
    run = add_norm.pair("modulate" if y is None else "gated_add_modulate", x)[0]
    s, n, _, stats = run(x, y, None, scale, shift, 1.0, eps, dtype)
    return x if y is None else s, n, stats


def _forward(x, y, shift, scale, gate, w1, b1, w2, b2, *rest):
    lows, (factors, eps, dtype, chunk, graded, hidden, normed) = rest[:4], rest[4:]
    low1, low2 = low_rank(*lows[:2], factors[0]), low_rank(*lows[2:], factors[1])
    found = pieces(x, chunk)
    w1, w2 = ready((w1, w2), dtype, found)

    def run(at: slice):
        s, n, stats = _begin(x[:, at], None if y is None else y[:, at], scale, shift, eps, dtype)
        h = linear(n, w1, None, low1)
        if not normed:
            n = None
        g = gelu_pair(h)[0](h, b1)
        if not hidden:
            h = None
        end = add_norm.pair("gated_add", s)[0]
        out = end(s, linear(g, w2, b2, low2), gate, None, None, 0.0, 0.0, None)[0]
        return out, s if graded and y is not None else None, stats, h, n

    out, s, stats, h, n = together(run, found, (1, 1, 2, 1, 1))
    s, h, n = (x.new_empty(0) if a is None else a for a in (s, h, n))
    return out, s, stats, h, n


def _fake(x, y, shift, scale, gate, w1, b1, w2, b2, *rest):
    dtype, _, graded, hidden, normed = rest[6:]
    s = x.new_empty(x.shape if graded and y is not None else 0)
    h = x.new_empty((*x.shape[:2], len(w1)) if hidden else 0, dtype=dtype if hidden else x.dtype)
    n = x.new_empty(x.shape if normed else 0, dtype=dtype if normed else x.dtype)
    return x.new_empty(x.shape), s, x.new_empty(2, *x.shape[:2], dtype=wide(x.dtype)), h, n


def _backward(dout, s, shift, scale, gate, w1, b1, w2, b2, *rest):
    lows, (stats, h, n), (factors, eps, dtype, chunk, y_dtype, wants) = rest[:4], rest[4:7], rest[7:]
    wants_vectors, wants_gate, wants_first, wants_second, wants_low1, wants_low2 = wants
    found = pieces(s, chunk)
    (ready1,) = ready((w1,), dtype, found)
    low1, low2 = low_rank(*lows[:2], factors[0]), low_rank(*lows[2:], factors[1])
    first = Product(low1, wants_first, wants_low1)
    second = GatedProduct(gate, w2, b2, low2, dtype, wants_second, wants_gate, wants_low2)
    vectors = Sums()
    needs_n = wants_first or wants_low1 or not h.numel()

    def run(at: slice):
        d, x = dout[:, at].to(dtype), s[:, at]
        n_at = n[:, at] if n.numel() else _begin(x, None, scale, shift, eps, dtype)[1] if needs_n else None
        h_at = h[:, at] if h.numel() else linear(n_at, ready1, None, low1)
        dg = second.input_gradient(d)
        dh, g, db1 = gelu_pair(h_at)[1](dg, h_at, b1, wants_first)
        del dg, h_at
        second.add(d, g)
        del d, g
        if wants_first:
            first.sums.add("bias", db1)
        dn = first.backward(dh, n_at, ready1, bias=False)
        del dh, n_at
        back = add_norm.pair("modulate" if y_dtype is None else "gated_add_modulate", s)[1]
        dx, dy, _, dscale, dshift = back(
            dn.view(x.shape), dout[:, at], x, None, None, scale, numbers(stats, at), 1.0,
            wants_vectors, y_dtype,
        )  # fmt: skip
        if wants_vectors:
            vectors.add("scale", dscale)
            vectors.add("shift", dshift)
        return dx, dy

    dx, dy = together(run, found, (1, 1))
    made = {**vectors, **first.gradients("w1"), **second.gradients("w2")}
    like = dict(zip(_NAMES, (shift, scale, gate, w1, b1, w2, b2, *lows), strict=True))
    rest = (made[k].to(a.dtype) if k in made else s.new_empty(0) for k, a in like.items())
    return dx, s.new_empty(0) if dy is None else dy, *rest


def _backward_fake(dout, s, shift, scale, gate, w1, b1, w2, b2, *rest):
    lows, (_, _, _, _, y_dtype, wants) = rest[:4], rest[7:]
    vectors, g, first, second, low1, low2 = wants
    second = second or g
    dy = s.new_empty(0) if y_dtype is None else s.new_empty(s.shape, dtype=y_dtype)
    wanted = (vectors, vectors, second, first, first, second, second, low1, low1, low2, low2)
    like = (shift, scale, gate, w1, b1, w2, b2, *lows)
    return s.new_empty(s.shape), dy, *(
        a.new_empty(a.shape) if w else s.new_empty(0) for a, w in zip(like, wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, y, *tensors = inputs[:13]
    ctx.settings = inputs[13:17]
    _, s, stats, h, n = output
    ctx.y_dtype = None if y is None else y.dtype
    ctx.set_materialize_grads(False)  # or every kept tensor gets a gradient of zeros of its size
    ctx.mark_non_differentiable(s, stats, h, n)
    ctx.save_for_backward(x if y is None else s, *tensors, stats, h, n)


def _gradient(ctx, dout, *_):
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    wants = [any(needs[2:4]), needs[4], *(any(needs[i : i + 2]) for i in (5, 7, 9, 11))]
    made = torch.ops.prfl.modulated_ffn_backward(dout, *saved, *ctx.settings, ctx.y_dtype, wants)
    return *(a if need else None for a, need in zip(made, needs[:13], strict=True)), *[None] * 7


_NAMES = ("shift", "scale", "gate", "w1", "w1_bias", "w2", "w2_bias", "w1_down", "w1_up", "w2_down", "w2_up")
_WEIGHTS = ", ".join(f"Tensor {name}" for name in _NAMES[:7])
_LOWS = ", ".join(f"Tensor? {name}" for name in _NAMES[7:])
_SETTINGS = "float[2] factors, float eps, ScalarType dtype, int? chunk"
register(
    f"modulated_ffn(Tensor x, Tensor? y, {_WEIGHTS}, {_LOWS}, {_SETTINGS}, bool graded, bool hidden,"
    " bool normed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    *checked(branch_checks.modulated_ffn, _forward, _fake),
    _gradient,
    _setup_context,
)
register(
    f"modulated_ffn_backward(Tensor dout, Tensor s, {_WEIGHTS}, {_LOWS}, Tensor stats, Tensor h, Tensor n,"
    f" {_SETTINGS}, ScalarType? y_dtype, bool[6] wants) -> ({', '.join(['Tensor'] * 13)})",
    *checked(branch_checks.modulated_ffn_backward, _backward, _backward_fake),
)


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

    x [B, L, C] is the residual stream, y [B, L, C] the output of the branch before or None, shift, scale
    and gate [B, C]; products run in dtype (x.dtype if None). keep is a mode of KEEP or the names that it
    stands for; without gradient nothing is kept. low holds low-rank updates of "w1" and "w2"; chunk is the
    number of tokens (of all samples) to work on at a time, None for all. Raises ValueError for another
    `keep`, or names in `low`, or a chunk below 1.
    """
    names, lows, factors = kept("modulated_ffn", KEEP, keep), *flattened("modulated_ffn", low, ("w1", "w2"))
    graded = torch.is_grad_enabled() and any(
        a is not None and a.requires_grad for a in (x, y, shift, scale, gate, *weights, *lows)
    )
    hidden = graded and "hidden" in names
    first = any(a is not None and a.requires_grad for a in (weights.w1, weights.b1, *lows[:2]))
    normed = graded and "normed" in names and (first or not hidden)
    out = torch.ops.prfl.modulated_ffn(
        x, y, shift, scale, gate, *weights, *lows,
        factors, eps, dtype or x.dtype, chunk, graded, hidden, normed,
    )  # fmt: skip
    return out[0]
