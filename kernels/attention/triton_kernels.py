"""Softmax attention in Triton, forward and backward: what `attention` runs as "triton".

    s = scale q k^T,  p = exp(s - lse),  out = p v,  lse = log sum_j exp(s_j)
    delta = rowsum(dout * out) - dlse,   ds = p * (dout v^T - delta)
    dv = p^T dout,   dq = scale ds k,    dk = scale ds^T q

The score of a last key that counts n times is raised by log n: `last` is that over scale, to be added to
q k^T, and None for n = 1, which leaves no trace in the code.

q, out, dout [B, Lq, H, D], k and v [B, Lk, H, D] with D 64 or 128 (or 16 or 32), in bfloat16,
float16 or float32; lse and dlse [B, H, Lq] float32. Scores, softmax (base 2 inside) and sums are float32;
p and ds are rounded to the dtype of the inputs before they are multiplied. float32 inputs are multiplied
in full precision, on the CUDA cores: for checking.

Tensors are read and written through descriptors (TMA), which take any strides of 16 bytes, read zeros
past the end of a sample and write nothing there: queries need no mask. Keys past the end get weight
zero in one masked block after the full ones; a raised last key is always in it. The backward recomputes
p twice, once for dk and dv and once for dq, so that every sum stays in the registers of one program, or
is one of a few partial sums in a fixed order: no atomics, the same bits every time. Source: Dao,
"FlashAttention-2" (2023), in two kernels as in Triton's tutorial 06.
"""

import math

import torch
from torch import Tensor

from prfl_kernels import tuning
from prfl_kernels.dispatch import TRITON, Implementation, requires
from prfl_kernels.jit import absence, jit, launch, tl, triton

HEAD_DIMS = (16, 32, 64, 128)  # the first two for small models
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = math.log2(math.e)
# (queries, keys, warps, stages) of a program by D for values of 16 bits, and of float32 for any D; and what
# `prfl tune` tries beside, by bits of a value and D.
TILES = {
    "forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 2)},
    "keys": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2)},
    "queries": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2)},
}
FLOAT32 = (32, 32, 4, 1)
CANDIDATES = {
    "attention forward": {(16, 128): ((128, 64, 8, 3), (128, 64, 4, 2), (256, 64, 8, 2))},
    "attention keys": {(16, 128): ((64, 128, 8, 3), (64, 64, 4, 2))},
    "attention queries": {(16, 128): ((128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2))},
}
# Few keys, many queries: the queries of dk and dv are split into runs, summed in float32, until there are
# about as many programs as make four waves of an H100.
PROGRAMS = 4 * 132
ROWS = 64  # queries of a program that only adds up rows


