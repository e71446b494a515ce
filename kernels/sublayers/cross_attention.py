"""The cross-attention sublayer of a block as one operation that is told what to save for its backward.

    q       = rms(x Wq^T + bq)                               x [B, L, C]; context [B, S, C]
    k, v    = rms(c Wk^T + bk), c Wv^T + bv                  c: the text tokens of the context
    y       = (softmax(q k^T / sqrt(D)) v + ...) Wo^T + bo

In an image-to-video model the first tokens of the context are an image with projections of its own, and
"..." is the same queries' attention to it; elsewhere it is nothing. The last text token counts `repeats`
times, as in prfl_kernels.attention.op, in the gradients of context and weights too. Every matrix may have a
low-rank update (LoRA, prfl_kernels.sublayers.products). Saved for the backward: x, context, the weights, and
what `keep` names:

    mode         saves                                     bytes (16 bits)   recomputed in backward
    nothing      -                                                           q, attention
    attention    attention: output, log-sum-exp            2 L C + 4 L H     q
    projections  and projections: q, k before norm, v      4 L C + 4 S C     norms
    all          and queries: q, 1/rms                     6 L C + 4 S C     norm of k

attention is saved once more for an image.
"""

from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.attention.op import attend, attend_backward
from prfl_kernels.dispatch import record
from prfl_kernels.jit import wide
from prfl_kernels.qk_norm_rope.op import rms_backward, rms_forward
from prfl_kernels.sublayers import checks
from prfl_kernels.sublayers.operation import Operation, Shape, tensors
from prfl_kernels.sublayers.products import (
    AttentionWeights,
    LowRank,
    Product,
    flattened,
    linear,
    low_rank_names,
    low_ranks,
    saved_names,
)

KEEP = {
    "nothing": (),
    "attention": ("attention",),
    "projections": ("attention", "projections"),
    "all": ("attention", "projections", "queries"),
}


class ImageWeights(NamedTuple):
    """The projections of the image tokens."""

    k: Tensor
    k_bias: Tensor
    v: Tensor
    v_bias: Tensor
    norm_k: Tensor


UPDATED = ("q", "k", "v", "o", "k_img", "v_img")
"""The weights that may have a low-rank update."""

# x [B, L, C], context [B, S, C]; weights as in AttentionWeights and ImageWeights, updates as in LowRank.
Inputs = NamedTuple("Inputs", tensors(
    ("x", "context", *AttentionWeights._fields), (*checks.IMAGE, *low_rank_names(UPDATED))
))  # fmt: skip


class Settings(NamedTuple):
    """What is not a tensor; `repeats` is how many times the last text token counts."""

    image_tokens: int
    num_heads: int
    eps: float
    dtype: torch.dtype
    repeats: int
    factors: tuple[float, float, float, float, float, float]  # of the updates, as UPDATED names them


# y; then what is saved if asked for: output [B, L, H, D] and log-sum-exp [B, H, L] of attention to each part,
# queries [B, L, C] and keys [B, S, C] before their norm, values, queries after their norm, 1/rms [1, B, L].
KEPT = {
    "attention": ("out", "lse", "out_img", "lse_img"),
    "projections": ("q_in", "k_in", "v_in", "k_in_img", "v_in_img"),
    "queries": ("q_normed", "rstd"),
}
RESULTS = ("y?", *sum(KEPT.values(), ()))
WANTS = {
    "x": ("x",), "context": ("context",), "norm_q": ("norm_q",), "norm_k": ("norm_k",),
    "norm_k_img": ("norm_k_img",), **{name: (name, f"{name}_bias") for name in UPDATED},
    **{f"low_{name}": (f"{name}_down", f"{name}_up") for name in UPDATED},
}  # fmt: skip


# The weights of the text's and of the image's keys and values, by the end of their names.
_WEIGHTS = {"": attrgetter(*ImageWeights._fields), "_img": attrgetter(*checks.IMAGE)}


