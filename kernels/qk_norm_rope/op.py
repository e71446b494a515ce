"""RMSNorm over the whole width and 3-D rotary position embedding of queries and keys.

    n    = x / sqrt(mean_C(x^2) + eps) * weight               over all C = H * D channels, not per head
    out  = rotate pairs (2i, 2i+1) of every head by angle_i(frame, row, column)

Of the D/2 pairs the first D/2 - 2 (D/2 // 3) turn with the frame index, the next D/2 // 3 with the
row and the last D/2 // 3 with the column; each part has its own frequencies
theta^(-2j / dim_part). Tokens run frame-major over grid = (frames, rows, columns); `offset` is the
index of the first token held here, for shards of a sequence. Norm and rotation run in float32 with
angles computed in float64 (the official code rotates in complex128); the result is rounded once.
Saved for the backward: q and k before the norm, the weights, and 1/rms of every token. `rms_norm` is the
norm alone, of one tensor.
Source: Su et al., "RoFormer"; Wan2.1 `rope_apply`, `WanRMSNorm`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.checks import checked, expect, expect_places, expect_rows
from prfl_kernels.dispatch import CPU, CUDA, REFERENCE, TRITON, implementation
from prfl_kernels.extension import empty
from prfl_kernels.fp8.e4m3 import E4M3, quantize_rows
from prfl_kernels.jit import register, unit_last, wide
from prfl_kernels.qk_norm_rope import cpu, cuda, triton_kernels
from prfl_kernels.qk_norm_rope.launch import Backward, Forward
from prfl_kernels.qk_norm_rope.rope import Grid, cos_sin, rotate


def _turns(a: Forward | Backward):
    """Cosines and sines [L, 1, D/2] of the tokens."""
    _, length, width = a.q.shape
    tables = cos_sin(width // a.num_heads, tuple(a.grid), True, a.q.device, wide(a.q.dtype))
    return (table[a.offset : a.offset + length, None] for table in tables)


def reference_forward(a: Forward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
    made_of_q = a.q, a.weight_q, a.out_q, a.quant_q, a.rstd_q
    made_of_k = a.k, a.weight_k, a.out_k, a.quant_k, a.rstd_k
    for x, weight, out, quant, rstd in (made_of_q, made_of_k):
        if x is None:
            continue
        x = x.to(wide(x.dtype))
        factor = torch.rsqrt(x.square().mean(-1) + a.eps)
        n = (x * factor[..., None] * weight).unflatten(-1, (a.num_heads, -1))
        if a.grid is not None:
            n = rotate(n, *_turns(a))
        if a.fp8:
            n, scale = quantize_rows(n)
            quant.copy_(scale)
        else:
            rstd.copy_(factor)
        out.copy_(n)


def reference_backward(a: Backward) -> None:
    """Fill a launch in plain torch, in float32 or wider."""
    of_q = a.dout_q, a.q, a.weight_q, a.rstd_q, a.dq
    of_k = a.dout_k, a.k, a.weight_k, a.rstd_k, a.dk
    for i, (d, x, weight, rstd, dx) in enumerate((of_q, of_k)):
        if x is None:
            continue
        d = d.to(rstd.dtype)
        if a.grid is not None:
            cos, sin = _turns(a)
            d = rotate(d, cos, -sin)
        d, x_hat = d.flatten(2), x.to(rstd.dtype) * rstd[..., None]
        g = d * weight
        dx.copy_((g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd[..., None])
        if a.dweight is not None:
            a.dweight[i] = (d * x_hat).sum((0, 1))


IMPLEMENTATIONS = {
    REFERENCE: (reference_forward, reference_backward),
    CPU: (cpu.forward, cpu.backward),
    TRITON: (triton_kernels.forward, triton_kernels.backward),
    CUDA: (cuda.forward, cuda.backward),
}
for _op in ("rms_norm", "qk_norm_rope"):
    dispatch.register(_op, dispatch.common(IMPLEMENTATIONS))


def pair(x: Tensor, op: str = "qk_norm_rope", fp8: bool = False):
    """`forward` and `backward` by the implementation that runs for x, to e4m3 if fp8."""
    fill_forward, fill_backward = IMPLEMENTATIONS[implementation(op, x, fp8)]
    return partial(forward, fill_forward), partial(backward, fill_backward)


def _of_each(rstd: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """1/rms of q and of k, from [2, B, L], or from [1, B, L] without k."""
    return (None, None) if rstd is None else (*rstd, None)[:2]


def forward(
    fill: Callable[[Forward], None],
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    grid: Grid | None,
    num_heads: int,
    eps: float,
    offset: int,
    fp8: bool = False,
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """([q, k] out [B, L, H, D], their e4m3 scales [B, L, H] if fp8, 1/rms [2, B, L] if not), made by `fill`.

    Without grid there is no rotation; without k only q is made, and its 1/rms is [1, B, L].
    """
    q, k, weight_q, weight_k = (unit_last(a) for a in (q, k, weight_q, weight_k))
    shape = (*q.shape[:2], num_heads, q.shape[2] // num_heads)
    out = [a if a is None else empty(a, *shape, dtype=E4M3 if fp8 else a.dtype) for a in (q, k)]
    quant = [empty(q, *shape[:3], dtype=torch.float32) if fp8 and a is not None else None for a in (q, k)]
    rstd = None if fp8 else empty(q, 1 if k is None else 2, *shape[:2], dtype=wide(q.dtype))
    if q.numel():
        made = *out, *quant, *_of_each(rstd)
        fill(Forward(q, k, weight_q, weight_k, *made, grid, num_heads, eps, offset))
    return out, quant, rstd


def backward(
    fill: Callable[[Backward], None],
    dq: Tensor,
    dk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    rstd: Tensor,
    grid: Grid | None,
    num_heads: int,
    offset: int,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d q, d k [B, L, C], d weights [2, C] as wide as rstd if `parameters`) of `forward`, made by `fill`.

    dq, dk [B, L, H, D] or [B, L, C].
    """
    q, k, weight_q, weight_k = (unit_last(a) for a in (q, k, weight_q, weight_k))
    shape = (*q.shape[:2], num_heads, q.shape[2] // num_heads)
    dout = (d if d is None else unit_last(d if d.dim() == 4 else d.view(shape)) for d in (dq, dk))
    made = [a if a is None else empty(a, *a.shape) for a in (q, k)]
    dweight = rstd.new_zeros(2, q.shape[2]) if parameters else None
    if q.numel():
        inputs = *dout, q, k, weight_q, weight_k, *_of_each(rstd.contiguous())
        fill(Backward(*inputs, *made, dweight, grid, num_heads, offset))
    return *made, dweight


def _check(q, k, weight_q, weight_k, grid, num_heads, eps, offset, op="qk_norm_rope"):
    _, length, width = shape = expect_rows(op, "q", q)
    expect(op, "k", k, shape, q, q.dtype)
    expect(op, "weight_q", weight_q, (width,), q)
    expect(op, "weight_k", weight_k, (width,), q)
    expect_places(op, grid, num_heads, offset, length, width)


def _check_fp8(*inputs):
    _check(*inputs, "qk_norm_rope_fp8")


def _check_backward(dq, dk, q, k, weight_q, weight_k, rstd, grid, num_heads, offset, parameters):
    op = "qk_norm_rope_backward"
    _check(q, k, weight_q, weight_k, grid, num_heads, None, offset, op)
    batch, length, width = q.shape
    for name, a in (("dq", dq), ("dk", dk)):
        expect(op, name, a, (batch, length, num_heads, width // num_heads), q)
    expect(op, "rstd", rstd, (2, batch, length), q, wide(q.dtype))


def _qk_forward(q, k, weight_q, weight_k, grid, num_heads, eps, offset):
    run = pair(q)[0]
    (q, k), _, rstd = run(q, k, weight_q, weight_k, grid, num_heads, eps, offset)
    return q, k, rstd


def _qk_forward_fake(q, k, weight_q, weight_k, grid, num_heads, eps, offset):
    shape = (*q.shape[:2], num_heads, q.shape[2] // num_heads)
    return q.new_empty(shape), k.new_empty(shape), q.new_empty(2, *shape[:2], dtype=wide(q.dtype))


def _qk_backward(dq, dk, q, k, weight_q, weight_k, rstd, grid, num_heads, offset, parameters):
    dq, dk, dweight = pair(q)[1](dq, dk, q, k, weight_q, weight_k, rstd, grid, num_heads, offset, parameters)
    return dq, dk, q.new_empty(0) if dweight is None else dweight


def _qk_backward_fake(dq, dk, q, k, weight_q, weight_k, rstd, grid, num_heads, offset, parameters):
    dweight = rstd.new_empty(2, q.shape[2]) if parameters else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), dweight


def _qk_setup_context(ctx, inputs, output):
    q, k, weight_q, weight_k, ctx.grid, ctx.num_heads, _, ctx.offset = inputs
    ctx.save_for_backward(q, k, weight_q, weight_k, output[2])


def _qk_gradient(ctx, dq, dk, _):
    q, k, weight_q, weight_k, rstd = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[2:4])
    dq, dk, dweight = torch.ops.prfl.qk_norm_rope_backward(
        dq, dk, q, k, weight_q, weight_k, rstd, ctx.grid, ctx.num_heads, ctx.offset, parameters
    )
    dweights = (None, None)
    if parameters:
        dweights = dweight[0].to(weight_q.dtype), dweight[1].to(weight_k.dtype)
    return dq, dk, *dweights, None, None, None, None


def _check_rms(x, weight, eps, op="rms_norm"):
    expect(op, "weight", weight, expect_rows(op, "x", x)[2:], x)


def _check_rms_backward(dn, x, weight, rstd, parameters):
    _check_rms(x, weight, None, "rms_norm_backward")
    expect("rms_norm_backward", "dn", dn, x.shape, x)
    expect("rms_norm_backward", "rstd", rstd, (1, *x.shape[:2]), x, wide(x.dtype))


def _rms_forward(x, weight, eps):
    (out, _), _, rstd = pair(x, "rms_norm")[0](x, None, weight, None, None, 1, eps, 0)
    return out.flatten(2), rstd


def _rms_forward_fake(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(1, *x.shape[:2], dtype=wide(x.dtype))


def _rms_backward(dn, x, weight, rstd, parameters):
    dx, _, dweight = pair(x, "rms_norm")[1](dn, None, x, None, weight, None, rstd, None, 1, 0, parameters)
    return dx, x.new_empty(0) if dweight is None else dweight[0].to(weight.dtype, copy=True)


def _rms_backward_fake(dn, x, weight, rstd, parameters):
    return x.new_empty(x.shape), weight.new_empty(weight.shape) if parameters else x.new_empty(0)


def _rms_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


def _rms_gradient(ctx, dn, _):
    parameters = ctx.needs_input_grad[1]
    dx, dweight = torch.ops.prfl.rms_norm_backward(dn, *ctx.saved_tensors, parameters)
    return dx, dweight if parameters else None, None


def _quantized(q, k, weight_q, weight_k, grid, num_heads, eps, offset):
    out, quant, _ = pair(q, fp8=True)[0](q, k, weight_q, weight_k, grid, num_heads, eps, offset, True)
    return *out, *quant


def _quantized_fake(q, k, weight_q, weight_k, grid, num_heads, eps, offset):
    shape = (*q.shape[:2], num_heads, q.shape[2] // num_heads)
    out = [a.new_empty(shape, dtype=E4M3) for a in (q, k)]
    return *out, *(a.new_empty(shape[:3], dtype=torch.float32) for a in (q, k))


_INPUTS = "Tensor q, Tensor k, Tensor weight_q, Tensor weight_k"
register(
    f"qk_norm_rope({_INPUTS}, int[3] grid, int num_heads, float eps, int offset) -> (Tensor, Tensor, Tensor)",
    *checked(_check, _qk_forward, _qk_forward_fake),
    _qk_gradient,
    _qk_setup_context,
)
register(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, {_INPUTS}, Tensor rstd, int[3] grid, int num_heads, "
    "int offset, bool parameters) -> (Tensor, Tensor, Tensor)",
    *checked(_check_backward, _qk_backward, _qk_backward_fake),
)
register(
    f"qk_norm_rope_fp8({_INPUTS}, int[3] grid, int num_heads, float eps, int offset)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    *checked(_check_fp8, _quantized, _quantized_fake),
)
register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    *checked(_check_rms, _rms_forward, _rms_forward_fake),
    _rms_gradient,
    _rms_setup_context,
)
register(
    "rms_norm_backward(Tensor dn, Tensor x, Tensor weight, Tensor rstd, bool parameters) -> (Tensor, Tensor)",
    *checked(_check_rms_backward, _rms_backward, _rms_backward_fake),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x.dtype.

    x [B, L, C], C > 0, weight [C], of any float dtypes. ValueError for shapes, dtypes or devices that do not
    fit.
    """
    return torch.ops.prfl.rms_norm(x, weight, eps)[0]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    grid: Grid,
    num_heads: int,
    eps: float = 1e-6,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q and k.

    q, k [B, L, C] of one float dtype (any strides: slices of one projection buffer too), weights [C] of any
    float dtype, C / num_heads a positive even number, grid (frames, rows, columns) of the whole sequence,
    offset + L <= frames * rows * columns. Returns q, k [B, L, num_heads, C / num_heads] in the dtype of the
    inputs. ValueError for what does not fit.
    """
    grid = list(grid)
    return torch.ops.prfl.qk_norm_rope(q, k, weight_q, weight_k, grid, num_heads, eps, offset)[:2]


def qk_norm_rope_fp8(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    grid: Grid,
    num_heads: int,
    eps: float = 1e-6,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qk_norm_rope as e4m3 q, k [B, L, H, D] and their float32 scales [B, L, H]. No gradient."""
    grid = list(grid)
    return torch.ops.prfl.qk_norm_rope_fp8(q, k, weight_q, weight_k, grid, num_heads, eps, offset)
