"""The self-attention branch of a block as one operation that decides itself what it keeps.

    n       = LN(x) (1 + scale) + shift                      x [B, L, C]; shift, scale, gate [B, C]
    q, k    = rope(rms(n Wq^T + bq)), rope(rms(n Wk^T + bk)),   v = n Wv^T + bv
    a       = softmax(q k^T / sqrt(D)) v
    x'      = x + gate (a Wo^T + bo)
    n'      = LN(x') weight + bias                           the next norm in the same pass, if asked for

The four matrices may have a low-rank update each (LoRA, prfl_kernels.sublayers.products). Saved for the
backward: x, mean and 1/std of every token, the vectors and weights, x' and its statistics where there is an
n', and what `keep` names:

    mode         saves                                    bytes (16 bits)  recomputed in backward
    nothing      -                                        -                n, q, k, v, a
    attention    attention: a, log-sum-exp                2 L C + 4 L H    n, q, k, v
    projections  and projections: q, k before norm, v     8 L C            n, norm and rotation
    all          and rotated: q, k; normed: n             14 L C           -

a Wo^T is never needed, see prfl_kernels.sublayers.products. n is not saved where projections and updates
are frozen. A block that is recomputed in backward can be given a and the log-sum-exp of its first forward.
Then x' needs neither q, k, v nor attention, and the backward recomputes q, k and v alone. With `chunk` all
but attention itself works on that many tokens at a time. In addition to inputs, results and what is saved,
only q, k, v and a then exist as a whole (8 L C bytes in 16 bits), in backward those and their gradients (16
L C). Two things that the backward needs on both sides of attention are computed twice for that: the
gradient of x' where there is an n', and q and k before the norm where they are not saved (4 L C^2 FLOPs).
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.checks import checked
from prfl_kernels.dispatch import backward_of
from prfl_kernels.jit import register, wide
from prfl_kernels.norm import op as add_norm
from prfl_kernels.qk_norm_rope.op import pair as rope_pair
from prfl_kernels.qk_norm_rope.rope import Grid
from prfl_kernels.sublayers import checks as branch_checks
from prfl_kernels.sublayers.chunks import numbers, pieces, together
from prfl_kernels.sublayers.products import (
    AttentionWeights,
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

KEEP = {
    "nothing": (),
    "attention": ("attention",),
    "projections": ("attention", "projections"),
    "all": ("attention", "projections", "rotated", "normed"),
}
KEPT = {"attention": 2, "projections": 3, "rotated": 3, "normed": 1}  # parts and their tensors


class _Settings(NamedTuple):
    """What the schema carries besides tensors."""

    grid: Grid
    num_heads: int
    eps: float
    offset: int
    dtype: torch.dtype
    factors: list[float]
    chunk: int | None

    def updates(self, lows) -> list[LowRank | None]:
        """The low-rank updates of q, k, v and o."""
        return [low_rank(*lows[2 * i : 2 * i + 2], self.factors[i]) for i in range(4)]


def _normed(x, scale, shift, s: _Settings):
    _, n, _, stats = add_norm.pair("modulate", x)[0](x, None, None, scale, shift, 1.0, s.eps, s.dtype)
    return n, stats


def _rotated(q, k, w: AttentionWeights, s: _Settings, first: int):
    """q, k [B, L, H, D] and 1/rms [2, B, L]; `first` is the first token of q and k in x."""
    run = rope_pair(q)[0]
    (q, k), _, rstd = run(q, k, w.norm_q, w.norm_k, s.grid, s.num_heads, s.eps, s.offset + first)
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


# The token axis of n, the statistics, q, k and v before and after norm and rotation, and 1/rms.
_AXES = {"n": 1, "stats": 2, "q_in": 1, "k_in": 1, "v": 1, "q": 1, "k": 1, "rstd": 2}


def _made(x, shift, scale, w: AttentionWeights, lows, s: _Settings, names) -> list[Tensor]:
    """Those of _AXES in `names`, from x, whole; the others live for a piece."""
    found = pieces(x, s.chunk)
    q_w, k_w, v_w = ready((w.q, w.k, w.v), s.dtype, found)
    low_q, low_k, low_v, _ = s.updates(lows)
    projected = any(name not in ("n", "stats") for name in names)

    def run(at: slice):
        made = dict.fromkeys(_AXES)
        made["n"], made["stats"] = n, _ = _normed(x[:, at], scale, shift, s)
        if projected:
            made["q_in"] = q = linear(n, q_w, w.q_bias, low_q)
            made["k_in"] = k = linear(n, k_w, w.k_bias, low_k)
            made["v"] = linear(n, v_w, w.v_bias, low_v)
            if "n" not in names:
                del n, made["n"]
            if "q" in names:
                made["q"], made["k"], made["rstd"] = _rotated(q, k, w, s, at.start)
        return [made[name] for name in names]

    return together(run, found, [_AXES[name] for name in names])


def _forward(x, shift, scale, gate, *rest):
    w, (weight, bias), lows, (out, _) = AttentionWeights(*rest[:10]), rest[10:12], rest[12:20], rest[20:22]
    s, keeps = _Settings(*rest[22:29]), dict(zip(KEPT, rest[29], strict=True))
    held = {name: tuple(x.new_empty(0) for _ in range(count)) for name, count in KEPT.items()}
    if out is None:
        names = ["stats", "v", "q", "k", "rstd"]
        names += ["q_in", "k_in"] if keeps["projections"] else []
        names += ["n"] if keeps["normed"] else []
        stats, v, q, k, rstd, *more = _made(x, shift, scale, w, lows, s, names)
        if keeps["normed"]:
            held["normed"] = (more.pop(),)
        if keeps["projections"]:
            held["projections"] = *more, v
        del more
        out, lse = attention_with_lse(q, k, _heads(v, s))
        if keeps["rotated"]:
            held["rotated"] = q, k, rstd
        del q, k, v, rstd
        if keeps["attention"]:
            held["attention"] = out, lse
    else:
        (stats,) = _made(x, shift, scale, w, lows, s, ["stats"])
    found, low = pieces(x, s.chunk), s.updates(lows)[3]
    (matrix,) = ready((w.o,), s.dtype, found)

    def end(at: slice):
        y = linear(out[:, at].flatten(2), matrix, w.o_bias, low)
        return _ended(x[:, at], y, gate, weight, bias, s)

    total, *ends = together(end, found, (1, 1, 2))
    ends = (x.new_empty(0) if a is None else a for a in ends)
    return total, *ends, stats, *sum(held.values(), ())


def _fake(x, shift, scale, gate, *rest):
    s, (batch, length, width) = _Settings(*rest[22:29]), x.shape
    keeps = dict(zip(KEPT, rest[29], strict=True))
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
    low_q: bool  # A and B of the update
    low_k: bool
    low_v: bool
    low_o: bool


def _backward(dout, dn, x, total, shift, scale, gate, *rest):
    w, lows, (weight, next_stats, stats) = AttentionWeights(*rest[:10]), rest[10:18], rest[18:21]
    out, lse, q_in, k_in, v, q, k, rstd, n = rest[21:30]
    s, wants = _Settings(*rest[30:37]), _Wants(*rest[37])
    found, low, sums = pieces(x, s.chunk), s.updates(lows), Sums()
    projections = [Product(low[i], wants[2 + i], wants[8 + i]) for i in range(3)]
    needs_n = any(p.wants or p.wants_low for p in projections)

    single, projected = len(found) == 1, bool(v.numel())
    missing = [] if projected else ["q_in", "k_in", "v"] if single else ["v"]
    missing += [] if rstd.numel() else ["q", "k", "rstd"]
    if projected and not rstd.numel():
        q, k, rstd = together(
            lambda at: _rotated(q_in[:, at], k_in[:, at], w, s, at.start), found, (1, 1, 2)
        )
    elif missing:
        missing += ["n"] if needs_n and not n.numel() and single else []
        made = dict(zip(missing, _made(x, shift, scale, w, lows, s, missing), strict=True))
        q_in, k_in, v = (made.pop(k, a) for k, a in (("q_in", q_in), ("k_in", k_in), ("v", v)))
        q, k, rstd = (made.pop(k, a) for k, a in (("q", q), ("k", k), ("rstd", rstd)))
        n = made.pop("n", n)
    if not lse.numel():
        out, lse = attention_with_lse(q, k, _heads(v, s))

    last = GatedProduct(gate, w.o, w.o_bias, low[3], s.dtype, wants.o, wants.gate, wants.low_o)

    def summed(at: slice, norm: bool, cast: torch.dtype | None):
        """The gradient of x', also in `cast`, and those of the next norm if `norm`."""
        return add_norm.pair("gated_add_norm", x)[1](
            dn[:, at], dout[:, at], total[:, at], None, None, weight, numbers(next_stats, at), 0.0, norm, cast
        )

    def ended(at: slice):
        if weight is None:
            dsum, d = None, dout[:, at].to(s.dtype)
        else:
            cast = None if x.dtype == s.dtype else s.dtype
            dsum, d, _, *norm = summed(at, wants.next_norm, cast)
            d = dsum if cast is None else d
            if wants.next_norm:
                sums.add("weight", norm[0])
                sums.add("bias", norm[1])
        last.add(d, out[:, at].flatten(2))
        return dsum if single else None, last.input_gradient(d)

    dsum, da = together(ended, found, (1, 1))
    dsum, da = dout if weight is None else dsum, da.view(out.shape)
    backend, factor = backward_of("attention", q), q.shape[3] ** -0.5
    dq, dk, dv = torch.ops.prfl.attention_backward(
        da, None, q, k, _heads(v, s), out, lse, factor, backend, True, True
    )
    da = q = k = v = out = lse = None
    matrices, again = ready((w.q, w.k, w.v), s.dtype, found), not (single or projected)

    def begun(at: slice):
        n_at = n[:, at] if n.numel() else None
        if n_at is None and (needs_n or again):
            n_at = _normed(x[:, at], scale, shift, s)[0]
        if again:
            q_at = linear(n_at, matrices[0], w.q_bias, low[0])
            k_at = linear(n_at, matrices[1], w.k_bias, low[1])
        else:
            q_at, k_at = q_in[:, at], k_in[:, at]
        dq_at, dk_at, dnorms = rope_pair(q_at)[1](
            dq[:, at], dk[:, at], q_at, k_at, w.norm_q, w.norm_k, numbers(rstd, at), s.grid,
            s.num_heads, s.offset + at.start, wants.norms,
        )  # fmt: skip
        del q_at, k_at
        if wants.norms:
            sums.add("norm_q", dnorms[0])
            sums.add("norm_k", dnorms[1])
        acc = None
        ends = dq_at, dk_at, dv[:, at].flatten(2)
        for product, d, matrix in zip(projections, ends, matrices, strict=True):
            acc = product.backward(d, n_at, matrix, acc)
        del dq_at, dk_at, ends, d, n_at
        dx, _, _, dscale, dshift = add_norm.pair("modulate", x)[1](
            acc.view(x[:, at].shape), summed(at, False, None)[0] if dsum is None else dsum[:, at], x[:, at],
            None, None, scale, numbers(stats, at), 1.0, wants.vectors, None,
        )  # fmt: skip
        if wants.vectors:
            sums.add("scale", dscale)
            sums.add("shift", dshift)
        return (dx,)

    (dx,) = together(begun, found, (1,))
    made = {**sums, **last.gradients("o")}
    for name, product in zip("qkv", projections, strict=True):
        made |= product.gradients(name)
    like = _like(shift, scale, gate, w, weight, lows)
    return dx, *(made[k].to(a.dtype) if k in made else x.new_empty(0) for k, a in like.items())


