"""gated_add and its fused forms: the end of a sublayer together with the norm that the next one begins with.

Formulas, dtypes and what is saved stand in `prfl_kernels.norm.op`.
"""

import torch
from torch import Tensor

from prfl_kernels.checks import checked, expect, expect_float, expect_rows
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.jit import register, wide
from prfl_kernels.norm.op import check_affine, pair


def _name(base: float) -> str:
    return "gated_add_modulate" if base else "gated_add_norm"


def _check_add(x, y, gate, op="gated_add"):
    batch, _, width = shape = expect_rows(op, "x", x)
    expect(op, "y", y, shape, x)
    if gate is not None:
        expect(op, "gate", gate, (batch, width), x)


def _add(x, y, gate):
    return pair("gated_add", x)[0](x, y, gate, None, None, 0.0, 0.0, None)[0]


def _add_fake(x, y, gate):
    return x.new_empty(x.shape)


def _check_add_backward(dsum, y, gate, y_dtype):
    op = "gated_add_backward"
    batch, _, width = shape = expect_rows(op, "dsum", dsum)
    if y is not None:
        expect(op, "y", y, shape, dsum)
    expect(op, "gate", gate, (batch, width), dsum)
    expect_float(op, "y_dtype", y_dtype)


def _add_backward(dsum, y, gate, y_dtype):
    _, dy, dgate, _, _ = pair("gated_add", dsum)[1](
        None, dsum, None, y, gate, None, None, 0.0, False, y_dtype
    )
    return dy, dsum.new_empty(0) if dgate is None else dgate.to(gate.dtype)


def _add_backward_fake(dsum, y, gate, y_dtype):
    dgate = dsum.new_empty(0) if y is None else gate.new_empty(gate.shape)
    return dsum.new_empty(dsum.shape, dtype=y_dtype), dgate


def _add_setup_context(ctx, inputs, output):
    _, y, gate = inputs
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate)


def _add_gradient(ctx, dsum):
    y, gate = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:]):
        return dsum, None, None
    if gate is None:
        return dsum, dsum.to(ctx.y_dtype), None
    dy, dgate = torch.ops.prfl.gated_add_backward(dsum, y, gate, ctx.y_dtype)
    return dsum, dy, None if y is None else dgate


def _check_norm(x, y, gate, scale, shift, base, eps, out_dtype):
    op = _name(base)
    _check_add(x, y, gate, op)
    check_affine(op, x, base, scale, shift)
    expect_float(op, "out_dtype", out_dtype)


def _norm(x, y, gate, scale, shift, base, eps, out_dtype):
    total, n, _, stats = pair(_name(base), x)[0](x, y, gate, scale, shift, base, eps, out_dtype)
    return total, n, stats