class _Keys(NamedTuple):
    """One part of the context, with its projections [B, S, C]."""

    end: str  # of the names of its weights and results
    tokens: Tensor
    repeats: int  # of the last token
    weights: ImageWeights
    before: Tensor  # keys before the norm
    rstd: Tensor
    k: Tensor
    v: Tensor


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms(x) [B, L, C], 1/rms [1, B, L])."""
    return rms_forward(record("rms_norm", x).forward, x, weight, eps)


def _updates(inputs: Inputs, settings: Settings) -> dict[str, LowRank | None]:
    return dict(zip(UPDATED, low_ranks(inputs, UPDATED, settings.factors), strict=True))


def _keys(inputs: Inputs, settings: Settings, low: dict[str, LowRank | None], saved=None) -> list[_Keys]:
    """The parts of the context, the text first; their projections are recomputed where they are not saved."""
    context, n = inputs.context, settings.image_tokens
    parts = [("", context, settings.repeats)]
    if n:
        parts = [("", context[:, n:], settings.repeats), ("_img", context[:, :n], 1)]
    made = []
    for end, tokens, repeats in parts:
        tokens = tokens.to(settings.dtype)
        w = ImageWeights._make(_WEIGHTS[end](inputs))
        if saved is not None and saved.k_in.numel():
            before, v = getattr(saved, f"k_in{end}"), getattr(saved, f"v_in{end}")
        else:
            before = linear(tokens, w.k, w.k_bias, low[f"k{end}"])
            v = linear(tokens, w.v, w.v_bias, low[f"v{end}"])
        k, rstd = _normed(before, w.norm_k, settings.eps)
        made.append(_Keys(end, tokens, repeats, w, before, rstd, k, v))
    return made


def _heads(x: Tensor, settings: Settings) -> Tensor:
    return x.unflatten(2, (settings.num_heads, -1))


def _attended(q: Tensor, keys: list[_Keys], settings: Settings) -> dict[str, Tensor]:
    """Output and log-sum-exp of every part."""
    q, made = _heads(q, settings), {}
    for part in keys:
        made[f"out{part.end}"], made[f"lse{part.end}"] = attend(
            q, _heads(part.k, settings), _heads(part.v, settings), part.repeats
        )
    return made


def _total(attended: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """The sum of the parts' outputs [B, L, C]."""
    out = attended["out"]
    return (out + attended["out_img"] if settings.image_tokens else out).flatten(2)


def _shapes(inputs: Inputs, settings: Settings) -> dict[str, Shape | None]:
    batch, length, width = inputs.x.shape
    dtype, image = settings.dtype, settings.image_tokens
    rows, out, lse = checks.attention_shapes(inputs.x, settings)
    text = (batch, inputs.context.shape[1] - image, width), dtype
    picture = ((batch, image, width), dtype) if image else None
    return {
        "y": rows, "out": out, "lse": lse,
        "out_img": out if image else None, "lse_img": lse if image else None,
        "q_in": rows, "k_in": text, "v_in": text, "k_in_img": picture, "v_in_img": picture,
        "q_normed": rows, "rstd": ((1, batch, length), wide(dtype)),
    }  # fmt: skip


def _forward(inputs: Inputs, settings: Settings, saves) -> dict[str, Tensor]:
    results, low = {}, _updates(inputs, settings)
    q_in = linear(inputs.x.to(settings.dtype), inputs.q, inputs.q_bias, low["q"])
    q, rstd = _normed(q_in, inputs.norm_q, settings.eps)
    keys = _keys(inputs, settings, low)
    if saves.projections:
        results["q_in"] = q_in
        results |= {f"k_in{part.end}": part.before for part in keys}
        results |= {f"v_in{part.end}": part.v for part in keys}
    del q_in
    attended = _attended(q, keys, settings)
    del keys
    if saves.queries:
        results |= {"q_normed": q, "rstd": rstd}
    del q, rstd
    a = _total(attended, settings)
    if saves.attention:
        results |= attended
    del attended
    results["y"] = linear(a, inputs.o, inputs.o_bias, low["o"])
    return results


def _save(inputs: Inputs, results) -> tuple[Inputs, NamedTuple]:
    return inputs, results._replace(y=None)


