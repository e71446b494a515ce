"""The kernel pair behind qk_norm_rope and rms_norm: RMSNorm over the whole width, then rotation, optional.

    n    = x / sqrt(mean_C(x^2) + eps) * weight               over all C = H * D channels, not per head
    out  = rotate pairs (2i, 2i+1) of every head by angle_i(frame, row, column)

One pass over memory each way for q and k together. The two-dimensional grid has one program for every run
of tokens of a sample, as in add_norm; sums over tokens (d weight) are kept in registers over the run and
written once, torch adds the runs in a fixed order. A program reads the cosines of a token from a table
[largest side, D/2] by its frame, row and column, so no table of the whole sequence is made. Everything is
computed in float32, angles in float64; the result is rounded once.

`pair` gives the two functions of the implementation that runs, all of one signature.
"""

import torch
from torch import Tensor

from prfl_kernels import cpu_kernels, cuda_kernels, dispatch
from prfl_kernels.dispatch import CPU, CUDA, REFERENCE, TRITON, implementation
from prfl_kernels.fp8.e4m3 import E4M3, quantize_rows, row_scales
from prfl_kernels.jit import jit, tl, triton, unit_last, wide
from prfl_kernels.norm.triton_kernels import run_grid
from prfl_kernels.qk_norm_rope.rope import Grid, cos_sin, pairs_of, rotate

# Most warps of a program, as in add_norm: a row of 5,120 in float32, and two accumulators of d weight.
WARPS_FORWARD, WARPS_BACKWARD = 16, 8
# (warps, runs) that `prfl tune` tries beside the default, by the padded width.
CANDIDATES = {
    "qk_norm_rope forward": {
        (2048,): ((8, 528), (8, 264), (4, 528)),
        (8192,): ((16, 528), (8, 264), (8, 528)),
    },
    "qk_norm_rope backward": {
        (2048,): ((8, 264), (8, 1056)),
        (8192,): ((8, 132), (8, 528)),
    },
}


