"""The cross-attention branch of a block as one operation that decides itself what it keeps.

    q       = rms(x Wq^T + bq)                               x [B, L, C]; context [B, S, C]
    k, v    = rms(c Wk^T + bk), c Wv^T + bv                  c: the text tokens of the context
    y       = (softmax(q k^T / sqrt(D)) v + ...) Wo^T + bo

In an image-to-video model the first tokens of the context are an image with projections of its own, and
"..." is the same queries' attention to it; elsewhere it is nothing. The last text token counts `repeats`
times, as in prfl_kernels.attention.op, in the gradients of context and weights too. Kept for the backward: x,
context, the weights, and what `keep` names:

    mode         keeps                                     bytes (16 bits)   made again in backward
    nothing      -                                                           q, attention
    attention    attention: output, log-sum-exp            2 L C + 4 L H     q
    projections  and projections: q, k before norm, v      4 L C + 4 S C     norms
    all          and queries: q, 1/rms                     6 L C + 4 S C     norm of k

attention is kept once more for an image.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.checks import checked
from prfl_kernels.dispatch import backward_of
from prfl_kernels.jit import register, wide
from prfl_kernels.qk_norm_rope.op import pair as norm_pair
from prfl_kernels.sublayers import checks as branch_checks
from prfl_kernels.sublayers.products import AttentionWeights, kept, linear, weight_gradients

KEEP = {
    "nothing": (),
    "attention": ("attention",),
    "projections": ("attention", "projections"),
    "all": ("attention", "projections", "queries"),
}
KEPT = {"attention": 4, "projections": 5, "queries": 2}  # parts and their tensors


class ImageWeights(NamedTuple):
    """The projections of the image tokens."""

    k: Tensor
    k_bias: Tensor
    v: Tensor
    v_bias: Tensor
    norm_k: Tensor


class _Settings(NamedTuple):
    """What the schema carries besides tensors."""

    image_tokens: int
    num_heads: int
    eps: float
    dtype: torch.dtype
    repeats: int


class _Keys(NamedTuple):
    """One part of the context, with its projections [B, S, C]."""

    name: str  # suffix of the names of its gradients
    tokens: Tensor
    repeats: int  # of the last token
    weights: NamedTuple
    before: Tensor  # keys before the norm
    rstd: Tensor
    k: Tensor
    v: Tensor


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms(x) [B, L, C], 1/rms [1, B, L])."""
    (n, _), _, rstd = norm_pair(x, "rms_norm")[0](x, None, weight, None, None, 1, eps, 0)
    return n.flatten(2), rstd


def _keys(
    context, w: AttentionWeights, image: ImageWeights, s: _Settings, held: Sequence[Tensor]
) -> list[_Keys]:
    """The parts of the context, the text first; held: the keys before norm and values of each, or empty."""
    parts, tokens = [("", context[:, s.image_tokens :], s.repeats, w)], context[:, : s.image_tokens]
    if s.image_tokens:
        parts.append(("_img", tokens, 1, image))
    made = []
    for i, (name, tokens, repeats, weights) in enumerate(parts):
        tokens, (before, v) = tokens.to(s.dtype), held[2 * i : 2 * i + 2]
        if not before.numel():
            before = linear(tokens, weights.k, weights.k_bias)
            v = linear(tokens, weights.v, weights.v_bias)
        k, rstd = _normed(before, weights.norm_k, s.eps)
        made.append(_Keys(name, tokens, repeats, weights, before, rstd, k, v))
    return made


def _heads(x: Tensor, s: _Settings) -> Tensor:
    return x.unflatten(2, (s.num_heads, -1))


def _attended(q, keys: list[_Keys], s: _Settings) -> list[Tensor]:
    """Output and log-sum-exp of every part."""
    q, made = _heads(q, s), []
    for part in keys:
        made += attention_with_lse(q, _heads(part.k, s), _heads(part.v, s), repeats=part.repeats)
    return made


def _forward(x, context, *rest):
    w, image, s = AttentionWeights(*rest[:10]), ImageWeights(*rest[10:15]), _Settings(*rest[15:20])
    keeps = dict(zip(KEPT, rest[20], strict=True))
    held = {name: [x.new_empty(0) for _ in range(count)] for name, count in KEPT.items()}
    q_in = linear(x.to(s.dtype), w.q, w.q_bias)
    q, rstd = _normed(q_in, w.norm_q, s.eps)
    keys = _keys(context, w, image, s, held["projections"][1:])
    if keeps["projections"]:
        projected = [q_in, *(a for part in keys for a in (part.before, part.v))]
        held["projections"][: len(projected)] = projected
        del projected
    del q_in
    made = _attended(q, keys, s)
    del keys
    if keeps["queries"]:
        held["queries"] = [q, rstd]
    del q, rstd
    a = made[0] if len(made) == 2 else made[0] + made[2]
    if keeps["attention"]:
        held["attention"][: len(made)] = made
    del made
    return linear(a.flatten(2), w.o, w.o_bias), *sum(held.values(), [])


