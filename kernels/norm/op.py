"""LayerNorm with modulation or weights, gated addition, and both in one pass over memory.

    modulate(x, scale, shift)      = LN(x) * (1 + scale) + shift     x [B, L, C], scale and shift [B, C]
    layer_norm(x, weight, bias)    = LN(x) * weight + bias           weight and bias [C]
    gated_add(x, y, gate)          = x + gate * y                    y [B, L, C], gate [B, C] or None (1)
    gated_add_modulate(x, y, ...)  = (x', modulate(x', scale, shift))   with x' = gated_add(x, y, gate)
    gated_add_norm(x, y, ...)      = (x', layer_norm(x', weight, bias))
    modulate_fp8, gated_add_modulate_fp8, gated_add_norm_fp8: the same with the norm as e4m3 values and one
                                     float32 scale a token

The residual stream x keeps its dtype: the sum is formed in float32 and rounded once, and the norm reads the
rounded sum. Statistics and the affine part are computed in float32 (float64 for float64 input) whatever the
dtype of x; the result is rounded once, to out_dtype. Saved for the backward: x (x' of a sum), scale, gate,
mean and 1/std of every token, and y if the gate takes a gradient. Source: Peebles and Xie, "Scalable
Diffusion Models with Transformers" (adaLN); Wan2.1 uses eps 1e-6 in every block.

All are one pair of kernels, forward and backward, in which parts may be left out:

    x' = x + gate * y,   n = LN(x') * (scale + base) + shift        base 1 to modulate, 0 for weights

Every vector [B, C] may be [B, 2, C] with a `boundary`: tokens before it take the first, the others the
second. In the image mode of Wan2.2's TI2V-5B the tokens of the first frame have timestep 0; the official code
makes vectors for every token. The gradient of each vector is the sum over its own tokens.
"""

import torch
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.checks import expect, expect_float, expect_rows
from prfl_kernels.declare import allocator, gradients_like, operation
from prfl_kernels.dispatch import record
from prfl_kernels.fp8.e4m3 import E4M3, quantize_rows
from prfl_kernels.jit import unit_last, wide
from prfl_kernels.norm import cpu, cuda, triton_kernels
from prfl_kernels.norm.launch import Backward, Forward