def _like(shift, scale, gate, w: AttentionWeights, weight, lows) -> dict[str, Tensor | None]:
    """What has a gradient, in the order of the forward's arguments."""
    like = {"shift": shift, "scale": scale, "gate": gate, **w._asdict(), "weight": weight, "bias": weight}
    return like | dict(zip(_LOWS, lows, strict=True))


def _backward_fake(dout, dn, x, total, shift, scale, gate, *rest):
    w, lows, weight, wants = AttentionWeights(*rest[:10]), rest[10:18], rest[18], _Wants(*rest[37])
    end = wants.o or wants.gate
    wanted = {"shift": wants.vectors, "scale": wants.vectors, "gate": end, "o": end, "o_bias": end}
    wanted |= {name: getattr(wants, name[0]) for name in ("q", "q_bias", "k", "k_bias", "v", "v_bias")}
    wanted |= dict.fromkeys(("norm_q", "norm_k"), wants.norms)
    wanted |= dict.fromkeys(("weight", "bias"), wants.next_norm)
    wanted |= {name: getattr(wants, f"low_{name[0]}") for name in _LOWS}
    return x.new_empty(x.shape), *(
        a.new_empty(a.shape) if wanted[k] else x.new_empty(0)
        for k, a in _like(shift, scale, gate, w, weight, lows).items()
    )


