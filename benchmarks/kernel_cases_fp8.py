"""The operations on e4m3 values, as entries of kernel_cases: gated against float64 by what they stand for."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_bench.kernel_cases import (
    EPS,
    Entry,
    added,
    attention_flops,
    attention_plain,
    normed,
    qk_inputs,
    qk_plain,
    qkv,
    sdpa,
    with_angles,
)
from prfl_bench.shapes import Shape
from prfl_kernels.attention.fp8 import _natural, attention_fp8, attention_fp8_reference, quantize_values
from prfl_kernels.fp8.linear import fp8_linear, quantize_weight
from prfl_kernels.fp8.quantize import quantize_fp8
from prfl_kernels.jit import wide
from prfl_kernels.norm.gated_add import gated_add_modulate_fp8, gated_add_norm_fp8
from prfl_kernels.norm.op import modulate_fp8
from prfl_kernels.qk_norm_rope.op import qk_norm_rope_fp8


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values, and scales [...], of x [..., C]."""
    scale = x.float().abs().amax(-1) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def _modulate_fp8() -> Entry:
    return Entry(
        "modulate_fp8", "modulate",
        lambda s: [s.residual_rows(), s.modulation(), s.modulation()],
        lambda s, *inputs: modulate_fp8(*inputs, EPS),
        lambda s, *inputs: _quantized(normed(*inputs, 1.0, torch.float32)),
        exact=lambda s, *inputs: normed(*inputs, 1.0, s.dtype),
        decode=lambda n, scale: [n.double() * scale[..., None]],
    )  # fmt: skip


def _gated_norm_fp8(name: str, call: Callable, vector: Callable, base: float) -> Entry:
    def plain(s, x, y, gate, scale, shift):
        x = added(x, y, gate)
        return x, *_quantized(normed(x, scale, shift, base, torch.float32))

    def exact(s, x, y, gate, scale, shift):
        x = added(x, y, gate)
        return x, normed(x, scale, shift, base, s.dtype)

    return Entry(
        f"{name}_fp8", name,
        lambda s: [s.residual_rows(), s.rows(), s.modulation(), vector(s), vector(s)],
        lambda s, *inputs: call(*inputs, EPS),
        plain,
        exact=exact,
        decode=lambda x, n, scale: [x, n.double() * scale[..., None]],
    )  # fmt: skip


def _quantize_fp8(gelu: bool) -> Entry:
    """What comes out of attention, or out of the FFN's first product, as rows of e4m3."""

    def values(s, x):
        return F.gelu(x.to(wide(x.dtype)), approximate="tanh") if gelu else x

    return Entry(
        "quantize_fp8" + ", gelu" * gelu, "quantize_fp8",
        lambda s: [s.normal(s.batch, s.length, s.model.ffn if gelu else s.model.width, dtype=s.dtype)],
        lambda s, x: quantize_fp8(x, gelu),
        lambda s, x: _quantized(values(s, x)),
        exact=values,
        decode=lambda out, scale: [out.double() * scale[..., None]],
    )  # fmt: skip


def _qk_norm_rope_fp8() -> Entry:
    def plain(s, q, k, *rest):
        (q, scale_q), (k, scale_k) = map(_quantized, qk_plain(s, q.float(), k.float(), *rest))
        return q, k, scale_q, scale_k

    return Entry(
        "qk_norm_rope_fp8", "qk_norm_rope", qk_inputs,
        lambda s, *inputs: qk_norm_rope_fp8(*inputs, s.grid, s.model.heads, EPS, s.offset),
        plain,
        prepare=with_angles,
        exact=qk_plain,
        decode=lambda q, k, *scales: [
            a.double() * scale[..., None] for a, scale in zip((q, k), scales, strict=True)
        ],
    )  # fmt: skip


def _attention_fp8(kind: str) -> Entry:
    """Beside attention in dtype on the same values."""
    cross = kind == "cross"

    def inputs(s):
        q, k, v = qkv(s, cross)
        return [*_quantized(q), *_quantized(k), *quantize_values(v)]

    def values(s, q, q_scale, k, k_scale, v, v_scale):
        v = _natural(v.to(s.dtype))[..., : k.shape[1]] * v_scale[..., None]
        return [(a.to(s.dtype) * b[..., None]).to(s.dtype) for a, b in ((q, q_scale), (k, k_scale))] + [
            v.permute(0, 3, 1, 2).to(s.dtype).contiguous()
        ]

    return Entry(
        f"attention_fp8, {kind}", "attention_fp8", inputs,
        lambda s, *inputs: attention_fp8(*inputs)[0],
        attention_plain,
        flops=partial(attention_flops, cross),
        rate="fp8",
        divided="heads",
        prepare=values,
        peers={"sdpa": sdpa},
        yardstick=lambda s, *inputs: attention_fp8_reference(*inputs, s.head_dim**-0.5)[0].bfloat16(),
    )  # fmt: skip


def _fp8_linear() -> Entry:
    """The FFN's first projection, beside the linear layer in dtype on the same values."""

    def inputs(s):
        weight = s.normal(s.model.ffn, s.model.width) * s.model.width**-0.5
        return [*_quantized(s.rows()), *quantize_weight(weight), s.normal(s.model.ffn)]

    def values(s, x, x_scale, w, w_scale, bias):
        pairs = (x, x_scale), (w, w_scale)
        return [*((a.to(s.dtype) * b[..., None]).to(s.dtype) for a, b in pairs), bias.to(s.dtype)]

    return Entry(
        "fp8_linear", "fp8_linear", inputs,
        lambda s, *inputs: fp8_linear(*inputs, s.dtype),
        lambda s, *inputs: F.linear(*inputs),
        flops=lambda s: (2 * s.batch * s.length * s.model.width * s.model.ffn, 0),
        rate="fp8",
        prepare=values,
    )  # fmt: skip


ENTRIES = (
    _modulate_fp8(),
    _gated_norm_fp8("gated_add_modulate", gated_add_modulate_fp8, Shape.modulation, 1.0),
    _gated_norm_fp8("gated_add_norm", gated_add_norm_fp8, Shape.vector, 0.0),
    _quantize_fp8(gelu=False),
    _quantize_fp8(gelu=True),
    _qk_norm_rope_fp8(),
    _fp8_linear(),
    _attention_fp8("self"),
    _attention_fp8("cross"),
)
