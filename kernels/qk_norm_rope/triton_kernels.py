"""RMSNorm and rotation in Triton: one pass over memory each way for q and k together.

The two-dimensional grid has one program for every run of tokens of a sample, as in add_norm; sums over
tokens (d weight) stay in registers over the run and written once, torch adds the runs in a fixed order.
A program reads the cosines of a token from a table [largest side, D/2] by its frame, row and column, so no
table of the whole sequence is made. Everything is computed in float32, angles in float64; the result is
rounded once.
"""

import torch
from torch import Tensor

from prfl_kernels import rows
from prfl_kernels.fp8.e4m3 import row_scales
from prfl_kernels.jit import jit, launch, tl, triton
from prfl_kernels.qk_norm_rope.launch import Backward, Forward
from prfl_kernels.qk_norm_rope.rope import cos_sin, placing

CANDIDATES = rows.candidates("qk_norm_rope")


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


def _plan(way: rows.Way, what: str, a: Forward | Backward, fp8: bool = False) -> tuple:
    """(launch grid, tables, integer arguments, constants and options) of both kernels.

    what: letters of the tensors there are, for `tuning`.
    """
    _, length, width = a.q.shape
    head_dim, tables = width // a.num_heads, (None, None)
    heads, dims = triton.next_power_of_2(a.num_heads), triton.next_power_of_2(head_dim)
    kind = 8 * a.q.element_size(), "q" + "k" * (a.k is not None) + what
    least = 256 if not fp8 else 1024 if heads * dims == 4096 else 512  # with 512 of 4,096 q and k spill
    grid, run, options = rows.plan("qk_norm_rope", way, kind, a.q, heads * dims, least)
    if a.grid is not None:
        tables = cos_sin(head_dim, tuple(a.grid), False, a.q.device, torch.float32)
    place = placing(head_dim, a.grid, a.offset)
    constants = {
        "H": a.num_heads, "D": head_dim, "HP": heads, "DP": dims, "FRAME": place["frame_pairs"],
        "ROW": place["row_pairs"], "ROPE": a.grid is not None,
    }  # fmt: skip
    return grid, tables, (length, run, a.offset, place["rows"], place["columns"]), constants | options


def _strides(x: Tensor, other: Tensor | None) -> tuple[int, ...]:
    """Of samples and tokens, of x and of other, or of x twice."""
    return *x.stride()[:2], *(x if other is None else other).stride()[:2]


def forward(a: Forward) -> None:
    """Fill a launch."""
    grid, tables, integers, options = _plan("forward", "8" * a.fp8, a, a.fp8)
    launch(
        _forward, grid,
        a.q, a.k, a.weight_q, a.weight_k, *tables, a.out_q, a.out_k, a.quant_q, a.quant_k, a.rstd_q,
        a.rstd_k, *_strides(a.q, a.k), *integers, a.eps, **options,
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    what = "" if a.dweight is None else "p"
    grid, tables, integers, options = _plan("backward", what, a)
    part = None if a.dweight is None else a.dweight.new_empty(len(a.q), grid[0], *a.dweight.shape)
    dout_q, dout_k = (d if d is None else d.flatten(2) for d in (a.dout_q, a.dout_k))
    launch(
        _backward, grid,
        dout_q, dout_k, a.q, a.k, a.weight_q, a.weight_k, *tables, a.rstd_q, a.rstd_k, a.dq, a.dk, part,
        *_strides(dout_q, dout_k), *_strides(a.q, a.k), *integers, **options,
    )  # fmt: skip
    if part is not None:
        torch.sum(part, (0, 1), out=a.dweight)
