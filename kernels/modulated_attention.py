"""The self-attention branch of a block as one operation that decides itself what it keeps.

    n       = LN(x) (1 + scale) + shift                      x [B, L, C]; shift, scale, gate [B, C]
    q, k    = rope(rms(n Wq^T + bq)), rope(rms(n Wk^T + bk)),   v = n Wv^T + bv
    a       = softmax(q k^T / sqrt(D)) v
    x'      = x + gate (a Wo^T + bo)
    n'      = LN(x') weight + bias                           the next norm in the same pass, if asked for

Kept for the backward: x, mean and 1/std of every token, the vectors and weights, x' and its statistics
where there is an n', and what `keep` names:

    mode         keeps                                    bytes (16 bits)  made again in backward
    nothing      -                                        -                n, q, k, v, a
    attention    attention: a, log-sum-exp                2 L C + 4 L H    n, q, k, v
    projections  and projections: q, k before norm, v     8 L C            n, norm and rotation
    all          and rotated: q, k; normed: n             14 L C           -

a Wo^T is never needed: see prfl_kernels.branch. n is left out where the projections are frozen. A block that
is computed again in backward can be given a and the log-sum-exp of the first time: then neither q, k and v
nor attention are computed for x', and the backward makes q, k and v alone.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import add_norm
from prfl_kernels.attention import attention_with_lse
from prfl_kernels.branch import gated_input_gradient, gated_weight_gradients, kept, linear, weight_gradients
from prfl_kernels.jit import register, wide
from prfl_kernels.qk_norm_rope import Grid
from prfl_kernels.qk_norm_rope import pair as rope_pair
from prfl_kernels.table import implementation

KEEP = {
    "nothing": (),
    "attention": ("attention",),
    "projections": ("attention", "projections"),
    "all": ("attention", "projections", "rotated", "normed"),
}
KEPT = {"attention": 2, "projections": 3, "rotated": 3, "normed": 1}  # parts and their tensors


class AttentionWeights(NamedTuple):
    """Weights [C, C] and biases [C] of the projections, norm weights [C]; of any float dtype."""

    q: Tensor
    q_bias: Tensor
    k: Tensor
    k_bias: Tensor
    v: Tensor
    v_bias: Tensor
    o: Tensor
    o_bias: Tensor
    norm_q: Tensor
    norm_k: Tensor


class _Settings(NamedTuple):
    """What the schema carries besides tensors."""

    grid: Grid
    num_heads: int
    eps: float
    offset: int
    dtype: torch.dtype


def _normed(x, scale, shift, s: _Settings):
    _, n, _, stats = add_norm.pair("modulate", x)[0](x, None, None, scale, shift, 1.0, s.eps, s.dtype)
    return n, stats


def _projected(n, w: AttentionWeights):
    return linear(n, w.q, w.q_bias), linear(n, w.k, w.k_bias), linear(n, w.v, w.v_bias)


def _rotated(q, k, w: AttentionWeights, s: _Settings):
    """q, k [B, L, H, D] and 1/rms [2, B, L]."""
    run = rope_pair(q)[0]
    (q, k), _, rstd = run(q, k, w.norm_q, w.norm_k, s.grid, s.num_heads, s.eps, s.offset)
    return q, k, rstd


def _heads(v, s: _Settings):
    return v.unflatten(2, (s.num_heads, -1))


def _ended(x, y, gate, weight, bias, s: _Settings):
    """(x', n', statistics of x'), the last two None without a next norm."""
    if weight is None:
        return add_norm.pair("gated_add", x)[0](x, y, gate, None, None, 0.0, 0.0, None)[0], None, None
    run = add_norm.pair("gated_add_norm", x)[0]
    total, n, _, stats = run(x, y, gate, weight, bias, 0.0, s.eps, s.dtype)
    return total, n, stats


def _forward(x, shift, scale, gate, *rest):
    w, (weight, bias, out, _), s = AttentionWeights(*rest[:10]), rest[10:14], _Settings(*rest[14:19])
    keeps = dict(zip(KEPT, rest[19], strict=True))
    held = {name: tuple(x.new_empty(0) for _ in range(count)) for name, count in KEPT.items()}
    n, stats = _normed(x, scale, shift, s)
    if out is None:  # all in this frame: a helper's caller would keep what is let go of here
        q_in, k_in, v = _projected(n, w)
        if keeps["normed"]:
            held["normed"] = (n,)
        del n
        q, k, rstd = _rotated(q_in, k_in, w, s)
        if keeps["projections"]:
            held["projections"] = q_in, k_in, v
        del q_in, k_in
        out, lse = attention_with_lse(q, k, _heads(v, s))
        if keeps["rotated"]:
            held["rotated"] = q, k, rstd
        del q, k, v, rstd
        if keeps["attention"]:
            held["attention"] = out, lse
    total, next_n, next_stats = _ended(x, linear(out.flatten(2), w.o, w.o_bias), gate, weight, bias, s)
    ends = (x.new_empty(0) if a is None else a for a in (next_n, next_stats))
    return total, *ends, stats, *sum(held.values(), ())


def _fake(x, shift, scale, gate, *rest):
    s, (batch, length, width) = _Settings(*rest[14:19]), x.shape
    keeps = dict(zip(KEPT, rest[19], strict=True))
    rows, heads = (batch, length, width), (batch, length, s.num_heads, width // s.num_heads)
    stats, f32 = (2, batch, length), wide(x.dtype)
    ends = [(rows, s.dtype), (stats, f32)] if rest[10] is not None else [None, None]
    wanted = {
        "attention": [(heads, s.dtype), ((batch, s.num_heads, length), wide(s.dtype))],
        "projections": [(rows, s.dtype)] * 3,
        "rotated": [(heads, s.dtype)] * 2 + [(stats, wide(s.dtype))],
        "normed": [(rows, s.dtype)],
    }
    made = [*ends, (stats, f32), *sum(([a if keeps[k] else None for a in v] for k, v in wanted.items()), [])]
    return x.new_empty(rows), *(x.new_empty(0) if a is None else x.new_empty(a[0], dtype=a[1]) for a in made)


class _Wants(NamedTuple):
    """The groups of gradients to make, besides that of x."""

    vectors: bool  # shift and scale
    gate: bool
    q: bool  # weight and bias
    k: bool
    v: bool
    o: bool
    norms: bool  # norm_q and norm_k
    next_norm: bool


def _backward(dout, dn, x, total, shift, scale, gate, *rest):
    w, (weight, next_stats, stats) = AttentionWeights(*rest[:10]), rest[10:13]
    out, lse, q_in, k_in, v, q, k, rstd, n = rest[13:22]
    s, wants = _Settings(*rest[22:27]), _Wants(*rest[27])
    made: dict[str, Tensor] = {}
    if not n.numel() and (not v.numel() or wants.q or wants.k or wants.v):
        n = _normed(x, scale, shift, s)[0]
    if not v.numel():
        q_in, k_in, v = _projected(n, w)
    if not rstd.numel():
        q, k, rstd = _rotated(q_in, k_in, w, s)
    if not lse.numel():
        out, lse = attention_with_lse(q, k, _heads(v, s))

    if weight is None:
        dsum, d = dout, dout.to(s.dtype)
    else:
        run, cast = add_norm.pair("gated_add_norm", x)[1], None if x.dtype == s.dtype else s.dtype
        dsum, d, _, *norm = run(dn, dout, total, None, None, weight, next_stats, 0.0, wants.next_norm, cast)
        d = dsum if cast is None else d
        made["weight"], made["bias"] = norm
    if wants.o or wants.gate:
        made["o"], made["o_bias"], made["gate"] = gated_weight_gradients(
            d, gate, out.flatten(2), w.o, w.o_bias
        )
    da = gated_input_gradient(d, gate, w.o).view(out.shape)
    del d
    backend, factor = implementation("attention", q), q.shape[3] ** -0.5
    dq, dk, dv = torch.ops.prfl.attention_backward(
        da, None, q, k, _heads(v, s), out, lse, factor, backend, True, True
    )
    del da, q, k, v, out, lse
    dq, dk, dnorms = rope_pair(q_in)[1](
        dq, dk, q_in, k_in, w.norm_q, w.norm_k, rstd, s.grid, s.num_heads, s.offset, wants.norms
    )
    del q_in, k_in
    if wants.norms:
        made["norm_q"], made["norm_k"] = dnorms
    acc = None
    for name, d, wanted in (("q", dq, wants.q), ("k", dk, wants.k), ("v", dv.flatten(2), wants.v)):
        matrix, vector = getattr(w, name), getattr(w, f"{name}_bias")
        if wanted:
            made[name], made[f"{name}_bias"] = weight_gradients(d, n, matrix, vector)
        d, matrix = d.flatten(0, 1), matrix.to(d.dtype)
        acc = d @ matrix if acc is None else acc.addmm_(d, matrix)
    del dq, dk, dv, d, n
    dx, _, _, made["scale"], made["shift"] = add_norm.pair("modulate", x)[1](
        acc.view(x.shape), dsum, x, None, None, scale, stats, 1.0, wants.vectors, None
    )
    like = {"shift": shift, "scale": scale, "gate": gate, **w._asdict(), "weight": weight, "bias": weight}
    return dx, *(
        x.new_empty(0) if made.get(k) is None else made[k].to(a.dtype) for k, a in like.items()
    )


def _backward_fake(dout, dn, x, total, shift, scale, gate, *rest):
    w, weight, wants = AttentionWeights(*rest[:10]), rest[10], _Wants(*rest[27])
    end = wants.o or wants.gate
    wanted = {"shift": wants.vectors, "scale": wants.vectors, "gate": end, "o": end, "o_bias": end}
    wanted |= {name: getattr(wants, name[0]) for name in ("q", "q_bias", "k", "k_bias", "v", "v_bias")}
    wanted |= dict.fromkeys(("norm_q", "norm_k"), wants.norms)
    wanted |= dict.fromkeys(("weight", "bias"), wants.next_norm)
    like = {"shift": shift, "scale": scale, "gate": gate, **w._asdict(), "weight": weight, "bias": weight}
    return x.new_empty(x.shape), *(
        a.new_empty(a.shape) if wanted[k] else x.new_empty(0) for k, a in like.items()
    )


def _setup_context(ctx, inputs, output):
    x, shift, scale, gate = inputs[:4]
    weights, weight, given, ctx.settings = inputs[4:14], inputs[14], inputs[16:18], inputs[18:23]
    total, next_n, next_stats, *held = output
    if weight is None:
        total = next_stats  # x' is not needed: an empty tensor in its place
        ctx.mark_non_differentiable(next_n)
    ctx.mark_non_differentiable(next_stats, *held)
    if given[0] is not None:
        held[1:3] = given
    ctx.save_for_backward(x, total, shift, scale, gate, *weights, weight, next_stats, *held)


def _gradient(ctx, dout, dn, *_):
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    pairs = [any(needs[i : i + 2]) for i in (1, 4, 6, 8, 10, 12, 14)]
    wants = [pairs[0], needs[3], *pairs[1:]]
    made = torch.ops.prfl.modulated_attention_backward(
        dout, None if saved[15] is None else dn, *saved, *ctx.settings, wants
    )
    return *(a if need else None for a, need in zip(made, needs[:16], strict=True)), *[None] * 8


_VECTORS = "Tensor shift, Tensor scale, Tensor gate"
_MATRICES = ", ".join(f"Tensor {name}" for name in AttentionWeights._fields)
_SETTINGS = "int[3] grid, int num_heads, float eps, int offset, ScalarType dtype"
register(
    f"modulated_attention(Tensor x, {_VECTORS}, {_MATRICES}, Tensor? weight, Tensor? bias,"
    f" Tensor? given_out, Tensor? given_lse, {_SETTINGS}, bool[4] keep) -> ({', '.join(['Tensor'] * 13)})",
    _forward,
    _fake,
    _gradient,
    _setup_context,
)
register(
    f"modulated_attention_backward(Tensor dout, Tensor? dn, Tensor x, Tensor total, {_VECTORS}, {_MATRICES},"
    " Tensor? weight, Tensor next_stats, Tensor stats, Tensor out, Tensor lse, Tensor q_in, Tensor k_in,"
    f" Tensor v_in, Tensor q_rotated, Tensor k_rotated, Tensor rstd, Tensor n, {_SETTINGS}, bool[8] wants)"
    f" -> ({', '.join(['Tensor'] * 16)})",
    _backward,
    _backward_fake,
)


class Branch(NamedTuple):
    """What `modulated_attention` returns."""

    x: Tensor  # x' [B, L, C] in x.dtype
    n: Tensor | None  # n' [B, L, C] in dtype, where a next norm was given
    attention: tuple[Tensor, Tensor] | None  # a [B, L, H, D] and log-sum-exp [B, H, L], where kept or given


def modulated_attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    weights: AttentionWeights,
    grid: Grid,
    num_heads: int,
    eps: float = 1e-6,
    offset: int = 0,
    norm: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    keep: str | Collection[str] = "all",
    attention: tuple[Tensor, Tensor] | None = None,
) -> Branch:
    """The branch: x', and n' where there is norm = (weight [C], bias [C]) of the next one.

    x [B, L, C] is the residual stream, shift, scale and gate [B, C]; grid (frames, rows, columns) of the
    whole sequence and offset as in qk_norm_rope; products and attention run in dtype (x.dtype if None).
    keep is a mode of KEEP or some of the names behind them; without gradient nothing is kept. attention is
    what an earlier call with the same inputs returned under that name, not to be computed again: with it
    nothing else is kept, as with keep "attention". Raises ValueError for another `keep`.
    """
    names = kept("modulated_attention", KEEP, keep)
    inputs = (x, shift, scale, gate, *weights, *(norm or ()))
    graded = torch.is_grad_enabled() and any(a.requires_grad for a in inputs)
    keeps = {name: graded and name in names for name in KEPT}
    trained = any(a.requires_grad for a in weights[:6])  # dW takes n
    keeps["normed"] &= trained or not keeps["projections"]
    if attention is not None:
        keeps = dict.fromkeys(KEPT, False)
    made = torch.ops.prfl.modulated_attention(
        x, shift, scale, gate, *weights, *(norm or (None, None)), *(attention or (None, None)),
        list(grid), num_heads, eps, offset, dtype or x.dtype, list(keeps.values()),
    )  # fmt: skip
    held = (made[4], made[5]) if keeps["attention"] else attention
    return Branch(made[0], None if norm is None else made[1], held)
