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
"""

from functools import partial

import torch
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.checks import checked, expect, expect_float, expect_rows
from prfl_kernels.dispatch import CPU, CUDA, REFERENCE, TRITON, implementation
from prfl_kernels.extension import empty
from prfl_kernels.fp8.e4m3 import E4M3, quantize_rows
from prfl_kernels.jit import register, unit_last, wide
from prfl_kernels.norm import cpu, cuda, triton_kernels
from prfl_kernels.norm.launch import Backward, Forward


def reference_forward(a: Forward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
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
    dtype, parameters = a.sums.dtype, a.wants_parameters
    if a.dn is None:
        dx = a.dsum.to(dtype)
    else:
        dn, x, factors = a.dn.to(dtype), a.x.to(dtype), a.scale.to(dtype) + a.base
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for b, factor in enumerate(factors):
            at = slice(b, b + 1) if len(factors) == len(x) else slice(None)  # that share it
            dx[at], *made = torch.ops.aten.native_layer_norm_backward(
                dn[at], x[at], x.shape[-1:], a.mean[at, :, None], a.rstd[at, :, None], factor,
                torch.zeros_like(factor), [True, parameters, parameters],
            )  # fmt: skip
            if parameters:
                a.sums[b, :2] = torch.stack(made)
        if a.dsum is not None:
            dx += a.dsum
        a.dx.copy_(dx)
    if a.wants_gate:
        a.sums[:, -1] = (dx * a.y).sum(1)
    if a.dy is not None:
        a.dy.copy_(dx if a.gate is None else dx * a.gate.to(dtype)[:, None])


IMPLEMENTATIONS = {
    REFERENCE: (reference_forward, reference_backward),
    CPU: (cpu.forward, cpu.backward),
    TRITON: (triton_kernels.forward, triton_kernels.backward),
    CUDA: (cuda.forward, cuda.backward),
}
for _op in ("modulate", "layer_norm", "gated_add", "gated_add_modulate", "gated_add_norm"):
    dispatch.register(_op, dispatch.common(IMPLEMENTATIONS))


def _vector(a: Tensor | None) -> Tensor | None:
    """a [B, C], or a [C] that the batch shares, as a launch has it."""
    a = unit_last(a)
    return a if a is None or a.dim() == 2 else a.as_strided((1, len(a)), (0, 1))


def forward(fill, x, y, gate, scale, shift, base, eps, out_dtype):
    """(x', n, row scales [B, L], statistics [2, B, L]: mean and 1/std), which fill(launch) computes.

    x, y [B, L, C]; gate [B, C]; scale, shift [B, C] or [C]. None: x' without y, n without scale, the row
    scales unless out_dtype is e4m3, the statistics unless there is a norm to differentiate.
    """
    batch, length, _ = x.shape
    fp8 = out_dtype == E4M3
    total = None if y is None else empty(x, *x.shape)
    n = None if scale is None else empty(x, *x.shape, dtype=out_dtype)
    quant = empty(x, batch, length, dtype=torch.float32) if fp8 else None
    stats = None if n is None or fp8 else empty(x, 2, batch, length, dtype=wide(x.dtype))
    if x.numel():
        vectors = map(_vector, (gate, scale, shift))
        numbers = (None, None) if stats is None else stats
        fill(Forward(unit_last(x), unit_last(y), *vectors, total, n, quant, *numbers, base, eps))
    return total, n, quant, stats


def backward(fill, dn, dsum, x, y, gate, scale, stats, base, parameters, y_dtype):
    """(dx, dy, d gate, d scale, d shift) of `forward`, each None where it is not wanted.

    x is x' where there was an addition. dy is made for y_dtype, d gate [B, C] where y and gate are given,
    d scale and d shift, in the shape of scale, where `parameters`; these three in float32 or wider. Without
    dn, dx is dsum itself and None here.
    """
    like = dsum if dn is None else dn
    batch, _, width = like.shape
    wants_gate = y is not None and gate is not None
    dx = None if dn is None else empty(x, *x.shape)
    dy = None if y_dtype is None else empty(like, *like.shape, dtype=y_dtype)
    dtype = wide((like if x is None else x).dtype)
    sums = like.new_zeros(batch, 2 * parameters + wants_gate, width, dtype=dtype)
    if like.numel():
        rows, vectors = map(unit_last, (dn, dsum, x, y)), map(_vector, (gate, scale))
        numbers = (None, None) if stats is None else stats
        fill(Backward(*rows, *vectors, *numbers, dx, dy, sums, base))
    dgate = dscale = dshift = None
    if parameters:  # a weight [C] is shared by the batch
        dscale, dshift = (s.sum(0) if scale.dim() == 1 else s.contiguous() for s in sums[:, :2].unbind(1))
    if wants_gate:
        dgate = sums[:, -1].contiguous()
    return dx, dy, dgate, dscale, dshift


def pair(op: str, x: Tensor, fp8: bool = False):
    """(`forward`, `backward`) by what runs as operation `op` for x, to e4m3 if fp8."""
    fills = IMPLEMENTATIONS[implementation(op, x, fp8)]
    return partial(forward, fills[0]), partial(backward, fills[1])


_VECTORS = {1.0: ("scale", "shift"), 0.0: ("weight", "bias")}  # by base, as their operations call them


def check_affine(op: str, x: Tensor, base: float, *vectors: Tensor) -> None:
    """Raise ValueError unless base is 0 or 1 and the vectors, scale or scale and shift, are [B, C] or [C] for
    x [B, L, C]."""
    if base not in _VECTORS:
        raise ValueError(f"{op}: got base {base}, want 0 or 1")
    batch, _, width = x.shape
    shape = (width,) if vectors[0].dim() == 1 else (batch, width)
    for name, a in zip(_VECTORS[base], vectors, strict=False):
        expect(op, name, a, shape, x)


def _name(base: float) -> str:
    return "modulate" if base else "layer_norm"


def _check_norm(x, scale, shift, base, eps, out_dtype):
    op = _name(base)
    expect_rows(op, "x", x)
    check_affine(op, x, base, scale, shift)
    expect_float(op, "out_dtype", out_dtype)


def _norm(x, scale, shift, base, eps, out_dtype):
    _, n, _, stats = pair(_name(base), x)[0](x, None, None, scale, shift, base, eps, out_dtype)
    return n, stats


def _norm_fake(x, scale, shift, base, eps, out_dtype):
    stats = x.new_empty(2, *x.shape[:2], dtype=wide(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), stats


def _check_norm_backward(dn, x, scale, stats, base, parameters):
    op = f"{_name(base)}_backward"
    shape = expect_rows(op, "x", x)
    expect(op, "dn", dn, shape, x)
    check_affine(op, x, base, scale)
    expect(op, "stats", stats, (2, *shape[:2]), x, wide(x.dtype))


def _norm_backward(dn, x, scale, stats, base, parameters):
    dx, _, _, dscale, dshift = pair(_name(base), x)[1](
        dn, None, x, None, None, scale, stats.contiguous(), base, parameters, None
    )
    if not parameters:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, dscale.to(scale.dtype), dshift.to(scale.dtype)


def _norm_backward_fake(dn, x, scale, stats, base, parameters):
    like = scale.new_empty(scale.shape) if parameters else x.new_empty(0)
    return x.new_empty(x.shape), like, torch.empty_like(like)


def _norm_setup_context(ctx, inputs, output):
    x, scale, _, ctx.base, _, _ = inputs
    ctx.save_for_backward(x, scale, output[1])


def _norm_gradient(ctx, dn, _):
    x, scale, stats = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[1:3])
    dx, dscale, dshift = torch.ops.prfl.modulate_backward(dn, x, scale, stats, ctx.base, parameters)
    if not parameters:
        dscale = dshift = None
    return dx, dscale, dshift, None, None, None


def _check_norm_fp8(x, scale, shift, eps):
    expect_rows("modulate_fp8", "x", x)
    check_affine("modulate_fp8", x, 1.0, scale, shift)


def _norm_fp8(x, scale, shift, eps):
    return pair("modulate", x, fp8=True)[0](x, None, None, scale, shift, 1.0, eps, E4M3)[1:3]


def _norm_fp8_fake(x, scale, shift, eps):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:2], dtype=torch.float32)


register(
    "modulate(Tensor x, Tensor scale, Tensor shift, float base, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
    *checked(_check_norm, _norm, _norm_fake),
    _norm_gradient,
    _norm_setup_context,
)
register(
    "modulate_backward(Tensor dn, Tensor x, Tensor scale, Tensor stats, float base, bool parameters)"
    " -> (Tensor, Tensor, Tensor)",
    *checked(_check_norm_backward, _norm_backward, _norm_backward_fake),
)
register(
    "modulate_fp8(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor)",
    *checked(_check_norm_fp8, _norm_fp8, _norm_fp8_fake),
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
