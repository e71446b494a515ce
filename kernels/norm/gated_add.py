"""gated_add and its fused forms: the end of a sublayer together with the norm that the next one begins with.

Formulas, dtypes and what is saved stand in `prfl_kernels.norm.op`.
"""

import torch
from torch import Tensor

from prfl_kernels.checks import expect, expect_float, expect_rows
from prfl_kernels.declare import gradients_like, operation
from prfl_kernels.dispatch import record
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.jit import wide
from prfl_kernels.norm.op import backward, check_affine, check_boundary, forward


def _name(base: float) -> str:
    return "gated_add_modulate" if base else "gated_add_norm"


def _check(op: str, x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    batch, _, width = shape = expect_rows(op, "x", x)
    expect(op, "y", y, shape, x)
    if gate is not None:
        _check_gate(op, gate, batch, width, x)


def _check_gate(op: str, gate: Tensor, batch: int, width: int, like: Tensor) -> None:
    expect(op, "gate", gate, (batch, 2, width) if gate.dim() == 3 else (batch, width), like)


def _add_setup_context(ctx, inputs, output):
    _, y, gate, ctx.boundary = inputs
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate)


def _add_gradient(ctx, dsum):
    y, gate = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:]):
        return dsum, None, None, None
    if gate is None:
        return dsum, dsum.to(ctx.y_dtype), None, None
    return dsum, *torch.ops.prfl.gated_add_backward(dsum, y, gate, ctx.y_dtype, ctx.boundary), None


@operation("gated_add", _add_gradient, _add_setup_context)
def _gated_add(fake: bool, x: Tensor, y: Tensor, gate: Tensor | None, boundary: int = 0) -> Tensor:
    _check("gated_add", x, y, gate)
    check_boundary("gated_add", x, boundary, gate)
    return forward(None if fake else record("gated_add", x).forward, x, y, gate, boundary=boundary)[0]


@operation("gated_add_backward")
def _gated_add_backward(
    fake: bool, dsum: Tensor, y: Tensor | None, gate: Tensor, y_dtype: torch.dtype, boundary: int = 0
) -> tuple[Tensor, Tensor]:
    op = "gated_add_backward"
    batch, _, width = shape = expect_rows(op, "dsum", dsum)
    if y is not None:
        expect(op, "y", y, shape, dsum)
    _check_gate(op, gate, batch, width, dsum)
    check_boundary(op, dsum, boundary, gate)
    expect_float(op, "y_dtype", y_dtype)
    fill = None if fake else record("gated_add", dsum).backward
    _, dy, dgate, _, _ = backward(fill, None, dsum, None, y, gate, None, None, 0.0, False, y_dtype, boundary)
    return dy, *gradients_like(gate, dgate)


def _norm_setup_context(ctx, inputs, output):
    _, y, gate, scale, _, ctx.base, _, _, ctx.boundary = inputs
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(output[0], y if ctx.needs_input_grad[2] else None, gate, scale, output[2])


def _norm_gradient(ctx, dsum, dn, _):
    x, y, gate, scale, stats = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[3:5])
    dx, dy, dgate, dscale, dshift = torch.ops.prfl.gated_add_norm_backward(
        dsum, dn, x, y, gate, scale, stats, ctx.base, ctx.y_dtype, parameters, ctx.boundary
    )
    return dx, dy, None if gate is None else dgate, dscale, dshift, None, None, None, None


@operation("gated_add_norm", _norm_gradient, _norm_setup_context)
def _gated_add_norm(
    fake: bool, x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, base: float,
    eps: float, out_dtype: torch.dtype, boundary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = _name(base)
    _check(op, x, y, gate)
    check_affine(op, x, base, scale, shift)
    check_boundary(op, x, boundary, gate, scale)
    expect_float(op, "out_dtype", out_dtype)
    fill = None if fake else record(op, x).forward
    total, n, _, stats = forward(fill, x, y, gate, scale, shift, base, eps, out_dtype, boundary)
    return total, n, stats


@operation("gated_add_norm_backward")
def _gated_add_norm_backward(
    fake: bool, dsum: Tensor, dn: Tensor, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    stats: Tensor, base: float, y_dtype: torch.dtype, parameters: bool, boundary: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = f"{_name(base)}_backward"
    _check(op, x, x if y is None else y, gate)
    expect(op, "dsum", dsum, x.shape, x)
    expect(op, "dn", dn, x.shape, x)
    check_affine(op, x, base, scale)
    check_boundary(op, x, boundary, gate, scale)
    expect(op, "stats", stats, (2, *x.shape[:2]), x, wide(x.dtype))
    expect_float(op, "y_dtype", y_dtype)
    fill = None if fake else record(_name(base), x).backward
    dx, dy, dgate, *made = backward(
        fill, dn, dsum, x, y, gate, scale, stats, base, parameters, y_dtype, boundary
    )
    return dx, dy, *gradients_like(dn if gate is None else gate, dgate), *gradients_like(scale, *made)


@operation("gated_add_norm_fp8")
def _gated_add_norm_fp8(
    fake: bool, x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, base: float,
    eps: float, boundary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = f"{_name(base)}_fp8"
    _check(op, x, y, gate)
    check_affine(op, x, base, scale, shift)
    check_boundary(op, x, boundary, gate, scale)
    fill = None if fake else record(_name(base), x, fp8=True).forward
    return forward(fill, x, y, gate, scale, shift, base, eps, E4M3, boundary)[:3]


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None, boundary: int = 0) -> Tensor:
    """x + gate * y in x.dtype.

    x, y [B, L, C], C > 0; gate [B, C], or None for 1, or [B, 2, C]: that of the tokens before `boundary`
    (0 to L), and of the others; of any float dtypes. ValueError for shapes, dtypes, devices or a boundary
    that do not fit.
    """
    return torch.ops.prfl.gated_add(x, y, gate, boundary)


def gated_add_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    boundary: int = 0,
) -> tuple[Tensor, Tensor]:
    """(x', modulate(x', scale, shift)) with x' = x + gate * y. Shapes and errors as there."""
    out_dtype = out_dtype or x.dtype
    return torch.ops.prfl.gated_add_norm(x, y, gate, scale, shift, 1.0, eps, out_dtype, boundary)[:2]


def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    boundary: int = 0,
) -> tuple[Tensor, Tensor]:
    """(x', layer_norm(x', weight, bias)) with x' = x + gate * y. Shapes and errors as there."""
    out_dtype = out_dtype or x.dtype
    return torch.ops.prfl.gated_add_norm(x, y, gate, weight, bias, 0.0, eps, out_dtype, boundary)[:2]


def gated_add_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6,
    boundary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', e4m3 [B, L, C], float32 scales [B, L]) of gated_add_modulate. Without gradient."""
    return torch.ops.prfl.gated_add_norm_fp8(x, y, gate, scale, shift, 1.0, eps, boundary)


def gated_add_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6,
    boundary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', e4m3 [B, L, C], float32 scales [B, L]) of gated_add_norm. Without gradient."""
    return torch.ops.prfl.gated_add_norm_fp8(x, y, gate, weight, bias, 0.0, eps, boundary)
