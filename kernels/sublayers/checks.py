"""The checks of the sublayers: inputs and settings, in the backward (`saved` is given) too."""

import math
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from prfl_kernels.checks import (
    expect,
    expect_float,
    expect_heads,
    expect_length,
    expect_matrix,
    expect_places,
    expect_rank,
    expect_rows,
)
from prfl_kernels.exchange import is_group
from prfl_kernels.jit import wide
from prfl_kernels.norm.op import check_boundary
from prfl_kernels.sublayers.chunks import check_chunk
from prfl_kernels.sublayers.operation import Shape

IMAGE = ("k_img", "k_img_bias", "v_img", "v_img_bias", "norm_k_img")
"""The weights of the image tokens, inputs of cross_attention."""


def _vectors(op: str, inputs, settings) -> None:
    (batch, _, width), x = inputs.x.shape, inputs.x
    shape = (batch, 2, width) if inputs.shift.dim() == 3 else (batch, width)
    for name in ("shift", "scale", "gate"):
        expect(op, name, getattr(inputs, name), shape, x)
    check_boundary(op, x, settings.boundary, inputs.shift)


def _linear(op: str, inputs, name: str, outputs: int, width: int) -> None:
    """Weight [N, K] and bias [N] of this name, and its update (A [r, K], B [N, r]) or none."""
    x, (bias, *names) = inputs.x, _names(name)
    expect_matrix(op, name, getattr(inputs, name), (outputs, width), x)
    expect(op, bias, getattr(inputs, bias), (outputs,), x)
    if _all(op, names, low := [getattr(inputs, k) for k in names]):
        down, up = low
        rank = down.shape[0] if down.dim() == 2 else 1
        expect(op, names[0], down, (rank, width), x)
        expect(op, names[1], up, (outputs, rank), x)


@cache
def _names(weight: str) -> tuple[str, str, str]:
    return f"{weight}_bias", f"{weight}_down", f"{weight}_up"


def _all(op: str, names: Sequence[str], given: Sequence[Tensor | None]) -> bool:
    """Whether all are given; ValueError for some of them."""
    there = [name for name, a in zip(names, given, strict=True) if a is not None]
    if there and len(there) < len(names):
        raise ValueError(f"{op}: got {', '.join(there)} alone, want all or none of {', '.join(names)}")
    return bool(there)