def _setup_context(ctx, inputs, output):
    x, shift, scale, gate = inputs[:4]
    weights, weight, lows, given, ctx.settings = (
        inputs[4:14], inputs[14], inputs[16:24], inputs[24:26], inputs[26:33],
    )  # fmt: skip
    total, next_n, next_stats, *held = output
    ctx.set_materialize_grads(False)  # or every kept tensor gets a gradient of zeros of its size
    if weight is None:
        total = next_stats  # x' is not needed: an empty tensor in its place
        ctx.mark_non_differentiable(next_n)
    ctx.mark_non_differentiable(next_stats, *held)
    if given[0] is not None:
        held[1:3] = given
    ctx.save_for_backward(x, total, shift, scale, gate, *weights, *lows, weight, next_stats, *held)


def _gradient(ctx, dout, dn, *_):
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    if dn is None and saved[23] is not None:
        dn = torch.zeros_like(saved[0], dtype=ctx.settings[4])
    pairs = [any(needs[i : i + 2]) for i in range(0, 24, 2)]  # the first of x and shift
    wants = [any(needs[1:3]), needs[3], *pairs[2:8], *pairs[8:]]
    made = torch.ops.prfl.modulated_attention_backward(
        dout, None if saved[23] is None else dn, *saved, *ctx.settings, wants
    )
    return *(a if need else None for a, need in zip(made, needs[:24], strict=True)), *[None] * 10


