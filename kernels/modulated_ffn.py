"""The feed-forward branch of a block as one operation that decides itself what it keeps.

    s  = x + y                                       the residual stream; y is the branch before, or None
    n  = LN(s) (1 + scale) + shift                   x, y [B, L, C]; shift, scale, gate [B, C]
    h  = n W1^T,  g = gelu_tanh(h + b1)              W1 [F, C]
    x' = s + gate (g W2^T + b2)                      W2 [C, F]

Kept for the backward: s, mean and 1/std of every token, the vectors and weights, and what `keep` names:

    mode         keeps           bytes (16 bits)  made again in backward
    nothing      -                                n, h, g
    projections  hidden: h       2 L F            n, g
    all          and normed: n   2 L F + 2 L C    g

"attention" keeps the same as "nothing" here: it is a mode of the attention branch. g is never kept: the
backward makes it in the pass that makes dh. g W2^T is never needed: see prfl_kernels.branch.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import add_norm
from prfl_kernels.bias_gelu import pair as gelu_pair
from prfl_kernels.branch import gated_input_gradient, gated_weight_gradients, kept, linear, wide_product
from prfl_kernels.jit import register, wide

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


def _forward(x, y, shift, scale, gate, w1, b1, w2, b2, eps, dtype, graded, hidden, normed):
    s, n, stats = _begin(x, y, scale, shift, eps, dtype)
    h = linear(n, w1, None)
    if not normed:
        n = x.new_empty(0)
    g = gelu_pair(h)[0](h, b1)
    if not hidden:
        h = x.new_empty(0)
    out = add_norm.pair("gated_add", s)[0](s, linear(g, w2, b2), gate, None, None, 0.0, 0.0, None)[0]
    return out, s if graded and y is not None else x.new_empty(0), stats, h, n


def _fake(x, y, shift, scale, gate, w1, b1, w2, b2, eps, dtype, graded, hidden, normed):
    s = x.new_empty(x.shape if graded and y is not None else 0)
    h = x.new_empty((*x.shape[:2], len(w1)) if hidden else 0, dtype=dtype if hidden else x.dtype)
    n = x.new_empty(x.shape if normed else 0, dtype=dtype if normed else x.dtype)
    return x.new_empty(x.shape), s, x.new_empty(2, *x.shape[:2], dtype=wide(x.dtype)), h, n


def _backward(dout, s, shift, scale, gate, w1, b1, w2, b2, stats, h, n, eps, dtype, y_dtype, wants):
    wants_vectors, wants_gate, wants_first, wants_second = wants
    made = {}
    d = dout.to(dtype)
    if not n.numel() and (wants_first or not h.numel()):
        n = _begin(s, None, scale, shift, eps, dtype)[1]
    if not h.numel():
        h = linear(n, w1, None)
    dg = gated_input_gradient(d, gate, w2)
    dh, g, db1 = gelu_pair(h)[1](dg, h, b1, wants_first)
    del dg, h
    if wants_second or wants_gate:
        made["w2"], made["b2"], made["gate"] = gated_weight_gradients(d, gate, g, w2, b2)
    del d, g
    if wants_first:
        made["w1"] = wide_product(dh.flatten(0, 1).mT, n.flatten(0, 1)).to(w1.dtype)
        made["b1"] = db1.to(b1.dtype)
    dn = dh @ w1.to(dtype)
    del dh, n
    run = add_norm.pair("modulate" if y_dtype is None else "gated_add_modulate", s)[1]
    dx, dy, _, dscale, dshift = run(
        dn, dout, s, None, None, scale, stats, 1.0, wants_vectors, y_dtype
    )
    if wants_vectors:
        made["shift"], made["scale"] = dshift.to(shift.dtype), dscale.to(scale.dtype)
    order = ("shift", "scale", "gate", "w1", "b1", "w2", "b2")
    rest = (made[k] if k in made else s.new_empty(0) for k in order)
    return dx, s.new_empty(0) if dy is None else dy, *rest


def _backward_fake(dout, s, shift, scale, gate, w1, b1, w2, b2, stats, h, n, eps, dtype, y_dtype, wants):
    wants_vectors, wants_gate, wants_first, wants_second = wants
    second = wants_second or wants_gate
    dy = s.new_empty(0) if y_dtype is None else s.new_empty(s.shape, dtype=y_dtype)
    wanted = (wants_vectors, wants_vectors, second, wants_first, wants_first, second, second)
    like = (shift, scale, gate, w1, b1, w2, b2)
    return s.new_empty(s.shape), dy, *(
        a.new_empty(a.shape) if w else s.new_empty(0) for a, w in zip(like, wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, y, *vectors, ctx.eps, ctx.dtype, _, _, _ = inputs
    _, s, stats, h, n = output
    ctx.y_dtype = None if y is None else y.dtype
    ctx.mark_non_differentiable(s, stats, h, n)
    ctx.save_for_backward(x if y is None else s, *vectors, stats, h, n)


def _gradient(ctx, dout, *_):
    needs = ctx.needs_input_grad
    wants = [any(needs[2:4]), needs[4], any(needs[5:7]), any(needs[7:9])]
    made = torch.ops.prfl.modulated_ffn_backward(
        dout, *ctx.saved_tensors, ctx.eps, ctx.dtype, ctx.y_dtype, wants
    )
    return *(a if need else None for a, need in zip(made, needs[:9], strict=True)), *[None] * 5


_WEIGHTS = "Tensor shift, Tensor scale, Tensor gate, Tensor w1, Tensor b1, Tensor w2, Tensor b2"
register(
    f"modulated_ffn(Tensor x, Tensor? y, {_WEIGHTS}, float eps, ScalarType dtype, bool graded, bool hidden,"
    " bool normed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _gradient,
    _setup_context,
)
register(
    f"modulated_ffn_backward(Tensor dout, Tensor s, {_WEIGHTS}, Tensor stats, Tensor h, Tensor n, float eps,"
    f" ScalarType dtype, ScalarType? y_dtype, bool[4] wants) -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
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
) -> Tensor:
    """x' = s + gate * FFN(LN(s) (1 + scale) + shift) with s = x + y, [B, L, C] in x.dtype.

    x [B, L, C] is the residual stream, y [B, L, C] the output of the branch before or None, shift, scale
    and gate [B, C]; products run in dtype (x.dtype if None). keep is a mode of KEEP or the names that it
    stands for; without gradient nothing is kept. Raises ValueError for another `keep`.
    """
    names = kept("modulated_ffn", KEEP, keep)
    graded = torch.is_grad_enabled() and any(
        a is not None and a.requires_grad for a in (x, y, shift, scale, gate, *weights)
    )
    hidden = graded and "hidden" in names
    first = weights.w1.requires_grad or weights.b1.requires_grad
    normed = graded and "normed" in names and (first or not hidden)
    out = torch.ops.prfl.modulated_ffn(
        x, y, shift, scale, gate, *weights, eps, dtype or x.dtype, graded, hidden, normed
    )
    return out[0]
