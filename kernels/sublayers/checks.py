"""The checks of the fused branches, `modulated_attention`, `modulated_ffn` and `cross_attention`, and of the
backward form of each, of the arguments of its schema."""

from collections.abc import Sequence

import torch
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
from prfl_kernels.jit import wide
from prfl_kernels.sublayers.chunks import check_chunk

Held = dict[str, tuple[Tensor, Sequence[int], torch.dtype]]  # name: (tensor, shape, dtype)


def _vectors(op: str, x: Tensor, **vectors: Tensor) -> None:
    for name, a in vectors.items():
        expect(op, name, a, (x.shape[0], x.shape[2]), x)


def _linear(
    op: str, name: str, weight: Tensor, bias: Tensor, outputs: int, inputs: int, x: Tensor
) -> None:
    expect_matrix(op, name, weight, (outputs, inputs), x)
    expect(op, f"{name}_bias", bias, (outputs,), x)


def _both(op: str, names: Sequence[str], given: Sequence[Tensor | None]) -> bool:
    """Whether all are given; ValueError for some of them."""
    there = [name for name, a in zip(names, given, strict=True) if a is not None]
    if there and len(there) < len(names):
        raise ValueError(f"{op}: got {', '.join(there)} alone, want all or none of {', '.join(names)}")
    return bool(there)


def _update(
    op: str, name: str, low: Sequence[Tensor | None], outputs: int, inputs: int, x: Tensor
) -> None:
    """A low-rank update (A [r, K], B [N, r]) of a weight [N, K], or none."""
    names = f"{name}_down", f"{name}_up"
    if _both(op, names, low):
        down, up = low
        rank = down.shape[0] if down.dim() == 2 else 1
        expect(op, names[0], down, (rank, inputs), x)
        expect(op, names[1], up, (outputs, rank), x)


def _held(op: str, group: Held, x: Tensor) -> None:
    """Tensors that a forward keeps together, or that are all left out, each as an empty tensor [0]."""
    if any(a.shape != (0,) for a, _, _ in group.values()):
        for name, (a, shape, dtype) in group.items():
            expect(op, name, a, shape, x, dtype)


# -- modulated_attention


def _self_attention(op, x, shift, scale, gate, weights, weight, lows, settings) -> None:
    grid, num_heads, _, offset, dtype, factors, chunk = settings
    _, length, width = expect_rows(op, "x", x)
    _vectors(op, x, shift=shift, scale=scale, gate=gate)
    for i, name in enumerate("qkvo"):
        _linear(op, name, *weights[2 * i : 2 * i + 2], width, width, x)
        _update(op, name, lows[2 * i : 2 * i + 2], width, width, x)
    for name, a in zip(("norm_q", "norm_k", "weight"), (*weights[8:], weight), strict=True):
        if a is not None:
            expect(op, name, a, (width,), x)
    expect_places(op, grid, num_heads, offset, length, width)
    expect_float(op, "dtype", dtype)
    expect_length(op, "factors", factors, 4)
    check_chunk(chunk)