def _backward(dy: Tensor, inputs: Inputs, saved, settings: Settings, wants) -> dict[str, Tensor]:
    made, low = {}, _updates(inputs, settings)
    products = {k: Product(low[k], getattr(wants, k), getattr(wants, f"low_{k}")) for k in UPDATED}
    n, d = inputs.x.to(settings.dtype), dy.to(settings.dtype)
    q_in, q, rstd = saved.q_in, saved.q_normed, saved.rstd
    if not q_in.numel():
        q_in = linear(n, inputs.q, inputs.q_bias, low["q"])
    if not rstd.numel():
        q, rstd = _normed(q_in, inputs.norm_q, settings.eps)
    keys = _keys(inputs, settings, low, saved)
    attended = saved._asdict() if saved.lse.numel() else _attended(q, keys, settings)
    a = _total(attended, settings) if products["o"].trained else None
    da = _heads(products["o"].backward(d, a, inputs.o).view(d.shape), settings)
    del a, d
    q = _heads(q, settings)
    wants_q, dq, dcontext = wants.x or products["q"].trained or wants.norm_q, None, []
    for part in keys:
        trained = products[f"k{part.end}"].trained or products[f"v{part.end}"].trained
        wants_kv = wants.context or trained or getattr(wants, f"norm_k{part.end}")
        more, dk, dv = attend_backward(
            da, q, _heads(part.k, settings), _heads(part.v, settings), attended[f"out{part.end}"],
            attended[f"lse{part.end}"], wants_q, wants_kv, part.repeats,
        )  # fmt: skip
        dq = more if dq is None else dq + more
        if wants_kv:
            dcontext.append(_keys_backward(dk.flatten(2), dv.flatten(2), part, products, wants, made))
    del da, q, attended, more
    if wants_q:
        fill = record("rms_norm", q_in).backward
        dq, dnorm = rms_backward(fill, dq.flatten(2), q_in, inputs.norm_q, rstd, wants.norm_q)
        if wants.norm_q:
            made["norm_q"] = dnorm
        dx = products["q"].backward(dq, n, inputs.q, wants_x=wants.x)
        if wants.x:
            made["x"] = dx.view(n.shape)
    if wants.context:
        made["context"] = torch.cat(dcontext[::-1], dim=1)  # the image comes first
    for name, product in products.items():
        made |= product.gradients(name)
    return made


def _keys_backward(dk, dv, part: _Keys, products, wants, made: dict[str, Tensor]) -> Tensor | None:
    """Gradient of the tokens of one part, if asked for; those of its weights go into `products` and
    `made`."""
    w, end = part.weights, part.end
    wants_norm = getattr(wants, f"norm_k{end}")
    fill = record("rms_norm", part.before).backward
    dk, dnorm = rms_backward(fill, dk, part.before, w.norm_k, part.rstd, wants_norm)
    if wants_norm:
        made[f"norm_k{end}"] = dnorm
    dtokens = products[f"k{end}"].backward(dk, part.tokens, w.k, wants_x=wants.context)
    dtokens = products[f"v{end}"].backward(dv, part.tokens, w.v, dtokens, wants_x=wants.context)
    return dtokens if dtokens is None else dtokens.view(part.tokens.shape)


_OPERATION = Operation(
    "cross_attention", Inputs, Settings, RESULTS, KEPT, WANTS, checks.cross_attention, _shapes,
    _forward, _save, _backward,
)  # fmt: skip


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
    low: Mapping[str, LowRank] | None = None,
) -> Tensor:
    """The sublayer's output y [B, L, C] in dtype, to be added to the residual stream.

    x [B, L, C] is the normed residual stream, context [B, S, C]; with `image` its first image_tokens tokens
    are those of an image, and its last text token counts `repeats` times. Products and attention run in dtype
    (x.dtype if None). keep is a mode of KEEP or some of the names it stands for; without gradient nothing is
    saved. low holds low-rank updates of some of UPDATED. Raises ValueError for another `keep`, or names in
    `low`, for repeats below 1, and for image tokens without their weights or weights without tokens.
    """
    names = saved_names("cross_attention", KEEP, keep)
    lows, factors = flattened("cross_attention", low, UPDATED)
    inputs = Inputs(x, context, *weights, *(image or (None,) * len(ImageWeights._fields)), *lows)
    graded = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs)
    settings = Settings(image_tokens, num_heads, eps, dtype or x.dtype, repeats, factors)
    return _OPERATION.call(*inputs, *settings, [graded and name in names for name in KEPT])[0]