def attention_shapes(x: Tensor, settings, parts: Sequence[int] = ()) -> tuple[Shape, Shape, Shape]:
    """Shape and dtype of rows [B, L, C], of attention's output [B, L, H, D] and its log-sum-exp [B, H, L];
    that is [B, H / P, sum of parts] of a sequence cut into P parts."""
    (batch, length, width), heads, dtype = x.shape, settings.num_heads, settings.dtype
    out, lse = (batch, length, heads, width // heads), (batch, heads, length)
    if parts:
        lse = batch, heads // len(parts), sum(parts)
    return ((batch, length, width), dtype), (out, dtype), (lse, wide(dtype))


def exchanged(heads: Shape, settings) -> Shape:
    """Shape and dtype of [B, L, H, D] after an exchange: all tokens of the heads of one rank."""
    (batch, _, count, width), dtype = heads
    return (batch, sum(settings.parts), count // len(settings.parts), width), dtype


def modulated_attention(op, inputs, settings, saved):
    """ValueError where an argument of modulated_attention or, if saved is given, its backward is wrong."""
    x, weight = inputs.x, inputs.weight
    _, length, width = expect_rows(op, "x", x)
    _vectors(op, inputs, settings)
    for name in "qkvo":
        _linear(op, inputs, name, width, width)
    for name in ("norm_q", "norm_k"):
        expect(op, name, getattr(inputs, name), (width,), x)
    if _all(op, ("weight", "bias"), (weight, inputs.bias)):
        expect(op, "weight", weight, (width,), x)
        expect(op, "bias", inputs.bias, (width,), x)
    expect_places(op, settings.grid, settings.num_heads, settings.offset, length, width)
    expect_float(op, "dtype", settings.dtype)
    expect_length(op, "factors", settings.factors, 4)
    check_chunk(settings.chunk)
    if any((settings.parts, settings.group, settings.far, settings.far_group)):
        _cut(op, settings, length)
    given = inputs.given_out, inputs.given_lse
    if _all(op, ("given_out", "given_lse"), given):
        _, (out, dtype), (lse, lse_dtype) = attention_shapes(x, settings, settings.parts)
        expect(op, "given_out", given[0], out, x, dtype)
        expect(op, "given_lse", given[1], lse, x, lse_dtype)
    if saved is not None:
        _all(op, ("total", "weight"), (saved.total, weight))


def _cut(op: str, settings, length: int) -> None:
    parts, heads, tokens = settings.parts, settings.num_heads, math.prod(settings.grid)
    if not parts or not is_group(settings.group):
        got = f"{len(parts)} parts and group {settings.group!r}"
        raise ValueError(f"{op}: got {got}, want parts of a SequenceGroup, or no parts and no group")
    if heads % len(parts):
        raise ValueError(f"{op}: got {heads} heads for {len(parts)} ranks, want a multiple")
    whole = sum(settings.far) if settings.far else sum(parts)
    beside = sum(parts) in settings.far and is_group(settings.far_group)
    if not beside if settings.far else settings.far_group:
        got = f"parts {list(parts)} beside {list(settings.far)} of group {settings.far_group!r}"
        raise ValueError(f"{op}: got {got}, want the parts of one of a SequenceGroup's neighbourhoods")
    if whole != tokens or length not in parts:
        got = f"parts {list(parts)} and {length} tokens here"
        raise ValueError(f"{op}: got {got}, want the {tokens} of the grid, cut as x is")


def modulated_ffn(op, inputs, settings, saved):
    """ValueError where an argument of modulated_ffn or, if saved is given, its backward is wrong."""
    width = expect_rows(op, "x", inputs.x)[2]
    _vectors(op, inputs, settings)
    hidden = expect_rank(op, "w1", inputs.w1, "F, C")[0]
    if hidden < 1:
        raise ValueError(f"{op}: got w1 {list(inputs.w1.shape)}, want [F, {width}] with F > 0")
    _linear(op, inputs, "w1", hidden, width)
    _linear(op, inputs, "w2", width, hidden)
    if inputs.y is not None:
        expect(op, "y", inputs.y, inputs.x.shape if saved is None else (0,), inputs.x)
    expect_length(op, "factors", settings.factors, 2)
    expect_float(op, "dtype", settings.dtype)
    check_chunk(settings.chunk)


def cross_attention(op, inputs, settings, saved):
    """ValueError where an argument of cross_attention or, if saved is given, its backward is wrong."""
    x, image_tokens = inputs.x, settings.image_tokens
    batch, _, width = expect_rows(op, "x", x)
    tokens = expect_rank(op, "context", inputs.context, "B, S, C")[1]
    expect(op, "context", inputs.context, (batch, tokens, width), x)
    for name in "qkvo":
        _linear(op, inputs, name, width, width)
    for name in ("norm_q", "norm_k"):
        expect(op, name, getattr(inputs, name), (width,), x)
    if _all(op, IMAGE, [getattr(inputs, k) for k in IMAGE]) != (image_tokens != 0):
        there = "without" if image_tokens else "with"
        raise ValueError(f"{op}: got {image_tokens} image tokens {there} their weights, want both or neither")
    if image_tokens:
        for name in ("k_img", "v_img"):
            _linear(op, inputs, name, width, width)
        expect(op, "norm_k_img", inputs.norm_k_img, (width,), x)
    elif inputs.k_img_down is not None or inputs.v_img_down is not None:
        raise ValueError(f"{op}: got low-rank updates of k_img or v_img without their weights, want both")
    if not 0 <= image_tokens < tokens:
        got = f"{image_tokens} image tokens in a context of {tokens}"
        raise ValueError(f"{op}: got {got}, want at least one text token after them")
    expect_heads(op, width, settings.num_heads)
    expect_float(op, "dtype", settings.dtype)
    if settings.repeats < 1:
        raise ValueError(f"{op}: got {settings.repeats} repeats of the last key, want at least 1")