@jit
def _dot(a, b):
    """a b in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@jit
def _forward_step(q, k_desc, v_desc, b, j, h, top, total, acc, factor, Lk, last, MASKED: tl.constexpr):
    """Add the keys from j on: q [M, D], top and total [M], acc [M, D]."""
    D: tl.constexpr = q.shape[1]
    N: tl.constexpr = k_desc.block_shape[2]
    t = _dot(q, k_desc.load([b, h, j, 0]).reshape(N, D).T)
    if last is not None:
        t += tl.where(j + tl.arange(0, N) == Lk - 1, last, 0.0)[None, :]
    if MASKED:
        t = tl.where((j + tl.arange(0, N) < Lk)[None, :], t, float("-inf"))
    new = tl.maximum(top, tl.max(t, 1) * factor)
    alpha = tl.exp2(top - new)
    p = tl.exp2(t * factor - new[:, None])
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = v_desc.load([b, h, j, 0]).reshape(N, D)
    acc = tl.dot(p.to(q.dtype), v, acc, input_precision="ieee")
    return new, total, acc


@jit
def _forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, Lq, Lk, H, factor, last,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    first = tl.program_id(0) * M
    q = q_desc.load([b, h, first, 0]).reshape(M, D)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    full = (Lk if last is None else Lk - 1) // N * N
    for j in range(0, full, N):
        top, total, acc = _forward_step(
            q, k_desc, v_desc, b, j, h, top, total, acc, factor, Lk, None, False
        )
    if full < Lk:
        top, total, acc = _forward_step(
            q, k_desc, v_desc, b, full, h, top, total, acc, factor, Lk, last, True
        )
    out = acc * (1.0 / total)[:, None]
    out_desc.store([b, h, first, 0], out.to(q.dtype).reshape(1, 1, M, D))
    o_m = first + tl.arange(0, M)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + bh.to(tl.int64) * Lq + o_m, lse, mask=o_m < Lq)


@jit
def _rows_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr, dout_b, dout_l, dout_h, Lq, H, padded,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta, [B, H, padded]: infinity and 0 past the end, so that p is 0 there."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    o_d = tl.arange(0, D)[None, :]
    m_m = o_m < Lq
    p_dout = dout_ptr + b * dout_b + h * dout_h + o_m.to(tl.int64)[:, None] * dout_l + o_d
    dout = tl.load(p_dout, mask=m_m[:, None], other=0.0).to(tl.float32)
    p_out = out_ptr + ((b * Lq + o_m[:, None]) * H + h) * D + o_d
    out = tl.load(p_out, mask=m_m[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * Lq + o_m, mask=m_m, other=0.0)
    lse = tl.load(lse_ptr + bh * Lq + o_m, mask=m_m, other=float("inf"))
    tl.store(delta_ptr + bh * padded + o_m, delta)
    tl.store(lse2_ptr + bh * padded + o_m, lse * 1.4426950408889634)


@jit
def _keys_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, lse2_ptr, delta_ptr, Lq, H, padded, run, factor,
    scale, last, last_key, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys over a run of queries, [runs B, H, Lk, D].

    Rows past the end are whatever exp2 makes of zeros and are not written.
    """
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    first = tl.program_id(0) * N
    k = k_desc.load([b, h, first, 0]).reshape(N, D)
    v = v_desc.load([b, h, first, 0]).reshape(N, D)
    o_m = bh.to(tl.int64) * padded + tl.arange(0, M)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    if last is not None:
        raised = tl.where(first + tl.arange(0, N) == last_key, last, 0.0)[:, None]
    begin = tl.program_id(2) * run
    for i in range(begin, tl.minimum(begin + run, Lq), M):
        q = q_desc.load([b, h, i, 0]).reshape(M, D)
        lse2 = tl.load(lse2_ptr + i + o_m)
        t = _dot(k, q.T)  # transposed, [N, M]
        if last is not None:
            t += raised
        p = tl.exp2(t * factor - lse2[None, :])
        dout = dout_desc.load([b, h, i, 0]).reshape(M, D)
        dv = tl.dot(p.to(q.dtype), dout, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + i + o_m)
        ds = p * (_dot(v, dout.T) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    b += tl.program_id(2) * (tl.num_programs(1) // H)
    dv_desc.store([b, h, first, 0], dv.to(dv_desc.dtype).reshape(1, 1, N, D))
    dk_desc.store([b, h, first, 0], (dk * scale).to(dk_desc.dtype).reshape(1, 1, N, D))


@jit
def _queries_step(
    q, dout, k_desc, v_desc, b, j, h, lse2, delta, dq, factor, Lk, last, MASKED: tl.constexpr
):
    D: tl.constexpr = q.shape[1]
    N: tl.constexpr = k_desc.block_shape[2]
    k = k_desc.load([b, h, j, 0]).reshape(N, D)
    t = _dot(q, k.T)
    if last is not None:
        t += tl.where(j + tl.arange(0, N) == Lk - 1, last, 0.0)[None, :]
    p = tl.exp2(t * factor - lse2[:, None])
    if MASKED:
        p = tl.where((j + tl.arange(0, N) < Lk)[None, :], p, 0.0)
    v = v_desc.load([b, h, j, 0]).reshape(N, D)
    ds = p * (_dot(dout, v.T) - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")


@jit
def _queries_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, lse2_ptr, delta_ptr, Lk, H, padded, factor, scale, last,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of M queries."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    first = tl.program_id(0) * M
    q = q_desc.load([b, h, first, 0]).reshape(M, D)
    dout = dout_desc.load([b, h, first, 0]).reshape(M, D)
    o_m = bh.to(tl.int64) * padded + first + tl.arange(0, M)
    lse2, delta = tl.load(lse2_ptr + o_m), tl.load(delta_ptr + o_m)
    dq = tl.zeros([M, D], tl.float32)
    full = (Lk if last is None else Lk - 1) // N * N
    for j in range(0, full, N):
        dq = _queries_step(q, dout, k_desc, v_desc, b, j, h, lse2, delta, dq, factor, Lk, None, False)
    if full < Lk:
        dq = _queries_step(q, dout, k_desc, v_desc, b, full, h, lse2, delta, dq, factor, Lk, last, True)
    dq_desc.store([b, h, first, 0], (dq * scale).to(q.dtype).reshape(1, 1, M, D))


def addressable(a: Tensor) -> Tensor:
    """`a`, or a copy where a descriptor cannot address it: rows of its last dimension have to be
    contiguous, strides whole multiples of 16 bytes and not zero, the start on 16 bytes."""
    unit = 16 // a.element_size()
    steps = [s for s, n in zip(a.stride()[:3], a.shape, strict=False) if n > 1]
    fits = a.stride(3) == 1 and all(s > 0 and s % unit == 0 for s in steps)
    return a if fits and a.storage_offset() % unit == 0 else a.contiguous()


def _descriptor(a: Tensor, rows: int):
    """`rows` tokens of one head of a [B, L, H, D], indexed as [B, H, L, D].

    In this order the dimensions of size 1 come first and Triton drops them from the load itself;
    with [B, L, H, D] it would hold the left operand of a product in registers, and _keys_kernel spills.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    a = a.transpose(1, 2)
    # The stride of a dimension of size 1 is arbitrary; a descriptor wants 16 bytes all the same.
    strides = [s if n > 1 else a.shape[3] for s, n in zip(a.stride(), a.shape, strict=True)]
    return TensorDescriptor(a, list(a.shape), [*strides[:3], 1], [1, 1, rows, a.shape[3]])


def _tile(kernel: str, q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a program."""
    bits, dim = 8 * q.element_size(), max(64, q.shape[3])
    key = bits, dim, tuning.bucket(q.shape[1]), tuning.bucket(k.shape[1])
    default = FLOAT32 if bits == 32 else TILES[kernel][dim]
    return tuning.choice(f"attention {kernel}", key, default, q.device)


def _last(scale: float, repeats: int) -> float | None:
    """What is added to q k^T of a last key that counts `repeats` times."""
    return None if repeats == 1 else math.log(repeats) / scale


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, D] in q.dtype, lse [B, H, Lq]) of at least one query and key; scale > 0. The last key
    counts `repeats` times."""
    q, k, v = (addressable(a) for a in (q, k, v))
    batch, length, heads, dim = q.shape
    m, n, warps, stages = _tile("forward", q, k)
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    launch(
        _forward_kernel, (triton.cdiv(length, m), batch * heads),
        *(_descriptor(a, rows) for a, rows in ((q, m), (k, n), (v, n), (out, m))), lse,
        length, k.shape[1], heads, scale * LOG2E, _last(scale, repeats), dim, m, n,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wants_q: bool = True,
    wants_kv: bool = True,
    repeats: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) of `forward`, None where not wanted. dlse [B, H, Lq] or None for zero."""
    q, k, v, dout = (addressable(a) for a in (q, k, v, dout))
    out, lse = out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    (batch, length, heads, dim), keys = q.shape, k.shape[1]
    last, last_key = _last(scale, repeats), None if repeats == 1 else keys - 1
    padded = triton.cdiv(length, 128) * 128  # whole blocks of every kernel
    lse2, delta = q.new_empty(2, batch, heads, padded, dtype=torch.float32)
    options = {"enable_fp_fusion": True}
    launch(
        _rows_kernel, (padded // ROWS, batch * heads),
        dout, out, lse, dlse, lse2, delta, *dout.stride()[:3], length, heads, padded, dim, ROWS,
        num_warps=4, **options,
    )  # fmt: skip
    dq = dk = dv = None
    if wants_kv:
        m, n, warps, stages = _tile("keys", q, k)
        blocks = triton.cdiv(length, m)
        runs = min(blocks, max(1, PROGRAMS // (triton.cdiv(keys, n) * batch * heads)))
        run = triton.cdiv(blocks, runs) * m
        runs = triton.cdiv(length, run)
        dtype = k.dtype if runs == 1 else torch.float32
        dk, dv = (k.new_empty(runs * batch, *k.shape[1:], dtype=dtype) for _ in range(2))
        held = ((q, m), (k, n), (v, n), (dout, m), (dk, n), (dv, n))
        launch(
            _keys_kernel, (triton.cdiv(keys, n), batch * heads, runs),
            *(_descriptor(a, rows) for a, rows in held), lse2, delta, length, heads, padded, run,
            scale * LOG2E, scale, last, last_key, dim, m, n, num_warps=warps, num_stages=stages, **options,
        )  # fmt: skip
        if runs > 1:
            dk, dv = (a.unflatten(0, (runs, batch)).sum(0).to(k.dtype) for a in (dk, dv))
    if wants_q:
        dq = q.new_empty(q.shape)
        m, n, warps, stages = _tile("queries", q, k)
        held = ((q, m), (k, n), (v, n), (dout, m), (dq, m))
        launch(
            _queries_kernel, (triton.cdiv(length, m), batch * heads),
            *(_descriptor(a, rows) for a, rows in held), lse2, delta, keys, heads, padded,
            scale * LOG2E, scale, last, dim, m, n, num_warps=warps, num_stages=stages, **options,
        )  # fmt: skip
    return dq, dk, dv


_probe = requires(capabilities=(8, math.inf), dtypes=DTYPES, head_dims=HEAD_DIMS, build=absence)
IMPLEMENTATION = Implementation(TRITON, "own Triton kernels", _probe, forward, backward)