def _attended(x: Tensor, num_heads: int, dtype: torch.dtype, out: Tensor, lse: Tensor, end: str = "") -> Held:
    batch, length, width = x.shape
    return {
        f"out{end}": (out, (batch, length, num_heads, width // num_heads), dtype),
        f"lse{end}": (lse, (batch, num_heads, length), wide(dtype)),
    }


def modulated_attention(x, shift, scale, gate, *rest):
    op = "modulated_attention"
    weights, (weight, bias), lows, given, settings = (
        rest[:10], rest[10:12], rest[12:20], rest[20:22], rest[22:29],
    )  # fmt: skip
    _self_attention(op, x, shift, scale, gate, weights, weight, lows, settings)
    if _both(op, ("weight", "bias"), (weight, bias)):
        expect(op, "bias", bias, weight.shape, x)
    if _both(op, ("given_out", "given_lse"), given):
        _held(op, _attended(x, settings[1], settings[4], *given), x)
    expect_length(op, "keep", rest[29], 4)


def modulated_attention_backward(dout, dn, x, total, shift, scale, gate, *rest):
    op = "modulated_attention_backward"
    weights, lows, (weight, next_stats, stats), settings = rest[:10], rest[10:18], rest[18:21], rest[30:37]
    out, lse, q_in, k_in, v, q, k, rstd, n = rest[21:30]
    _self_attention(op, x, shift, scale, gate, weights, weight, lows, settings)
    rows, dtype = x.shape, settings[4]
    numbers, f32 = (2, *rows[:2]), wide(x.dtype)
    expect(op, "dout", dout, rows, x)
    expect(op, "stats", stats, numbers, x, f32)
    if _both(op, ("dn", "weight"), (dn, weight)):
        expect(op, "dn", dn, rows, x)
        expect(op, "total", total, rows, x, x.dtype)
        expect(op, "next_stats", next_stats, numbers, x, f32)
    attended = _attended(x, settings[1], dtype, out, lse)
    _held(op, attended, x)
    heads = attended["out"][1]
    _held(op, {"q_in": (q_in, rows, dtype), "k_in": (k_in, rows, dtype), "v_in": (v, rows, dtype)}, x)
    turned = {"q_rotated": (q, heads, dtype), "k_rotated": (k, heads, dtype)}
    _held(op, {**turned, "rstd": (rstd, numbers, wide(dtype))}, x)
    _held(op, {"n": (n, rows, dtype)}, x)
    expect_length(op, "wants", rest[37], 12)


# -- modulated_ffn


def _ffn(op, name, x, shift, scale, gate, weights, lows, settings) -> None:
    factors, _, dtype, chunk = settings
    width = expect_rows(op, name, x)[2]
    _vectors(op, x, shift=shift, scale=scale, gate=gate)
    w1, b1, w2, b2 = weights
    hidden = expect_rank(op, "w1", w1, "F, C")[0]
    if hidden < 1:
        raise ValueError(f"{op}: got w1 {list(w1.shape)}, want [F, {width}] with F > 0")
    _linear(op, "w1", w1, b1, hidden, width, x)
    _linear(op, "w2", w2, b2, width, hidden, x)
    _update(op, "w1", lows[:2], hidden, width, x)
    _update(op, "w2", lows[2:], width, hidden, x)
    expect_float(op, "dtype", dtype)
    expect_length(op, "factors", factors, 2)
    check_chunk(chunk)


def modulated_ffn(x, y, shift, scale, gate, *rest):
    op = "modulated_ffn"
    _ffn(op, "x", x, shift, scale, gate, rest[:4], rest[4:8], rest[8:12])
    if y is not None:
        expect(op, "y", y, x.shape, x)


def modulated_ffn_backward(dout, s, shift, scale, gate, *rest):
    op = "modulated_ffn_backward"
    weights, (stats, h, n), settings, (y_dtype, wants) = rest[:4], rest[8:11], rest[11:15], rest[15:]
    _ffn(op, "s", s, shift, scale, gate, weights, rest[4:8], settings)
    expect(op, "dout", dout, s.shape, s)
    expect(op, "stats", stats, (2, *s.shape[:2]), s, wide(s.dtype))
    _held(op, {"h": (h, (*s.shape[:2], weights[0].shape[0]), settings[2])}, s)
    _held(op, {"n": (n, s.shape, settings[2])}, s)
    if y_dtype is not None:
        expect_float(op, "y_dtype", y_dtype)
    expect_length(op, "wants", wants, 6)


# -- cross_attention


def _cross(op, x, context, weights, image, settings) -> tuple[int, int]:
    """The numbers of text and image tokens."""
    image_tokens, num_heads, _, dtype, repeats = settings
    batch, _, width = expect_rows(op, "x", x)
    tokens = expect_rank(op, "context", context, "B, S, C")[1]
    expect(op, "context", context, (batch, tokens, width), x)
    for i, name in enumerate("qkvo"):
        _linear(op, name, *weights[2 * i : 2 * i + 2], width, width, x)
    for name, a in zip(("norm_q", "norm_k"), weights[8:], strict=True):
        expect(op, name, a, (width,), x)
    names = ("k_img", "k_bias_img", "v_img", "v_bias_img", "norm_k_img")
    if _both(op, names, image) != (image_tokens != 0):
        there = "without" if image_tokens else "with"
        raise ValueError(f"{op}: got {image_tokens} image tokens {there} their weights, want both or neither")
    if image_tokens:
        shapes = ((width, width), (width,), (width, width), (width,), (width,))
        for name, a, shape in zip(names, image, shapes, strict=True):
            (expect_matrix if len(shape) == 2 else expect)(op, name, a, shape, x)
    if not 0 <= image_tokens < tokens:
        got = f"{image_tokens} image tokens in a context of {tokens}"
        raise ValueError(f"{op}: got {got}, want at least one text token after them")
    expect_heads(op, width, num_heads)
    expect_float(op, "dtype", dtype)
    if repeats < 1:
        raise ValueError(f"{op}: got {repeats} repeats of the last key, want at least 1")
    return tokens - image_tokens, image_tokens


def cross_attention(x, context, *rest):
    _cross("cross_attention", x, context, rest[:10], rest[10:15], rest[15:20])
    expect_length("cross_attention", "keep", rest[20], 3)


def cross_attention_backward(dy, x, context, *rest):
    op, settings = "cross_attention_backward", rest[26:31]
    text, image = _cross(op, x, context, rest[:10], rest[10:15], settings)
    out, lse, out_img, lse_img, q_in, k_in, v_in, k_img_in, v_img_in, q, rstd = rest[15:26]
    num_heads, dtype = settings[1], settings[3]
    batch, length, width = rows = x.shape
    expect(op, "dy", dy, rows, x)
    attended, keys = _attended(x, num_heads, dtype, out, lse), (batch, text, width)
    projected = {"q_in": (q_in, rows, dtype), "k_in": (k_in, keys, dtype), "v_in": (v_in, keys, dtype)}
    if image:
        attended |= _attended(x, num_heads, dtype, out_img, lse_img, "_img")
        keys = (batch, image, width)
        projected |= {"k_img_in": (k_img_in, keys, dtype), "v_img_in": (v_img_in, keys, dtype)}
    _held(op, attended, x)
    _held(op, projected, x)
    queries = {"q_normed": (q, rows, dtype), "rstd": (rstd, (1, batch, length), wide(dtype))}
    _held(op, queries, x)
    expect_length(op, "wants", rest[31], 11)