def _turns(x, grid, num_heads, offset):
    """Cosines and sines [L, 1, D/2] of the tokens of x [B, L, C]."""
    tables = cos_sin(x.shape[2] // num_heads, tuple(grid), True, x.device, wide(x.dtype))
    return (a[offset : offset + x.shape[1], None] for a in tables)


def reference_forward(q, k, weight_q, weight_k, grid, num_heads, eps, offset, fp8=False):
    """`launch_forward` in plain torch, in float32 or wider."""
    out, quant, rstds = [None, None], [None, None], []
    for i, (x, weight) in enumerate(((q, weight_q), (k, weight_k))):
        if x is None:
            continue
        x_wide = x.to(wide(x.dtype))
        rstds.append(torch.rsqrt(x_wide.square().mean(-1) + eps))
        n = (x_wide * rstds[-1][..., None] * weight).unflatten(-1, (num_heads, -1))
        if grid is not None:
            n = rotate(n, *_turns(x, grid, num_heads, offset))
        out[i], quant[i] = quantize_rows(n) if fp8 else (n.to(x.dtype), None)
    return out, quant, None if fp8 else torch.stack(rstds)


def reference_backward(dq, dk, q, k, weight_q, weight_k, rstd, grid, num_heads, offset, parameters):
    """`launch_backward` in plain torch, in float32 or wider."""
    made, dweights = [None, None], rstd.new_zeros(2, q.shape[2]) if parameters else None
    for i, (d, x, weight) in enumerate(((dq, q, weight_q), (dk, k, weight_k))):
        if x is None:
            continue
        d = d.to(rstd.dtype).reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads)
        if grid is not None:
            cos, sin = _turns(x, grid, num_heads, offset)
            d = rotate(d, cos, -sin)
        d, x_hat = d.flatten(2), x.to(rstd.dtype) * rstd[i, ..., None]
        g = d * weight
        made[i] = ((g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd[i, ..., None]).to(x.dtype)
        if parameters:
            dweights[i] = (d * x_hat).sum((0, 1))
    return *made, dweights


@jit
def _angles(cos_ptr, sin_ptr, token, rows, columns, o_p, FRAME: tl.constexpr, ROW: tl.constexpr,
            D: tl.constexpr):  # fmt: skip
    """Cosines and sines [1, pairs] of a token."""
    frame = token // (rows * columns)
    row = token // columns % rows
    place = tl.where(o_p < FRAME, frame, tl.where(o_p < FRAME + ROW, row, token % columns))
    p = place * (D // 2) + o_p
    m_p = o_p < D // 2
    cos = tl.load(cos_ptr + p, mask=m_p, other=0.0)
    sin = tl.load(sin_ptr + p, mask=m_p, other=0.0)
    return cos[None, :], sin[None, :]


@jit
def _turned(x, cos, sin, H: tl.constexpr, D: tl.constexpr):
    """Pairs of x [H, D] turned by their angles."""
    even, odd = tl.split(tl.reshape(x, (H, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (H, D))


@jit
def _normalized(
    x_ptr, weight, out_ptr, quant_ptr, rstd_ptr, o_in, o_out, o_quant, o_rstd, m_x, m_h, cos, sin, eps,
    C: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + o_in, mask=m_x, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / C + eps)
    n = x * rstd * weight
    if ROPE:
        n = _turned(n, cos, sin, HP, DP)
    if quant_ptr is not None:  # e4m3 with one scale a token and head
        quant = row_scales(n, 1)
        n = n / quant[:, None]
        tl.store(quant_ptr + o_quant, quant, mask=m_h)
    tl.store(out_ptr + o_out, n.to(out_ptr.dtype.element_ty), mask=m_x)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + o_rstd, rstd)


@jit
def _forward(
    q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, cos_ptr, sin_ptr, out_q_ptr, out_k_ptr, quant_q_ptr,
    quant_k_ptr, rstd_q_ptr, rstd_k_ptr, q_b, q_l, k_b, k_l, L, run, offset, rows, columns, eps,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    FRAME: tl.constexpr, ROW: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * run
    o_h, o_d = tl.arange(0, HP), tl.arange(0, DP)
    m_h = o_h < H
    m_x = m_h[:, None] & (o_d < D)[None, :]
    o_x = o_h[:, None] * D + o_d[None, :]
    weight_q = tl.load(weight_q_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    if k_ptr is not None:
        weight_k = tl.load(weight_k_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    for i in range(0, tl.minimum(run, L - first)):
        l = first + i
        row = b * L + l
        if ROPE:
            cos, sin = _angles(
                cos_ptr, sin_ptr, (offset + l).to(tl.int32), rows, columns, tl.arange(0, DP // 2),
                FRAME, ROW, D,
            )  # fmt: skip
        else:
            cos, sin = 0.0, 0.0
        _normalized(
            q_ptr, weight_q, out_q_ptr, quant_q_ptr, rstd_q_ptr, b * q_b + l * q_l + o_x,
            row * (H * D) + o_x, row * H + o_h, row, m_x, m_h, cos, sin, eps, H * D, HP, DP, ROPE,
        )  # fmt: skip
        if k_ptr is not None:
            _normalized(
                k_ptr, weight_k, out_k_ptr, quant_k_ptr, rstd_k_ptr, b * k_b + l * k_l + o_x,
                row * (H * D) + o_x, row * H + o_h, row, m_x, m_h, cos, sin, eps, H * D, HP, DP, ROPE,
            )  # fmt: skip


@jit
def _differentiated(
    d_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight, o_d, o_in, o_out, o_rstd, o_x, m_x, cos, sin,
    C: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    # n = x_hat weight, x_hat = x rstd;  dn = d turned back;  g = dn weight;
    # dx = rstd (g - x_hat mean(g x_hat)) = rstd (g - x rstd^2 mean(g x));  d weight = sum dn x_hat
    dn = tl.load(d_ptr + o_d, mask=m_x, other=0.0).to(tl.float32)
    if ROPE:
        dn = _turned(dn, cos, -sin, HP, DP)
    rstd = tl.load(rstd_ptr + o_rstd)
    x = tl.load(x_ptr + o_in, mask=m_x, other=0.0).to(tl.float32)
    dweight += dn * (x * rstd)  # before the sums below, so that dn leaves the registers
    g = dn * tl.load(weight_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(g * x, 1), 0) * (rstd * rstd) / C
    tl.store(dx_ptr + o_out, ((g - x * mean) * rstd).to(dx_ptr.dtype.element_ty), mask=m_x)
    return dweight


@jit
def _backward(
    dq_ptr, dk_ptr, q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, cos_ptr, sin_ptr, rstd_q_ptr, rstd_k_ptr,
    out_q_ptr, out_k_ptr, part_ptr,
    dq_b, dq_l, dk_b, dk_l, q_b, q_l, k_b, k_l, L, run, offset, rows, columns,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    FRAME: tl.constexpr, ROW: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * run
    o_h, o_d = tl.arange(0, HP), tl.arange(0, DP)
    m_x = (o_h < H)[:, None] & (o_d < D)[None, :]
    o_x = o_h[:, None] * D + o_d[None, :]
    dweight_q = tl.zeros([HP, DP], tl.float32)
    dweight_k = tl.zeros([HP, DP], tl.float32)
    for i in range(0, tl.minimum(run, L - first)):
        l = first + i
        row = b * L + l
        if ROPE:
            cos, sin = _angles(
                cos_ptr, sin_ptr, (offset + l).to(tl.int32), rows, columns, tl.arange(0, DP // 2),
                FRAME, ROW, D,
            )  # fmt: skip
        else:
            cos, sin = 0.0, 0.0
        dweight_q = _differentiated(
            dq_ptr, q_ptr, weight_q_ptr, rstd_q_ptr, out_q_ptr, dweight_q, b * dq_b + l * dq_l + o_x,
            b * q_b + l * q_l + o_x, row * (H * D) + o_x, row, o_x, m_x, cos, sin, H * D, HP, DP, ROPE,
        )  # fmt: skip
        if k_ptr is not None:
            dweight_k = _differentiated(
                dk_ptr, k_ptr, weight_k_ptr, rstd_k_ptr, out_k_ptr, dweight_k,
                b * dk_b + l * dk_l + o_x, b * k_b + l * k_l + o_x, row * (H * D) + o_x, row, o_x, m_x,
                cos, sin, H * D, HP, DP, ROPE,
            )  # fmt: skip
    if part_ptr is not None:
        # Partial sums [B, runs, q | k, C].
        slot = (b * tl.num_programs(0) + tl.program_id(0)) * 2 * (H * D)
        tl.store(part_ptr + slot + o_x, dweight_q, mask=m_x)
        tl.store(part_ptr + slot + H * D + o_x, dweight_k, mask=m_x)


def _plan(
    kernel: str,
    what: str,
    x: Tensor,
    grid: Grid | None,
    num_heads: int,
    offset: int,
    max_warps: int,
    lanes: int = 256,
):
    """(launch grid, tables, integer arguments, constants and options) of both kernels.

    what: letters of the tensors there are, for `tuning`. lanes: values of a row for a warp, 32 times
    the 16 bytes of a thread at least.
    """
    batch, length, width = x.shape
    head_dim = width // num_heads
    heads, dims = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    default = min(max_warps, max(1, heads * dims // lanes))
    kind = 8 * x.element_size(), what
    launch, run, warps = run_grid(kernel, kind, batch, length, heads * dims, default)
    tables, places = (None, None), (1, 1)
    if grid is not None:
        tables, places = cos_sin(head_dim, tuple(grid), False, x.device, torch.float32), grid[1:]
    frame, row, _ = pairs_of(head_dim) if grid is not None else (0, 0, 0)
    options = {
        "H": num_heads, "D": head_dim, "HP": heads, "DP": dims, "FRAME": frame, "ROW": row,
        "ROPE": grid is not None, "num_warps": warps, "enable_fp_fusion": True,
    }  # fmt: skip
    return launch, tables, (length, run, offset, *places), options


def launch_forward(
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
    """([q, k] out [B, L, H, D], their e4m3 scales [B, L, H] if fp8, 1/rms [2, B, L] if not).

    Without grid there is no rotation; without k only q is made, and its 1/rms is [1, B, L].
    """
    q, k, weight_q, weight_k = (unit_last(a) for a in (q, k, weight_q, weight_k))
    shape = (*q.shape[:2], num_heads, q.shape[2] // num_heads)
    dtype = E4M3 if fp8 else q.dtype
    out = [None if a is None else a.new_empty(shape, dtype=dtype) for a in (q, k)]
    quant = [a.new_empty(shape[:3], dtype=torch.float32) if fp8 else None for a in (q, k)]
    rstd = None if fp8 else q.new_empty(1 if k is None else 2, *shape[:2], dtype=torch.float32)
    if q.numel():
        launch, tables, integers, options = _plan(
            "qk_norm_rope forward", "q" + "k" * (k is not None) + "8" * fp8, q, grid, num_heads, offset,
            WARPS_FORWARD, 512 if fp8 else 256,
        )  # fmt: skip
        _forward[launch](
            q, k, weight_q, weight_k, *tables, *out, *quant,
            *((None, None) if fp8 else (rstd[0], rstd[-1])),
            *q.stride()[:2], *(k if k is not None else q).stride()[:2], *integers, eps, **options,
        )  # fmt: skip
    return out, quant, rstd


def launch_backward(
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
    """(d q, d k [B, L, C], d weights [2, C] in float32 if `parameters`) of `launch_forward`."""
    q, k, weight_q, weight_k = (unit_last(a) for a in (q, k, weight_q, weight_k))
    dq, dk = (None if a is None else unit_last(a.flatten(2)) for a in (dq, dk))
    out = [None if a is None else a.new_empty(a.shape) for a in (q, k)]
    dweight = q.new_zeros(2, q.shape[2], dtype=torch.float32) if parameters else None
    if q.numel():
        launch, tables, integers, options = _plan(
            "qk_norm_rope backward", "q" + "k" * (k is not None) + "p" * parameters, q, grid, num_heads,
            offset, WARPS_BACKWARD,
        )  # fmt: skip
        part = None
        if parameters:
            part = q.new_empty(q.shape[0], launch[0], 2, q.shape[2], dtype=torch.float32)
        other = [q, dq] if k is None else [k, dk]
        _backward[launch](
            dq, dk, q, k, weight_q, weight_k, *tables, rstd[0], rstd[-1], *out, part,
            *dq.stride()[:2], *other[1].stride()[:2], *q.stride()[:2], *other[0].stride()[:2],
            *integers, **options,
        )  # fmt: skip
        if parameters:
            dweight = part.sum((0, 1))
    return *out, dweight


IMPLEMENTATIONS = {
    REFERENCE: (reference_forward, reference_backward),
    CPU: (cpu_kernels.qk_norm_rope_forward, cpu_kernels.qk_norm_rope_backward),
    TRITON: (launch_forward, launch_backward),
    CUDA: (cuda_kernels.qk_norm_rope_forward, cuda_kernels.qk_norm_rope_backward),
}
for _op in ("rms_norm", "qk_norm_rope"):
    dispatch.register(_op, dispatch.common(IMPLEMENTATIONS))


def pair(x: Tensor, op: str = "qk_norm_rope", fp8: bool = False):
    """(forward, backward) of what runs for x, to e4m3 if fp8."""
    return IMPLEMENTATIONS[implementation(op, x, fp8)]
