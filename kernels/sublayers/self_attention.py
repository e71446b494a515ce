"""The self-attention sublayer of a block as one operation that is told what to save for its backward.

    n       = LN(x) (1 + scale) + shift               x [B, L, C]; shift, scale, gate [B, C] or [B, 2, C]
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

a Wo^T is not needed but for d gate of short samples, see prfl_kernels.sublayers.products. n is not saved
where projections and updates are frozen. A block that is recomputed in backward can be given a and the
log-sum-exp of its first forward. Then x' needs neither q, k, v nor attention, and the backward recomputes
q, k and v alone. With `chunk` all but attention itself works on that many tokens at a time. In addition to
inputs, results and what is saved, only q, k, v and a then exist as a whole (8 L C bytes in 16 bits), in
backward those and their gradients (16 L C). Two things that the backward needs on both sides of attention
are computed twice for that: the gradient of x' where there is an n', and q and k before the norm where
they are not saved (4 L C^2 FLOPs).

With a `cut` (prfl_kernels.exchange) x holds the tokens of this rank alone, and attention runs on all tokens
of H / P heads: q, k and v are exchanged before it and its output after it, and so are their gradients. What
only attention's backward reads stays as exchanged: q and k rotated, v and the log-sum-exp. Where P does not
divide the heads, queries are those of a neighbourhood of ranks. Keys and values are exchanged like them, and
those of all tokens are gathered for attention and again for its backward. Of two
vectors tokens before `boundary`, counted in x, take the first.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.attention.op import attend_backward
from prfl_kernels.dispatch import record
from prfl_kernels.exchange import Cut, own_keys, to_heads, to_tokens
from prfl_kernels.jit import wide
from prfl_kernels.norm import op as add_norm
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.qk_norm_rope.rope import Grid
from prfl_kernels.sublayers import checks
from prfl_kernels.sublayers.chunks import numbers, pieces, together, within
from prfl_kernels.sublayers.heads import attended, exchanged, keys
from prfl_kernels.sublayers.operation import Operation, Shape, tensors
from prfl_kernels.sublayers.products import (
    AttentionWeights,
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

KEEP = {
    "nothing": (),
    "attention": ("attention",),
    "projections": ("attention", "projections"),
    "all": ("attention", "projections", "rotated", "normed"),
}


# x [B, L, C]; shift, scale, gate [B, C] or [B, 2, C]; weights as in AttentionWeights, of the next norm [C],
# updates as in LowRank; output and log-sum-exp of an earlier call, which take no gradient.
Inputs = NamedTuple("Inputs", tensors(
    ("x", "shift", "scale", "gate", *AttentionWeights._fields),
    ("weight", "bias", *low_rank_names("qkvo"), "given_out", "given_lse"),
))  # fmt: skip


class Settings(NamedTuple):
    """What is not a tensor, as `modulated_attention` takes it."""

    grid: Grid
    num_heads: int
    eps: float
    offset: int
    dtype: torch.dtype
    factors: tuple[float, float, float, float]  # of the updates of q, k, v and o
    chunk: int | None
    parts: tuple[int, ...]  # tokens of every rank of the group, () if all tokens are here
    group: str
    far: tuple[int, ...]  # tokens of every such group whose keys are gathered, () if there is only one
    far_group: str
    boundary: int


# x' and n'; statistics [2, B, L] of x' and of x; then what is saved if asked for: attention's output
# [B, L, H, D] and log-sum-exp [B, H, L], q and k before their norm and v [B, L, C], q and k rotated
# [B, L, H, D] and their 1/rms [2, B, L], n [B, L, C]. Of a cut sequence log-sum-exp, rotated q and k, and v
# are those of all tokens of `parts` and H / P heads: [B, H / P, L], [B, L, H / P, D].
KEPT = {
    "attention": ("out", "lse"), "projections": ("q_in", "k_in", "v"), "rotated": ("q", "k", "rstd"),
    "normed": ("n",),
}  # fmt: skip
RESULTS = ("total?", "next_n?", "next_stats", "stats", *sum(KEPT.values(), ()))
WANTS = {
    "x": ("x",), "vectors": ("shift", "scale"), "gate": ("gate",), "norms": ("norm_q", "norm_k"),
    "next_norm": ("weight", "bias"), **{name: (name, f"{name}_bias") for name in "qkvo"},
    **{f"low_{name}": (f"{name}_down", f"{name}_up") for name in "qkvo"},
}  # fmt: skip


def _shapes(inputs: Inputs, settings: Settings) -> dict[str, Shape | None]:
    x, dtype = inputs.x, settings.dtype
    rows, heads, lse = checks.attention_shapes(x, settings, settings.parts)
    q, v = (checks.exchanged(heads, settings),) * 2 if settings.parts else (heads, rows)
    numbers, ended = (2, *x.shape[:2]), inputs.weight is not None
    stats = numbers, wide(x.dtype)
    return {
        "total": (x.shape, x.dtype), "next_n": rows if ended else None,
        "next_stats": stats if ended else None, "stats": stats, "out": heads, "lse": lse,
        "q_in": rows, "k_in": rows, "v": v,
        "q": q, "k": q, "rstd": (numbers, wide(dtype)), "n": rows,
    }  # fmt: skip


def _normed(x, inputs: Inputs, settings: Settings, at: slice):
    """n and the statistics of a piece x of the tokens, those `at`."""
    fill, vectors, eps = record("modulate", x).forward, (inputs.scale, inputs.shift), settings.eps
    boundary = within(settings.boundary, at)
    _, n, _, stats = add_norm.forward(fill, x, None, None, *vectors, 1.0, eps, settings.dtype, boundary)
    return n, stats


def _rotated(q, k, inputs: Inputs, settings: Settings, first: int):
    """q, k [B, L, H, D] and 1/rms [2, B, L]; `first` is the first token of q and k in x."""
    (q, k), _, rstd = qk_norm_rope.forward(
        record("qk_norm_rope", q).forward, q, k, inputs.norm_q, inputs.norm_k, settings.grid,
        settings.num_heads, settings.eps, settings.offset + first,
    )  # fmt: skip
    return q, k, rstd


def _ended(x, y, inputs: Inputs, settings: Settings, at: slice):
    """(x', n', statistics of x') of a piece, the last two None without a next norm."""
    fill = record("gated_add" if inputs.weight is None else "gated_add_norm", x).forward
    norm = inputs.weight, inputs.bias, 0.0, settings.eps, settings.dtype
    total, n, _, stats = add_norm.forward(fill, x, y, inputs.gate, *norm, within(settings.boundary, at))
    return total, n, stats


# The token axis of n, the statistics, q, k and v before and after norm and rotation, and 1/rms.
_AXES = {"n": 1, "stats": 2, "q_in": 1, "k_in": 1, "v": 1, "q": 1, "k": 1, "rstd": 2}


def _made(inputs: Inputs, settings: Settings, names: list[str]) -> dict[str, Tensor]:
    """Those of _AXES in `names`, from x, whole; the others live for a piece."""
    found = pieces(inputs.x, settings.chunk)
    q_w, k_w, v_w = ready((inputs.q, inputs.k, inputs.v), settings.dtype, found)
    low_q, low_k, low_v, _ = low_ranks(inputs, "qkvo", settings.factors)
    projected = any(name not in ("n", "stats") for name in names)

    def run(at: slice):
        made = dict.fromkeys(_AXES)
        made["n"], made["stats"] = n, _ = _normed(inputs.x[:, at], inputs, settings, at)
        if projected:
            made["q_in"] = q = linear(n, q_w, inputs.q_bias, low_q)
            made["k_in"] = k = linear(n, k_w, inputs.k_bias, low_k)
            made["v"] = linear(n, v_w, inputs.v_bias, low_v)
            if "n" not in names:
                del n, made["n"]
            if "q" in names:
                made["q"], made["k"], made["rstd"] = _rotated(q, k, inputs, settings, at.start)
        return [made[name] for name in names]

    return dict(zip(names, together(run, found, [_AXES[name] for name in names]), strict=True))


def _forward(inputs: Inputs, settings: Settings, saves) -> dict[str, Tensor | None]:
    saved = sum((names for names, asked in zip(KEPT.values(), saves, strict=True) if asked), ("stats",))
    if inputs.given_out is None:
        needed = {*saved, "v", "q", "k", "rstd"}
        made = _made(inputs, settings, [name for name in _AXES if name in needed])
        made |= exchanged(made, "qkv", settings)
        made |= attended(made, settings)
        out = made["out"]
    else:
        made, out = _made(inputs, settings, ["stats"]), inputs.given_out
    # What was exchanged together lies in one buffer; what is saved must not hold the rest.
    results = {name: made[name].contiguous() for name in saved if name in made}
    del made
    found, low = pieces(inputs.x, settings.chunk), low_ranks(inputs, "qkvo", settings.factors)[3]
    (matrix,) = ready((inputs.o,), settings.dtype, found)

    def end(at: slice):
        y = linear(out[:, at].flatten(2), matrix, inputs.o_bias, low)
        return _ended(inputs.x[:, at], y, inputs, settings, at)

    results["total"], results["next_n"], results["next_stats"] = together(end, found, (1, 1, 2))
    return results


def _save(inputs: Inputs, results) -> tuple[Inputs, NamedTuple]:
    """Given attention in its place; x' for the next norm alone."""
    if inputs.given_out is not None:
        results = results._replace(out=inputs.given_out, lse=inputs.given_lse)
        inputs = inputs._replace(given_out=None, given_lse=None)
    return inputs, results._replace(next_n=None, total=None if inputs.weight is None else results.total)


def _backward(
    dtotal: Tensor | None, dn: Tensor | None, inputs: Inputs, saved, settings: Settings, wants
) -> dict[str, Tensor]:
    x, dtype, next_weight = inputs.x, settings.dtype, inputs.weight
    dtotal = torch.zeros_like(x) if dtotal is None else dtotal
    if dn is None and next_weight is not None:
        dn = torch.zeros_like(x, dtype=dtype)
    found, low, sums = pieces(x, settings.chunk), low_ranks(inputs, "qkvo", settings.factors), Sums()
    wanted = [(getattr(wants, k), getattr(wants, f"low_{k}")) for k in "qkv"]
    projections = [Product(update, *both) for update, both in zip(low, wanted, strict=False)]
    needs_n = any(p.trained for p in projections)

    have, single, projected = saved._asdict(), len(found) == 1, bool(saved.v.numel())
    missing = [] if projected else ["q_in", "k_in", "v"] if single else ["v"]
    missing += [] if saved.rstd.numel() else ["q", "k", "rstd"]
    if projected and not saved.rstd.numel():
        def rotated(at: slice):
            return _rotated(saved.q_in[:, at], saved.k_in[:, at], inputs, settings, at.start)

        have["q"], have["k"], have["rstd"] = together(rotated, found, (1, 1, 2))
    elif missing:
        missing += ["n"] if needs_n and not saved.n.numel() and single else []
        have |= _made(inputs, settings, missing)
    have |= exchanged(have, (name for name in "qkv" if not getattr(saved, name).numel()), settings)
    if not saved.lse.numel():
        have |= attended(have, settings)

    last = gated_products(
        inputs.x.shape[1], inputs.gate, settings.boundary, inputs.o, inputs.o_bias, low[3],
        dtype, wants.o, wants.gate, wants.low_o,
    )  # fmt: skip

    def summed(at: slice, norm: bool, cast: torch.dtype | None):
        """The gradient of x', also in `cast`, and those of the next norm if `norm`."""
        return add_norm.backward(
            record("gated_add_norm", x).backward, dn[:, at], dtotal[:, at], saved.total[:, at], None, None,
            next_weight, numbers(saved.next_stats, at), 0.0, norm, cast,
        )  # fmt: skip

    def ended(at: slice):
        if next_weight is None:
            dsum, d = None, dtotal[:, at].to(dtype)
        else:
            cast = None if x.dtype == dtype else dtype
            dsum, d, _, *norm = summed(at, wants.next_norm, cast)
            d = dsum if cast is None else d
            if wants.next_norm:
                sums.add("weight", norm[0])
                sums.add("bias", norm[1])
        last.add(d, have["out"][:, at].flatten(2), at)
        return dsum if single else None, last.input_gradient(d, at)

    dsum, da = together(ended, found, (1, 1))
    dsum, da = dtotal if next_weight is None else dsum, da.view(have["out"].shape)
    q, k, v, out, lse = (have.pop(name) for name in ("q", "k", "v", "out", "lse"))
    if settings.parts:
        out, da = to_heads([out, da], settings.parts, settings.group)
    dq, dk, dv = attend_backward(da, q, *keys(k, v, settings), out, lse)
    del da, q, k, v, out, lse
    if settings.far:
        dk, dv = own_keys([dk, dv], settings.far, settings.far_group)
    if settings.parts:
        dq, dk, dv = to_tokens([dq, dk, dv], settings.parts, settings.group)
    matrices = ready((inputs.q, inputs.k, inputs.v), dtype, found)
    n, repeated = have["n"], not (single or projected)

    def begun(at: slice):
        n_at = n[:, at] if n.numel() else None
        if n_at is None and (needs_n or repeated):
            n_at = _normed(x[:, at], inputs, settings, at)[0]
        if repeated:
            q_at = linear(n_at, matrices[0], inputs.q_bias, low[0])
            k_at = linear(n_at, matrices[1], inputs.k_bias, low[1])
        else:
            q_at, k_at = have["q_in"][:, at], have["k_in"][:, at]
        dq_at, dk_at, dnorms = qk_norm_rope.backward(
            record("qk_norm_rope", q_at).backward, dq[:, at], dk[:, at], q_at, k_at, inputs.norm_q,
            inputs.norm_k, numbers(have["rstd"], at), settings.grid, settings.num_heads,
            settings.offset + at.start, wants.norms,
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
        dx, _, _, dscale, dshift = add_norm.backward(
            record("modulate", x).backward, acc.view(x[:, at].shape),
            summed(at, False, None)[0] if dsum is None else dsum[:, at], x[:, at], None, None, inputs.scale,
            numbers(saved.stats, at), 1.0, wants.vectors, None, within(settings.boundary, at),
        )  # fmt: skip
        if wants.vectors:
            sums.add("scale", dscale)
            sums.add("shift", dshift)
        return (dx,)

    (dx,) = together(begun, found, (1,))
    made = {"x": dx, **sums, **last.gradients("o")}
    for name, product in zip("qkv", projections, strict=True):
        made |= product.gradients(name)
    return made


_OPERATION = Operation(
    "modulated_attention", Inputs, Settings, RESULTS, KEPT, WANTS, checks.modulated_attention,
    _shapes, _forward, _save, _backward, proper=2,
)  # fmt: skip


class SelfAttentionOutput(NamedTuple):
    """What `modulated_attention` returns."""

    x: Tensor  # x' [B, L, C] in x.dtype
    n: Tensor | None  # n' [B, L, C] in dtype, where a next norm was given
    attention: tuple[Tensor, Tensor] | None  # a [B, L, H, D] and log-sum-exp [B, H, L], where saved or given


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
    cut: Cut | None = None,
    boundary: int = 0,
) -> SelfAttentionOutput:
    """The sublayer: x', and n' where there is norm = (weight [C], bias [C]) of the next one.

    x [B, L, C] is the residual stream, shift, scale and gate [B, C], or [B, 2, C]: those of the tokens of x
    before `boundary` (0 to L), and of the others; grid (frames, rows, columns) of the
    whole sequence and offset as in qk_norm_rope; products and attention run in dtype (x.dtype if None).
    keep is a mode of KEEP or some of the names it stands for; without gradient nothing is saved. attention is
    what an earlier call with the same inputs returned under that name, not to be recomputed: with it
    nothing else is saved, as with keep "attention". low holds low-rank updates of "q", "k", "v" and "o";
    chunk is the number of tokens (of all samples) to work on at a time, None for all. With cut, x holds the
    tokens cut.span of the sequence; every rank of the group must call. Raises ValueError for another `keep`,
    or names in `low`, or a chunk below 1, or heads that the ranks of cut.near do not divide, or a boundary
    that does not fit.
    """
    op, names = "modulated_attention", saved_names("modulated_attention", KEEP, keep)
    lows, factors = flattened(op, low, "qkvo")
    inputs = Inputs(
        x, shift, scale, gate, *weights, *(norm or (None, None)), *lows, *(attention or (None, None))
    )
    graded = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs[:-2])
    keeps = {name: graded and attention is None and name in names for name in KEPT}
    # What dW and the gradients of A and B take n for.
    trained = any(a is not None and a.requires_grad for a in (*weights[:6], *lows[:6]))
    keeps["normed"] &= trained or not keeps["projections"]
    groups = ((), "") * 2 if cut is None else cut[3:]
    offset += 0 if cut is None else cut.span.start
    rest = factors, chunk, *groups, boundary
    settings = Settings(grid, num_heads, eps, offset, dtype or x.dtype, *rest)
    made = _OPERATION.results._make(_OPERATION.call(*inputs, *settings, list(keeps.values())))
    if keeps["attention"]:
        attention = made.out, made.lse
    return SelfAttentionOutput(made.total, None if norm is None else made.next_n, attention)
