"""RMSNorm over the whole width and 3-D rotary position embedding of queries and keys.

    n    = x / sqrt(mean_C(x^2) + eps) * weight               over all C = H * D channels, not per head
    out  = rotate pairs (2i, 2i+1) of every head by angle_i(frame, row, column)

rope.py has the angles. Tokens run frame-major over grid = (frames, rows, columns); `offset` is the index of
the first token held here, for shards of a sequence. Norm and rotation run in float32 with angles computed in
float64 (the official code rotates in complex128); the result is rounded once.
Saved for the backward: q and k before the norm, the weights, and 1/rms of every token. `rms_norm` is the
norm alone, of one tensor.
Source: Wan2.1 `WanRMSNorm`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_kernels import dispatch
from prfl_kernels.checks import expect, expect_places, expect_rows
from prfl_kernels.declare import allocator, gradients_like, operation, or_empty
from prfl_kernels.dispatch import record
from prfl_kernels.fp8.e4m3 import E4M3, quantize_rows
from prfl_kernels.jit import unit_last, wide
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


_plain = reference_forward, reference_backward
for _op in ("rms_norm", "qk_norm_rope"):
    dispatch.register(_op, dispatch.room(_plain, cpu=cpu, triton=triton_kernels, cuda=cuda))


def forward(
    fill: Callable[[Forward], None] | None,
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
    """([q, k] out [B, L, H, D], their e4m3 scales [B, L, H] if fp8, 1/rms [2, B, L] if not), which
    fill(launch) computes unless it is None.

    Without grid there is no rotation; without k only q is made, and its 1/rms is [1, B, L].
    """
    (batch, length, width), new = q.shape, allocator(fill)
    shape = batch, length, num_heads, width // num_heads
    out = [a if a is None else new(a, *shape, dtype=E4M3 if fp8 else a.dtype) for a in (q, k)]
    quant = [new(q, *shape[:3], dtype=torch.float32) if fp8 and a is not None else None for a in (q, k)]
    rstd = None if fp8 else new(q, 1 if k is None else 2, batch, length, dtype=wide(q.dtype))
    if fill is not None and q.numel():
        inputs = unit_last(q), unit_last(k), unit_last(weight_q), unit_last(weight_k)
        fill(Forward(*inputs, *out, *quant, *_of_each(rstd), grid, num_heads, eps, offset))
    return out, quant, rstd


def backward(
    fill: Callable[[Backward], None] | None,
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
    """(d q, d k [B, L, C], d weights [2, C] as wide as rstd if `parameters`) of `forward`, which fill(launch)
    computes unless it is None.

    dq, dk [B, L, H, D] or [B, L, C].
    """
    (batch, length, width), new = q.shape, allocator(fill)
    made = [a if a is None else new(a, batch, length, width) for a in (q, k)]
    dweight = rstd.new_zeros(2, width) if parameters else None
    if fill is not None and q.numel():
        shape = batch, length, num_heads, width // num_heads
        dout = (d if d is None else unit_last(d if d.dim() == 4 else d.view(shape)) for d in (dq, dk))
        inputs = unit_last(q), unit_last(k), unit_last(weight_q), unit_last(weight_k)
        fill(Backward(*dout, *inputs, *_of_each(rstd.contiguous()), *made, dweight, grid, num_heads, offset))
    return *made, dweight


def _of_each(rstd: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """1/rms of q and of k, from [2, B, L], or from [1, B, L] without k."""
    return (None, None) if rstd is None else (*rstd.unbind(), None)[:2]


def _check(op, q, k, weight_q, weight_k, grid, num_heads, offset):
    _, length, width = shape = expect_rows(op, "q", q)
    expect(op, "k", k, shape, q, q.dtype)
    expect(op, "weight_q", weight_q, (width,), q)
    expect(op, "weight_k", weight_k, (width,), q)
    expect_places(op, grid, num_heads, offset, length, width)


def _setup_context(ctx, inputs, output):
    q, k, weight_q, weight_k, ctx.grid, ctx.num_heads, _, ctx.offset = inputs
    ctx.save_for_backward(q, k, weight_q, weight_k, output[2])


def _gradient(ctx, dq, dk, _):
    saved, parameters = ctx.saved_tensors, any(ctx.needs_input_grad[2:4])
    dq, dk, dweight = torch.ops.prfl.qk_norm_rope_backward(
        dq, dk, *saved, ctx.grid, ctx.num_heads, ctx.offset, parameters
    )
    dweights = (None, None)
    if parameters:
        dweights = dweight[0].to(saved[2].dtype), dweight[1].to(saved[3].dtype)
    return dq, dk, *dweights, None, None, None, None


@operation("qk_norm_rope", _gradient, _setup_context)
def _qk_norm_rope(
    fake: bool, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, grid: Grid, num_heads: int,
    eps: float, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check("qk_norm_rope", q, k, weight_q, weight_k, grid, num_heads, offset)
    fill = None if fake else record("qk_norm_rope", q).forward
    out, _, rstd = forward(fill, q, k, weight_q, weight_k, grid, num_heads, eps, offset)
    return *out, rstd


@operation("qk_norm_rope_backward")
def _qk_norm_rope_backward(
    fake: bool, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor,
    rstd: Tensor, grid: Grid, num_heads: int, offset: int, parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "qk_norm_rope_backward"
    _check(op, q, k, weight_q, weight_k, grid, num_heads, offset)
    batch, length, width = q.shape
    for name, a in (("dq", dq), ("dk", dk)):
        expect(op, name, a, (batch, length, num_heads, width // num_heads), q)
    expect(op, "rstd", rstd, (2, batch, length), q, wide(q.dtype))
    fill, inputs = None if fake else record("qk_norm_rope", q).backward, (q, k, weight_q, weight_k)
    return or_empty(q, *backward(fill, dq, dk, *inputs, rstd, grid, num_heads, offset, parameters))


@operation("qk_norm_rope_fp8")
def _qk_norm_rope_fp8(
    fake: bool, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, grid: Grid, num_heads: int,
    eps: float, offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check("qk_norm_rope_fp8", q, k, weight_q, weight_k, grid, num_heads, offset)
    fill = None if fake else record("qk_norm_rope", q, fp8=True).forward
    out, quant, _ = forward(fill, q, k, weight_q, weight_k, grid, num_heads, eps, offset, True)
    return *out, *quant


def rms_forward(fill: Callable[[Forward], None] | None, x: Tensor, weight: Tensor, eps: float):
    """(rms(x) [B, L, C], 1/rms [1, B, L]): `forward` of the norm alone."""
    (n, _), _, rstd = forward(fill, x, None, weight, None, None, 1, eps, 0)
    return n.flatten(2), rstd


def rms_backward(fill: Callable[[Backward], None] | None, dn, x, weight, rstd, parameters: bool):
    """(dx [B, L, C], d weight [C] as wide as rstd, or None) of `rms_forward`."""
    dx, _, dweight = backward(fill, dn, None, x, None, weight, None, rstd, None, 1, 0, parameters)
    return dx, dweight if dweight is None else dweight[0]


def _check_rms(op, x, weight):
    expect(op, "weight", weight, expect_rows(op, "x", x)[2:], x)


def _rms_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


def _rms_gradient(ctx, dn, _):
    return *torch.ops.prfl.rms_norm_backward(dn, *ctx.saved_tensors, ctx.needs_input_grad[1]), None


@operation("rms_norm", _rms_gradient, _rms_setup_context)
def _rms_norm(fake: bool, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_rms("rms_norm", x, weight)
    return rms_forward(None if fake else record("rms_norm", x).forward, x, weight, eps)


@operation("rms_norm_backward")
def _rms_norm_backward(
    fake: bool, dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, parameters: bool
) -> tuple[Tensor, Tensor]:
    op = "rms_norm_backward"
    _check_rms(op, x, weight)
    expect(op, "dn", dn, x.shape, x)
    expect(op, "rstd", rstd, (1, *x.shape[:2]), x, wide(x.dtype))
    fill = None if fake else record("rms_norm", x).backward
    dx, dweight = rms_backward(fill, dn, x, weight, rstd, parameters)
    return dx, *gradients_like(weight, dweight)


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