def _fake(x, context, *rest):
    s, keeps = _Settings(*rest[15:20]), dict(zip(KEPT, rest[20], strict=True))
    batch, length, width = x.shape
    rows = (batch, length, width), s.dtype
    text, picture = (
        ((batch, n, width), s.dtype) for n in (context.shape[1] - s.image_tokens, s.image_tokens)
    )
    outs = [
        ((batch, length, s.num_heads, width // s.num_heads), s.dtype),
        ((batch, s.num_heads, length), wide(s.dtype)),
    ]
    wanted = {
        "attention": [*outs, *(outs if s.image_tokens else [None, None])],
        "projections": [rows, text, text, *([picture, picture] if s.image_tokens else [None, None])],
        "queries": [rows, ((1, batch, length), wide(s.dtype))],
    }
    made = sum((v if keeps[k] else [None] * len(v) for k, v in wanted.items()), [])
    held = (x.new_empty(0) if a is None else x.new_empty(a[0], dtype=a[1]) for a in made)
    return x.new_empty(rows[0], dtype=rows[1]), *held


class _Wants(NamedTuple):
    """The groups of gradients to make; a weight goes with its bias."""

    x: bool
    context: bool
    q: bool
    k: bool
    v: bool
    o: bool
    norm_q: bool
    norm_k: bool
    k_img: bool
    v_img: bool
    norm_k_img: bool


def _backward(dy, x, context, *rest):
    w, image = AttentionWeights(*rest[:10]), ImageWeights(*rest[10:15])
    out, lse, out_img, lse_img, q_in, *projected, q, rstd = rest[15:26]
    s, wants = _Settings(*rest[26:31]), _Wants(*rest[31])
    made: dict[str, Tensor] = {}
    n, d = x.to(s.dtype), dy.to(s.dtype)
    if not q_in.numel():
        q_in = linear(n, w.q, w.q_bias)
    if not rstd.numel():
        q, rstd = _normed(q_in, w.norm_q, s.eps)
    keys = _keys(context, w, image, s, projected)
    results = [out, lse, out_img, lse_img] if lse.numel() else _attended(q, keys, s)
    if wants.o:
        a = (results[0] + results[2] if len(keys) == 2 else results[0]).flatten(2)
        made["o"], made["o_bias"] = weight_gradients(d, a, w.o, w.o_bias)
        del a
    da = (d @ w.o.to(s.dtype)).view(q.shape)
    del d
    backend, factor = backward_of("attention", _heads(q, s)), (q.shape[2] // s.num_heads) ** -0.5
    wants_q, dq, dcontext = wants.x or wants.q or wants.norm_q, None, []
    for part, a, lse in zip(keys, results[::2], results[1::2], strict=False):
        wants_kv = wants.context or any(getattr(wants, f"{m}{part.name}") for m in ("k", "v", "norm_k"))
        more, dk, dv = torch.ops.prfl.attention_backward(
            _heads(da, s), None, _heads(q, s), _heads(part.k, s), _heads(part.v, s), a, lse, factor,
            backend, wants_q, wants_kv, part.repeats,
        )  # fmt: skip
        dq = more if dq is None else dq + more
        if wants_kv:
            dcontext.append(_keys_backward(dk.flatten(2), dv.flatten(2), part, wants, made))
    del da, q, results, out, lse, out_img, lse_img, more
    if wants_q:
        run = norm_pair(q_in, "rms_norm")[1]
        dq, _, dnorm = run(
            dq.flatten(2), None, q_in, None, w.norm_q, None, rstd, None, 1, 0, wants.norm_q
        )
        made["norm_q"] = dnorm[0] if wants.norm_q else None
        if wants.q:
            made["q"], made["q_bias"] = weight_gradients(dq, n, w.q, w.q_bias)
        if wants.x:
            made["x"] = dq @ w.q.to(dq.dtype)
    if wants.context:
        made["context"] = torch.cat(dcontext[::-1], dim=1)  # the image comes first
    like = {"x": x, "context": context, **w._asdict()}
    like |= {f"{name}_img": a for name, a in image._asdict().items()}
    return tuple(
        x.new_empty(0) if made.get(name) is None else made[name].to(a.dtype) for name, a in like.items()
    )


def _keys_backward(dk, dv, part: _Keys, wants: _Wants, made: dict[str, Tensor]) -> Tensor:
    """Gradient of the tokens of one part; those of its weights go into `made`."""
    w, end = part.weights, part.name
    wants_norm = getattr(wants, f"norm_k{end}")
    run = norm_pair(part.before, "rms_norm")[1]
    dk, _, dnorm = run(dk, None, part.before, None, w.norm_k, None, part.rstd, None, 1, 0, wants_norm)
    if wants_norm:
        made[f"norm_k{end}"] = dnorm[0]
    for name, d in (("k", dk), ("v", dv)):
        if getattr(wants, f"{name}{end}"):
            made[f"{name}{end}"], made[f"{name}_bias{end}"] = weight_gradients(
                d, part.tokens, getattr(w, name), getattr(w, f"{name}_bias")
            )
    return dk @ w.k.to(dk.dtype) + dv @ w.v.to(dv.dtype)


def _backward_fake(dy, x, context, *rest):
    w, image, wants = AttentionWeights(*rest[:10]), ImageWeights(*rest[10:15]), _Wants(*rest[31])
    like = {"x": x, "context": context, **w._asdict()}
    like |= {f"{name}_img": a for name, a in image._asdict().items()}
    return tuple(
        a.new_empty(a.shape) if getattr(wants, name.replace("_bias", "")) else x.new_empty(0)
        for name, a in like.items()
    )


def _setup_context(ctx, inputs, output):
    ctx.settings = inputs[17:22]
    ctx.set_materialize_grads(False)  # or every kept tensor gets a gradient of zeros of its size
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:17], *output[1:])


def _gradient(ctx, dy, *_):
    if dy is None:
        return (None,) * 23
    needs = ctx.needs_input_grad
    pairs = [any(needs[i : i + 2]) for i in (2, 4, 6, 8)]
    wants = [*needs[:2], *pairs, *needs[10:12], any(needs[12:14]), any(needs[14:16]), needs[16]]
    made = torch.ops.prfl.cross_attention_backward(dy, *ctx.saved_tensors, *ctx.settings, wants)
    return *(a if need else None for a, need in zip(made, needs[:17], strict=True)), *[None] * 6


_MATRICES = ", ".join(f"Tensor {name}" for name in AttentionWeights._fields)
_IMAGE = ", ".join(f"Tensor? {name}_img" for name in ImageWeights._fields)
_SETTINGS = "int image_tokens, int num_heads, float eps, ScalarType dtype, int repeats"
register(
    f"cross_attention(Tensor x, Tensor context, {_MATRICES}, {_IMAGE}, {_SETTINGS}, bool[3] keep)"
    f" -> ({', '.join(['Tensor'] * 12)})",
    *checked(branch_checks.cross_attention, _forward, _fake),
    _gradient,
    _setup_context,
)
register(
    f"cross_attention_backward(Tensor dy, Tensor x, Tensor context, {_MATRICES}, {_IMAGE}, Tensor out,"
    " Tensor lse, Tensor out_img, Tensor lse_img, Tensor q_in, Tensor k_in, Tensor v_in, Tensor k_img_in,"
    f" Tensor v_img_in, Tensor q_normed, Tensor rstd, {_SETTINGS}, bool[11] wants)"
    f" -> ({', '.join(['Tensor'] * 17)})",
    *checked(branch_checks.cross_attention_backward, _backward, _backward_fake),
)


def cross_attention(
    x: Tensor,
    context: Tensor,
    weights: AttentionWeights,
    num_heads: int,
    image: ImageWeights | None = None,
    image_tokens: int = 0,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    keep: str | Collection[str] = "all",
    repeats: int = 1,
) -> Tensor:
    """The branch's output y [B, L, C] in dtype, to be added to the residual stream.

    x [B, L, C] is the normed stream, context [B, S, C]; with `image` its first image_tokens tokens are those
    of an image, and its last text token counts `repeats` times. Products and attention run in dtype (x.dtype
    if None). keep is a mode of KEEP or some of the names behind them; without gradient nothing is kept.
    Raises ValueError for another `keep`, for repeats below 1, and for image tokens without their weights or
    weights without tokens.
    """
    names = kept("cross_attention", KEEP, keep)
    inputs = (x, context, *weights, *(image or ()))
    graded = torch.is_grad_enabled() and any(a.requires_grad for a in inputs)
    return torch.ops.prfl.cross_attention(
        x, context, *weights, *(image or [None] * 5), image_tokens, num_heads, eps, dtype or x.dtype,
        repeats, [graded and name in names for name in KEPT],
    )[0]  # fmt: skip