_VECTORS = "Tensor shift, Tensor scale, Tensor gate"
_MATRICES = ", ".join(f"Tensor {name}" for name in AttentionWeights._fields)
_LOWS = [f"{name}_{part}" for name in "qkvo" for part in ("down", "up")]
_UPDATES = ", ".join(f"Tensor? {name}" for name in _LOWS)
_SETTINGS = (
    "int[3] grid, int num_heads, float eps, int offset, ScalarType dtype, float[4] factors, int? chunk"
)
register(
    f"modulated_attention(Tensor x, {_VECTORS}, {_MATRICES}, Tensor? weight, Tensor? bias, {_UPDATES},"
    f" Tensor? given_out, Tensor? given_lse, {_SETTINGS}, bool[4] keep) -> ({', '.join(['Tensor'] * 13)})",
    *checked(branch_checks.modulated_attention, _forward, _fake),
    _gradient,
    _setup_context,
)
register(
    f"modulated_attention_backward(Tensor dout, Tensor? dn, Tensor x, Tensor total, {_VECTORS}, {_MATRICES},"
    f" {_UPDATES}, Tensor? weight, Tensor next_stats, Tensor stats, Tensor out, Tensor lse, Tensor q_in,"
    " Tensor k_in, Tensor v_in, Tensor q_rotated, Tensor k_rotated, Tensor rstd, Tensor n,"
    f" {_SETTINGS}, bool[12] wants) -> ({', '.join(['Tensor'] * 24)})",
    *checked(branch_checks.modulated_attention_backward, _backward, _backward_fake),
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
    low: Mapping[str, LowRank] | None = None,
    chunk: int | None = None,
) -> Branch:
    """The branch: x', and n' where there is norm = (weight [C], bias [C]) of the next one.

    x [B, L, C] is the residual stream, shift, scale and gate [B, C]; grid (frames, rows, columns) of the
    whole sequence and offset as in qk_norm_rope; products and attention run in dtype (x.dtype if None).
    keep is a mode of KEEP or some of the names behind them; without gradient nothing is kept. attention is
    what an earlier call with the same inputs returned under that name, not to be computed again: with it
    nothing else is kept, as with keep "attention". low holds low-rank updates of "q", "k", "v" and "o"; chunk
    is the number of tokens (of all samples) to work on at a time, None for all. Raises ValueError for
    another `keep`, or names in `low`, or a chunk below 1.
    """
    op, names = "modulated_attention", kept("modulated_attention", KEEP, keep)
    lows, factors = flattened(op, low, "qkvo")
    inputs = (x, shift, scale, gate, *weights, *(norm or ()), *lows)
    graded = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs)
    keeps = {name: graded and name in names for name in KEPT}
    # What dW and the gradients of A and B take n for.
    trained = any(a is not None and a.requires_grad for a in (*weights[:6], *lows[:6]))
    keeps["normed"] &= trained or not keeps["projections"]
    if attention is not None:
        keeps = dict.fromkeys(KEPT, False)
    made = torch.ops.prfl.modulated_attention(
        x, shift, scale, gate, *weights, *(norm or (None, None)), *lows, *(attention or (None, None)),
        list(grid), num_heads, eps, offset, dtype or x.dtype, factors, chunk, list(keeps.values()),
    )  # fmt: skip
    held = (made[4], made[5]) if keeps["attention"] else attention
    return Branch(made[0], None if norm is None else made[1], held)
