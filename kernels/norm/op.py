"""LayerNorm with timestep modulation, and the affine LayerNorm before cross-attention.

    modulate(x, scale, shift)   = LN(x) * (1 + scale) + shift      x [B, L, C], scale and shift [B, C]
    layer_norm(x, weight, bias) = LN(x) * weight + bias            weight and bias [C]
    modulate_fp8(x, scale, shift) = the same as e4m3 values and one float32 scale a token

The statistics and the affine part are computed in float32 (float64 for float64 input) whatever
the dtype of x; the result is rounded once, to out_dtype. Saved for the backward: x, scale, and mean
and 1/std of every token. Source: Peebles and Xie, "Scalable Diffusion Models with Transformers"
(adaLN); Wan2.1 uses eps 1e-6 in every block.
"""

import torch
from torch import Tensor

from prfl_kernels.checks import checked, expect, expect_float, expect_rows
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.jit import register, wide
from prfl_kernels.norm import triton_kernels as add_norm


def _name(base: float) -> str:
    return "modulate" if base else "layer_norm"


def _pair(x: Tensor, base: float):
    return add_norm.pair(_name(base), x)


def _check(x, scale, shift, base, eps, out_dtype):
    op = _name(base)
    expect_rows(op, "x", x)
    add_norm.check_affine(op, x, (scale, shift), base)
    expect_float(op, "out_dtype", out_dtype)


def _forward(x, scale, shift, base, eps, out_dtype):
    _, n, _, stats = _pair(x, base)[0](x, None, None, scale, shift, base, eps, out_dtype)
    return n, stats


def _forward_fake(x, scale, shift, base, eps, out_dtype):
    stats = x.new_empty(2, *x.shape[:2], dtype=wide(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), stats


def _check_backward(dn, x, scale, stats, base, parameters):
    op = f"{_name(base)}_backward"
    shape = expect_rows(op, "x", x)
    expect(op, "dn", dn, shape, x)
    add_norm.check_affine(op, x, (scale,), base)
    expect(op, "stats", stats, (2, *shape[:2]), x, wide(x.dtype))


def _backward(dn, x, scale, stats, base, parameters):
    dx, _, _, dscale, dshift = _pair(x, base)[1](
        dn, None, x, None, None, scale, stats.contiguous(), base, parameters, None
    )
    if not parameters:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, dscale.to(scale.dtype), dshift.to(scale.dtype)


def _backward_fake(dn, x, scale, stats, base, parameters):
    like = scale.new_empty(scale.shape) if parameters else x.new_empty(0)
    return x.new_empty(x.shape), like, torch.empty_like(like)


def _setup_context(ctx, inputs, output):
    x, scale, _, ctx.base, _, _ = inputs
    ctx.save_for_backward(x, scale, output[1])


def _gradient(ctx, dn, _):
    x, scale, stats = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[1:3])
    dx, dscale, dshift = torch.ops.prfl.modulate_backward(dn, x, scale, stats, ctx.base, parameters)
    if not parameters:
        dscale = dshift = None
    return dx, dscale, dshift, None, None, None


def _check_quantized(x, scale, shift, eps):
    expect_rows("modulate_fp8", "x", x)
    add_norm.check_affine("modulate_fp8", x, (scale, shift), 1.0)


def _quantized(x, scale, shift, eps):
    run = add_norm.pair("modulate", x, fp8=True)[0]
    _, n, quant, _ = run(x, None, None, scale, shift, 1.0, eps, E4M3)
    return n, quant


def _quantized_fake(x, scale, shift, eps):
    rows = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=E4M3), rows


register(
    "modulate(Tensor x, Tensor scale, Tensor shift, float base, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    *checked(_check, _forward, _forward_fake),
    _gradient,
    _setup_context,
)
register(
    "modulate_backward(Tensor dn, Tensor x, Tensor scale, Tensor stats, float base, bool parameters)"
    " -> (Tensor, Tensor, Tensor)",
    *checked(_check_backward, _backward, _backward_fake),
)
register(
    "modulate_fp8(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor)",
    *checked(_check_quantized, _quantized, _quantized_fake),
)


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * (1 + scale) + shift.

    x [B, L, C], C > 0; scale and shift [B, C], or [C] for every sample; all of any float dtype. Returns
    [B, L, C] in out_dtype (x.dtype if None). ValueError for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.prfl.modulate(x, scale, shift, 1.0, eps, out_dtype or x.dtype)[0]


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * weight + bias.

    x [B, L, C], C > 0; weight and bias [C], or [B, C] with a row for every sample; all of any float dtype.
    Returns [B, L, C] in out_dtype (x.dtype if None). ValueError for shapes, dtypes or devices that do not
    fit.
    """
    return torch.ops.prfl.modulate(x, weight, bias, 0.0, eps, out_dtype or x.dtype)[0]


def modulate_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """modulate as (e4m3 [B, L, C], float32 scales [B, L]): value times scale. Without gradient."""
    return torch.ops.prfl.modulate_fp8(x, scale, shift, eps)
