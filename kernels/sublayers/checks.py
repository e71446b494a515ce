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
from prfl_kernels.sublayers.operation import Shape

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


def attention_shapes(x: Tensor, settings) -> tuple[Shape, Shape, Shape]:
    """Shape and dtype of rows [B, L, C], of attention's output [B, L, H, D] and its log-sum-exp [B, H, L]."""
    (batch, length, width), heads, dtype = x.shape, settings.num_heads, settings.dtype
    out = (batch, length, heads, width // heads), dtype
    return ((batch, length, width), dtype), out, ((batch, heads, length), wide(dtype))


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


def modulated_ffn(op, inputs, settings, saved):
    width = expect_rows(op, "x", inputs.x)[2]
    _vectors(op, inputs.x, shift=inputs.shift, scale=inputs.scale, gate=inputs.gate)
    hidden = expect_rank(op, "w1", inputs.w1, "F, C")[0]
    if hidden < 1:
        raise ValueError(f"{op}: got w1 {list(inputs.w1.shape)}, want [F, {width}] with F > 0")
    _linear(op, "w1", inputs.w1, inputs.w1_bias, hidden, width, inputs.x)
    _linear(op, "w2", inputs.w2, inputs.w2_bias, width, hidden, inputs.x)
    _update(op, "w1", (inputs.w1_down, inputs.w1_up), hidden, width, inputs.x)
    _update(op, "w2", (inputs.w2_down, inputs.w2_up), width, hidden, inputs.x)
    if inputs.y is not None:
        expect(op, "y", inputs.y, inputs.x.shape if saved is None else (0,), inputs.x)
    expect_length(op, "factors", settings.factors, 2)
    expect_float(op, "dtype", settings.dtype)
    check_chunk(settings.chunk)


# -- cross_attention


def cross_attention(op, inputs, settings, saved):
    x, image_tokens = inputs.x, settings.image_tokens
    batch, _, width = expect_rows(op, "x", x)
    tokens = expect_rank(op, "context", inputs.context, "B, S, C")[1]
    expect(op, "context", inputs.context, (batch, tokens, width), x)
    for name in "qkvo":
        _linear(op, name, getattr(inputs, name), getattr(inputs, f"{name}_bias"), width, width, x)
    for name in ("norm_q", "norm_k"):
        expect(op, name, getattr(inputs, name), (width,), x)
    image = {name: a for name, a in inputs._asdict().items() if name.endswith("_img")}
    if _both(op, list(image), list(image.values())) != (image_tokens != 0):
        there = "without" if image_tokens else "with"
        raise ValueError(f"{op}: got {image_tokens} image tokens {there} their weights, want both or neither")
    if image_tokens:
        for name, a in image.items():
            matrix = name in ("k_img", "v_img")
            (expect_matrix if matrix else expect)(op, name, a, (width, width) if matrix else (width,), x)
    if not 0 <= image_tokens < tokens:
        got = f"{image_tokens} image tokens in a context of {tokens}"
        raise ValueError(f"{op}: got {got}, want at least one text token after them")
    expect_heads(op, width, settings.num_heads)
    expect_float(op, "dtype", settings.dtype)
    if settings.repeats < 1:
        raise ValueError(f"{op}: got {settings.repeats} repeats of the last key, want at least 1")