def reference_forward(a: Forward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
    for side in a.sides():
        _reference_forward(side)


def _reference_forward(a: Forward) -> None:
    x, dtype = a.x, wide(a.x.dtype)
    if a.y is not None:
        x, y = x.to(dtype), a.y.to(dtype)
        if a.gate is None:
            x = torch.add(x, y, out=a.total)
        else:
            x = torch.addcmul(x, y, a.gate.to(dtype)[:, None], out=a.total)
    if a.n is None:
        return
    n, mean, rstd = torch.native_layer_norm(x.to(dtype), x.shape[-1:], None, None, a.eps)
    scale, shift = (v.to(dtype)[:, None] for v in (a.scale, a.shift))
    if a.quant is None:
        torch.addcmul(shift, n, scale + a.base, out=a.n)
        a.mean.copy_(mean[..., 0])
        a.rstd.copy_(rstd[..., 0])
    else:
        n, quant = quantize_rows(torch.addcmul(shift, n, scale + a.base))
        a.n.copy_(n)
        a.quant.copy_(quant)


def reference_backward(a: Backward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
    for side in a.sides():
        _reference_backward(side)


def _reference_backward(a: Backward) -> None:
    dtype, parameters = a.sums.dtype, a.wants_parameters
    if a.dn is None:
        dx = a.dsum.to(dtype)
    else:
        dn, x, factors = a.dn.to(dtype), a.x.to(dtype), a.scale.to(dtype) + a.base
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        mean, rstd = a.mean.contiguous(), a.rstd.contiguous()  # torch reads them as if they were
        for b, factor in enumerate(factors):
            at = slice(b, b + 1) if len(factors) == len(x) else slice(None)  # that share it
            dx[at], *made = torch.ops.aten.native_layer_norm_backward(
                dn[at], x[at], x.shape[-1:], mean[at, :, None], rstd[at, :, None], factor,
                torch.zeros_like(factor), [True, parameters, parameters],
            )  # fmt: skip
            if parameters:
                a.sums[b, 0, :2] = torch.stack(made)
        if a.dsum is not None:
            dx += a.dsum
        a.dx.copy_(dx)
    if a.wants_gate:
        a.sums[:, 0, -1] = (dx * a.y).sum(1)
    if a.dy is not None:
        a.dy.copy_(dx if a.gate is None else dx * a.gate.to(dtype)[:, None])


_plain = reference_forward, reference_backward
for _op in ("modulate", "layer_norm", "gated_add", "gated_add_modulate", "gated_add_norm"):
    dispatch.register(_op, dispatch.room(_plain, cpu=cpu, triton=triton_kernels, cuda=cuda))


def _vector(a: Tensor | None) -> Tensor | None:
    """a [B, 2, C], [B, C] or [C], as a launch has it."""
    a = unit_last(a)
    if a is None or a.dim() == 3:
        return a
    if a.dim() == 1:
        return a.as_strided((1, 2, len(a)), (0, 0, 1))
    return a[:, None].expand(-1, 2, -1)


def forward(
    fill, x, y=None, gate=None, scale=None, shift=None, base=0.0, eps=0.0, out_dtype=None, boundary=0
):
    """(x', n, row scales [B, L], statistics [2, B, L]: mean and 1/std), which fill(launch) computes unless it
    is None.

    x, y [B, L, C]; gate [B, C]; scale, shift [B, C] or [C]; with a boundary, some [B, 2, C]. None: x' without
    y, n without scale, the row scales unless out_dtype is e4m3, the statistics unless there is a norm to
    differentiate.
    """
    (batch, length, width), new = x.shape, allocator(fill)
    fp8 = out_dtype == E4M3
    total = None if y is None else new(x, batch, length, width)
    n = None if scale is None else new(x, batch, length, width, dtype=out_dtype)
    quant = new(x, batch, length, dtype=torch.float32) if fp8 else None
    stats = None if n is None or fp8 else new(x, 2, batch, length, dtype=wide(x.dtype))
    if fill is not None and x.numel():
        mean, rstd = (None, None) if stats is None else stats.unbind()
        rows, vectors = (unit_last(x), unit_last(y)), map(_vector, (gate, scale, shift))
        fill(Forward(*rows, *vectors, total, n, quant, mean, rstd, base, eps, boundary))
    return total, n, quant, stats


def backward(fill, dn, dsum, x, y, gate, scale, stats, base, parameters, y_dtype, boundary=0):
    """(dx, dy, d gate, d scale, d shift) of `forward`, each None where it is not wanted, which fill(launch)
    computes unless it is None.

    x is x' where there was an addition. dy is made for y_dtype, d gate, in its shape, where y and gate are
    given, d scale and d shift, in the shape of scale, where `parameters`; these three in float32 or wider.
    Without dn, dx is dsum itself and None here.
    """
    like, new = dsum if dn is None else dn, allocator(fill)
    batch, length, width = like.shape
    wants_gate = y is not None and gate is not None
    dx = None if dn is None else new(x, batch, length, width)
    dy = None if y_dtype is None else new(like, batch, length, width, dtype=y_dtype)
    dtype = wide((like if x is None else x).dtype)
    sides = max(1 if a is None or a.dim() < 3 else 2 for a in (gate, scale))
    sums = like.new_zeros(batch, sides, 2 * parameters + wants_gate, width, dtype=dtype)
    if fill is not None and like.numel():
        rows, vectors = map(unit_last, (dn, dsum, x, y)), (_vector(gate), _vector(scale))
        mean, rstd = (None, None) if stats is None else stats.contiguous().unbind()
        fill(Backward(*rows, *vectors, mean, rstd, dx, dy, sums, base, boundary))
    dgate = dscale = dshift = None
    if parameters:
        dscale, dshift = (_summed(a, scale) for a in sums[:, :, :2].unbind(2))
    if wants_gate:
        dgate = _summed(sums[:, :, -1], gate)
    return dx, dy, dgate, dscale, dshift


def _summed(a: Tensor, vector: Tensor) -> Tensor:
    """Sums a [B, sides, C] over the samples and sides that share the vector, in its shape."""
    if vector.dim() < 3:
        a = a.sum(1) if a.shape[1] > 1 else a[:, 0]
    return a.sum(0) if vector.dim() == 1 else a.contiguous()


_VECTORS = {1.0: ("scale", "shift"), 0.0: ("weight", "bias")}  # by base, as their operations call them


def check_affine(op: str, x: Tensor, base: float, *vectors: Tensor) -> None:
    """Raise ValueError unless base is 0 or 1 and the vectors, scale or scale and shift, are [C], [B, C] or,
    with base 1, [B, 2, C] for x [B, L, C]."""
    if base not in _VECTORS:
        raise ValueError(f"{op}: got base {base}, want 0 or 1")
    batch, _, width = x.shape
    dims, shape = vectors[0].dim(), (batch, width)
    if dims == 1:
        shape = (width,)
    elif dims == 3 and base:
        shape = (batch, 2, width)
    for name, a in zip(_VECTORS[base], vectors, strict=False):
        expect(op, name, a, shape, x)


def check_boundary(op: str, x: Tensor, boundary: int, *vectors: Tensor | None) -> None:
    """Raise ValueError unless the boundary is a number of tokens of x [B, L, C], and 0 if no vector is
    [B, 2, C]."""
    most = x.shape[1] if any(a is not None and a.dim() == 3 for a in vectors) else 0
    if not 0 <= boundary <= most:
        want = f"0 to {most}" if most else "0 where no vector is [B, 2, C]"
        raise ValueError(f"{op}: got boundary {boundary}, want {want}")


def _name(base: float) -> str:
    return "modulate" if base else "layer_norm"


def _setup_context(ctx, inputs, output):
    x, scale, _, ctx.base, _, _, ctx.boundary = inputs
    ctx.save_for_backward(x, scale, output[1])


def _gradient(ctx, dn, _):
    parameters = any(ctx.needs_input_grad[1:3])
    made = torch.ops.prfl.modulate_backward(dn, *ctx.saved_tensors, ctx.base, parameters, ctx.boundary)
    return *made, None, None, None, None


@operation("modulate", _gradient, _setup_context)
def _modulate(
    fake: bool, x: Tensor, scale: Tensor, shift: Tensor, base: float, eps: float, out_dtype: torch.dtype,
    boundary: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = _name(base)
    expect_rows(op, "x", x)
    check_affine(op, x, base, scale, shift)
    check_boundary(op, x, boundary, scale)
    expect_float(op, "out_dtype", out_dtype)
    fill = None if fake else record(op, x).forward
    _, n, _, stats = forward(fill, x, None, None, scale, shift, base, eps, out_dtype, boundary)
    return n, stats


@operation("modulate_backward")
def _modulate_backward(
    fake: bool, dn: Tensor, x: Tensor, scale: Tensor, stats: Tensor, base: float, parameters: bool,
    boundary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = f"{_name(base)}_backward"
    shape = expect_rows(op, "x", x)
    expect(op, "dn", dn, shape, x)
    check_affine(op, x, base, scale)
    check_boundary(op, x, boundary, scale)
    expect(op, "stats", stats, (2, *shape[:2]), x, wide(x.dtype))
    fill = None if fake else record(_name(base), x).backward
    made = backward(fill, dn, None, x, None, None, scale, stats, base, parameters, None, boundary)
    return made[0], *gradients_like(scale, *made[3:])


@operation("modulate_fp8")
def _modulate_fp8(
    fake: bool, x: Tensor, scale: Tensor, shift: Tensor, eps: float, boundary: int = 0
) -> tuple[Tensor, Tensor]:
    expect_rows("modulate_fp8", "x", x)
    check_affine("modulate_fp8", x, 1.0, scale, shift)
    check_boundary("modulate_fp8", x, boundary, scale)
    fill = None if fake else record("modulate", x, fp8=True).forward
    return forward(fill, x, None, None, scale, shift, 1.0, eps, E4M3, boundary)[1:3]


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    boundary: int = 0,
) -> Tensor:
    """LN(x) * (1 + scale) + shift.

    x [B, L, C], C > 0; scale and shift [B, C], or [C] for every sample, or [B, 2, C]: those of the tokens
    before `boundary` (0 to L), and of the others; all of any float dtype. Returns [B, L, C] in out_dtype
    (x.dtype if None). ValueError for shapes, dtypes, devices or a boundary that do not fit.
    """
    return torch.ops.prfl.modulate(x, scale, shift, 1.0, eps, out_dtype or x.dtype, boundary)[0]


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
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, boundary: int = 0
) -> tuple[Tensor, Tensor]:
    """modulate as (e4m3 [B, L, C], float32 scales [B, L]): value times scale. Without gradient."""
    return torch.ops.prfl.modulate_fp8(x, scale, shift, eps, boundary)