def _norm_fake(x, y, gate, scale, shift, base, eps, out_dtype):
    stats = x.new_empty(2, *x.shape[:2], dtype=wide(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), stats


def _check_quantized(x, y, gate, scale, shift, base, eps):
    op = f"{_name(base)}_fp8"
    _check_add(x, y, gate, op)
    check_affine(op, x, base, scale, shift)


def _quantized(x, y, gate, scale, shift, base, eps):
    run = pair(_name(base), x, fp8=True)[0]
    return run(x, y, gate, scale, shift, base, eps, E4M3)[:3]


def _quantized_fake(x, y, gate, scale, shift, base, eps):
    n = x.new_empty(x.shape, dtype=E4M3)
    return x.new_empty(x.shape), n, x.new_empty(x.shape[:2], dtype=torch.float32)


def _check_norm_backward(dsum, dn, x, y, gate, scale, stats, base, y_dtype, parameters):
    op = f"{_name(base)}_backward"
    _check_add(x, x if y is None else y, gate, op)
    expect(op, "dsum", dsum, x.shape, x)
    expect(op, "dn", dn, x.shape, x)
    check_affine(op, x, base, scale)
    expect(op, "stats", stats, (2, *x.shape[:2]), x, wide(x.dtype))
    expect_float(op, "y_dtype", y_dtype)


def _norm_backward(dsum, dn, x, y, gate, scale, stats, base, y_dtype, parameters):
    dx, dy, dgate, dscale, dshift = pair(_name(base), x)[1](
        dn, dsum, x, y, gate, scale, stats.contiguous(), base, parameters, y_dtype
    )
    none = dn.new_empty(0)
    if parameters:
        dscale, dshift = dscale.to(scale.dtype), dshift.to(scale.dtype)
    else:
        dscale, dshift = none, none.clone()
    return dx, dy, none.clone() if dgate is None else dgate.to(gate.dtype), dscale, dshift


def _norm_backward_fake(dsum, dn, x, y, gate, scale, stats, base, y_dtype, parameters):
    dgate = dn.new_empty(0) if y is None or gate is None else gate.new_empty(gate.shape)
    dscale = scale.new_empty(scale.shape) if parameters else dn.new_empty(0)
    dx, dy = x.new_empty(x.shape), x.new_empty(x.shape, dtype=y_dtype)
    return dx, dy, dgate, dscale, torch.empty_like(dscale)


def _norm_setup_context(ctx, inputs, output):
    _, y, gate, scale, _, ctx.base, _, _ = inputs
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(output[0], y if ctx.needs_input_grad[2] else None, gate, scale, output[2])


def _norm_gradient(ctx, dsum, dn, _):
    x, y, gate, scale, stats = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[3:5])
    dx, dy, dgate, dscale, dshift = torch.ops.prfl.gated_add_norm_backward(
        dsum, dn, x, y, gate, scale, stats, ctx.base, ctx.y_dtype, parameters
    )
    if not parameters:
        dscale = dshift = None
    return dx, dy, None if y is None else dgate, dscale, dshift, None, None, None


register(
    "gated_add(Tensor x, Tensor y, Tensor? gate) -> Tensor",
    *checked(_check_add, _add, _add_fake),
    _add_gradient,
    _add_setup_context,
)
register(
    "gated_add_backward(Tensor dsum, Tensor? y, Tensor gate, ScalarType y_dtype) -> (Tensor, Tensor)",
    *checked(_check_add_backward, _add_backward, _add_backward_fake),
)
register(
    "gated_add_norm(Tensor x, Tensor y, Tensor? gate, Tensor scale, Tensor shift, float base, "
    "float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    *checked(_check_norm, _norm, _norm_fake),
    _norm_gradient,
    _norm_setup_context,
)
register(
    "gated_add_norm_backward(Tensor dsum, Tensor dn, Tensor x, Tensor? y, Tensor? gate, "
    "Tensor scale, Tensor stats, float base, ScalarType y_dtype, bool parameters)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    *checked(_check_norm_backward, _norm_backward, _norm_backward_fake),
)
register(
    "gated_add_norm_fp8(Tensor x, Tensor y, Tensor? gate, Tensor scale, Tensor shift, float base, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    *checked(_check_quantized, _quantized, _quantized_fake),
)


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate * y in x.dtype.

    x, y [B, L, C], C > 0; gate [B, C] or None for 1; of any float dtypes. ValueError for shapes, dtypes or
    devices that do not fit.
    """
    return torch.ops.prfl.gated_add(x, y, gate)


def gated_add_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', modulate(x', scale, shift)) with x' = x + gate * y. Shapes and errors as there."""
    out_dtype = out_dtype or x.dtype
    return torch.ops.prfl.gated_add_norm(x, y, gate, scale, shift, 1.0, eps, out_dtype)[:2]


def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', layer_norm(x', weight, bias)) with x' = x + gate * y. Shapes and errors as there."""
    out_dtype = out_dtype or x.dtype
    return torch.ops.prfl.gated_add_norm(x, y, gate, weight, bias, 0.0, eps, out_dtype)[:2]


def gated_add_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', e4m3 [B, L, C], float32 scales [B, L]) of gated_add_modulate. Without gradient."""
    return torch.ops.prfl.gated_add_norm_fp8(x, y, gate, scale, shift, 1.0, eps)


def gated_add_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', e4m3 [B, L, C], float32 scales [B, L]) of gated_add_norm. Without gradient."""
    return torch.ops.prfl.gated_add_norm_fp8(x, y, gate, weight, bias, 0.0, eps)
