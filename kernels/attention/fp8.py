"""Softmax attention on e4m3 queries, keys and values, for rollouts: forward only, no mask.

    s   = scale * q_scale[i] * k_scale[j] * sum_d q8[i, d] * k8[j, d]
    out = v_scale[d] * sum_j softmax(s)[i, j] * v8[j, d],   lse[i] = log sum_j exp(s[i, j])

q8 [B, Lq, H, D] and k8 [B, Lk, H, D] are e4m3 with positive float32 scales [B, Lq, H] and
[B, Lk, H], as qk_norm_rope_fp8 makes them; D is 64 or 128. v8 [B, H, D, padded Lk] is e4m3 with
float32 scales [B, H, D], as `quantize_values` makes it. out [B, Lq, H, D] is bfloat16, lse [B, H, Lq]
float32. The softmax is online, in float32 and base 2, over blocks of 128 keys.

Values are stored by channel because the fp8 tensor cores of sm_90 want both operands along the
summed dimension. Inside every group of 16 keys they are in the order 0 1 8 9 2 3 10 11 4 5 12 13
6 7 14 15: a thread that holds the scores of keys 0 1 8 9 then feeds its own registers to the next
product, where the plain order takes 16 shuffles, 16 selects and 16 byte permutations a thread and
block.

The weights p <= 1 are multiplied by 256 before they become e4m3: down to 2^-14 they keep its full
precision, down to 2^-18 they are not zero, and a power of two changes no other bit.

Two-level accumulation: these tensor cores add with about 14 bits, which spoils sums over tens of
thousands of keys (benchmarks/fp8_error.py). So each block's p v is a product of its own, of four
chained instructions of 32 keys that start at zero, and is added to the float32 accumulator in
registers, by the multiply-add that the online softmax needs anyway. For tl.dot that is a dot without
accumulator whose max_num_imprecise_acc is the block. What Triton makes of other choices on sm_90:
with the accumulator as an argument and the default, 2^30, all blocks are one chain; with 32 every
instruction gets its own 64 registers and additions, and they spill; with 0 the sum is folded into a
dot on 16-bit tensor cores. Scores are one product of D, 2 or 4 instructions.
Source: FlashAttention-3 (Shah et al. 2024); flash-attention pull request 2250; DeepSeek-V3
technical report, section 3.3.2.
"""

import math

import torch
from torch import Tensor

from prfl_kernels import dispatch, tuning
from prfl_kernels.attention import cuda as attention_hopper
from prfl_kernels.checks import expect, expect_float, expect_rank
from prfl_kernels.declare import operation
from prfl_kernels.dispatch import REFERENCE, TRITON, implementation, record
from prfl_kernels.fp8.e4m3 import E4M3, forbid_gradient, never
from prfl_kernels.jit import jit, launch, tl, triton

HEAD_DIMS = (64, 128)
# 128 x 128 tiles on 8 warps: 255 registers at D = 128 (237 with one level of sums) and none
# spilled, one program an SM, so that three stages of keys and values (113 KiB) cost no more than two.
# With 4 warps they spill, warp_specialize or not.
BLOCK_N = 128
# Queries, warps and stages of a program; and what `prfl tune` tries beside, by D.
FORWARD = 128, 8, 3
CANDIDATES = {"attention_fp8": {(128,): ((128, 8, 2), (64, 4, 2), (64, 4, 3))}}
P_BITS = 8  # p is stored as p * 2^8


def _interleaved(v: Tensor) -> Tensor:
    """Keys, the last dimension of v, from their natural order to that of v8."""
    return v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def _natural(v: Tensor) -> Tensor:
    """Keys, the last dimension of v, from the order of v8 to their natural order."""
    return v.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def _exact_product(a: Tensor, b: Tensor, acc: Tensor | None = None) -> Tensor:
    return a @ b if acc is None else acc + a @ b


def attention_fp8_reference(
    q8: Tensor,
    q_scale: Tensor,
    k8: Tensor,
    k_scale: Tensor,
    v8: Tensor,
    v_scale: Tensor,
    scale: float,
    product=_exact_product,
    two_level: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out float32 [B, Lq, H, D], lse [B, H, Lq]) in plain torch, with every rounding of the kernel.

    product(a, b, acc) multiplies e4m3 values held as float32 (benchmarks/hopper_product.py emulates the
    tensor cores); without two_level the accumulator goes through all of them.
    """
    q, k = (a.float().transpose(1, 2) for a in (q8, k8))  # [B, H, L, D]
    v = _natural(v8.float()).mT  # [B, H, padded Lk, D]
    row = (q_scale * (scale * math.log2(math.e))).mT[..., None]  # [B, H, Lq, 1]
    column = k_scale.mT[..., None, :]  # [B, H, 1, Lk]
    top = torch.full_like(row, float("-inf"))
    total, acc = torch.zeros_like(row), torch.zeros_like(q)
    for j in range(0, k.shape[2], BLOCK_N):
        block = slice(j, min(j + BLOCK_N, k.shape[2]))
        t = product(q, k[:, :, block].mT) * column[..., block]
        new = torch.maximum(top, t.amax(-1, keepdim=True) * row)
        alpha = torch.exp2(top - new)
        p = torch.exp2(t * row - (new - P_BITS))
        total = total * alpha + p.sum(-1, keepdim=True)
        p = p.to(E4M3).float()
        if two_level:
            acc = acc * alpha + product(p, v[:, :, block])
        else:
            acc = product(p, v[:, :, block], acc * alpha)
        top = new
    out = acc / total * v_scale[:, :, None]
    return out.transpose(1, 2), ((top + torch.log2(total) - P_BITS) * math.log(2))[..., 0]


@jit
def _step(q, k, v, k_scale, row, top, total, acc, m_n, BITS: tl.constexpr, MASKED: tl.constexpr):
    """One block of keys: q [M, D], k [N, D], v [D, N], k_scale and mask [N], the rest [M]."""
    M: tl.constexpr = q.shape[0]
    N: tl.constexpr = k.shape[0]
    t = tl.dot(q, tl.trans(k)) * k_scale[None, :]
    if MASKED:
        t = tl.where(m_n[None, :], t, float("-inf"))
    new = tl.maximum(top, tl.max(t, 1) * row)
    alpha = tl.exp2(top - new)
    p = tl.exp2(t * row[:, None] - (new - BITS)[:, None])
    total = total * alpha + tl.sum(p, 1)
    # Keys in the order of v8: bits h c1 c0 e of a key's index become c1 c0 h e.
    p = tl.reshape(p.to(tl.float8e4nv), (M, N // 16, 2, 4, 2))
    p = tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (M, N))
    acc = acc * alpha[:, None] + tl.dot(p, tl.trans(v), max_num_imprecise_acc=N)
    return new, total, acc


@jit
def _forward_kernel(
    q_desc, k_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,
    Lq, Lk, H, padded, factor, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    first = tl.program_id(0) * M
    o_m, o_n, o_d = first + tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    m_m = o_m < Lq
    o_q = (b.to(tl.int64) * Lq + o_m) * H + h
    # Rows and keys past the end of a sample belong to the next one: never stored, masked.
    q = q_desc.load([b * Lq + first, h * D])
    row = tl.load(q_scale_ptr + o_q, mask=m_m, other=1.0) * factor
    k_scale_ptr += bh.to(tl.int64) * padded
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    full = Lk // N * N
    for j in range(0, full, N):
        k = k_desc.load([b * Lk + j, h * D])
        v = v_desc.load([bh * D, j])
        k_scale = tl.load(k_scale_ptr + j + o_n)
        top, total, acc = _step(q, k, v, k_scale, row, top, total, acc, o_n, BITS, False)
    if full < Lk:
        k = k_desc.load([b * Lk + full, h * D])
        v = v_desc.load([bh * D, full])
        k_scale = tl.load(k_scale_ptr + full + o_n)
        top, total, acc = _step(q, k, v, k_scale, row, top, total, acc, full + o_n < Lk, BITS, True)
    v_scale = tl.load(v_scale_ptr + bh.to(tl.int64) * D + o_d)
    out = acc * (1.0 / total)[:, None] * v_scale[None, :]
    tl.store(out_ptr + o_q[:, None] * D + o_d[None, :], out.to(tl.bfloat16), mask=m_m[:, None])
    lse = (top + tl.log2(total) - BITS) * 0.6931471805599453
    tl.store(lse_ptr + bh.to(tl.int64) * Lq + o_m, lse, mask=m_m)


@jit
def _quantize_kernel(
    v_ptr, inverse_ptr, out_ptr, v_b, v_l, v_h, L, H, padded, D: tl.constexpr, N: tl.constexpr
):
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * N
    o_l, o_d = first + tl.arange(0, N), tl.arange(0, D)
    p_v = v_ptr + bh // H * v_b + bh % H * v_h + o_l.to(tl.int64)[:, None] * v_l + o_d[None, :]
    v = tl.load(p_v, mask=(o_l < L)[:, None], other=0.0).to(tl.float32)
    v = (v * tl.load(inverse_ptr + bh * D + o_d)[None, :]).to(tl.float8e4nv)
    v = tl.permute(tl.reshape(v, (N // 16, 2, 4, 2, D)), (4, 0, 2, 1, 3))
    p_out = out_ptr + (bh * D + o_d[:, None]) * padded + o_l[None, :]
    tl.store(p_out, tl.reshape(v, (D, N)))


def padded_length(length: int) -> int:
    """Keys of v8: `length` rounded up to whole blocks."""
    return -(-length // BLOCK_N) * BLOCK_N


def launch_quantize(v: Tensor, inverse: Tensor, padded: int) -> Tensor:
    """e4m3 [B, H, D, padded] of v [B, L, H, D] times inverse [B, H, D], in the order of v8."""
    v = v if v.stride(-1) == 1 else v.contiguous()
    batch, length, heads, dim = v.shape
    out = v.new_empty(batch, heads, dim, padded, dtype=E4M3)
    launch(
        _quantize_kernel, (padded // BLOCK_N, batch * heads),
        v, inverse, out, *v.stride()[:3], length, heads, padded, dim, BLOCK_N,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def launch_forward(
    q8: Tensor,
    q_scale: Tensor,
    k8: Tensor,
    k_scale: Tensor,
    v8: Tensor,
    v_scale: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as in the head of this file."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, length, heads, dim = q8.shape
    keys, padded = k8.shape[1], v8.shape[3]
    key = dim, tuning.bucket(length), tuning.bucket(keys)
    rows, warps, stages = tuning.choice("attention_fp8", key, FORWARD, q8.device)
    out = q8.new_empty(q8.shape, dtype=torch.bfloat16)
    lse = q8.new_empty(batch, heads, length, dtype=torch.float32)
    # By head, so that a block's scales are one run of memory; padding is any finite number.
    by_head = k_scale.new_ones(batch, heads, padded)
    by_head[..., :keys] = k_scale.mT
    descriptors = [
        TensorDescriptor.from_tensor(a.contiguous().view(-1, heads * dim), [block, dim])
        for a, block in ((q8, rows), (k8, BLOCK_N))
    ]
    values = TensorDescriptor.from_tensor(v8.contiguous().view(-1, padded), [dim, BLOCK_N])
    launch(
        _forward_kernel, (triton.cdiv(length, rows), batch * heads),
        *descriptors, values, q_scale.contiguous(), by_head, v_scale.contiguous(), out, lse,
        length, keys, heads, padded, scale * math.log2(math.e), dim, rows, BLOCK_N, P_BITS,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def _plain(*inputs) -> tuple[Tensor, Tensor]:
    out, lse = attention_fp8_reference(*inputs)
    return out.to(torch.bfloat16, memory_format=torch.contiguous_format), lse.contiguous()


_common = dispatch.common({REFERENCE: _plain, TRITON: launch_forward}, e4m3=True)
dispatch.register("attention_fp8", [*_common, attention_hopper.IMPLEMENTATION_FP8])


def _expect_head_dim(op: str, dim: int) -> None:
    if dim not in HEAD_DIMS:
        raise ValueError(f"{op}: got head dim {dim}, want 64 or 128")


@operation("attention_fp8", never, forbid_gradient("attention_fp8"))
def _attention_fp8(
    fake: bool, q8: Tensor, q_scale: Tensor, k8: Tensor, k_scale: Tensor, v8: Tensor, v_scale: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "attention_fp8"
    batch, length, heads, dim = expect_rank(op, "q8", q8, "B, Lq, H, D")
    keys = expect_rank(op, "k8", k8, "B, Lk, H, D")[1]
    _expect_head_dim(op, dim)
    if keys == 0:
        raise ValueError(f"{op}: got no keys, want at least one")
    if not scale > 0:
        raise ValueError(f"{op}: got scale {scale}, want a positive number")
    expect(op, "q8", q8, q8.shape, q8, E4M3)
    expect(op, "q_scale", q_scale, (batch, length, heads), q8, torch.float32)
    expect(op, "k8", k8, (batch, keys, heads, dim), q8, E4M3)
    expect(op, "k_scale", k_scale, (batch, keys, heads), q8, torch.float32)
    expect(op, "v8", v8, (batch, heads, dim, padded_length(keys)), q8, E4M3)
    expect(op, "v_scale", v_scale, (batch, heads, dim), q8, torch.float32)
    if fake or q8.numel() == 0:
        lse = q8.new_empty(batch, heads, length, dtype=torch.float32)
        return q8.new_empty(q8.shape, dtype=torch.bfloat16), lse
    return record(op, q8).forward(q8, q_scale, k8, k_scale, v8, v_scale, scale)


@operation("quantize_values", never, forbid_gradient("quantize_values"))
def _quantize_values(fake: bool, v: Tensor) -> tuple[Tensor, Tensor]:
    op = "quantize_values"
    batch, length, heads, dim = expect_rank(op, "v", v, "B, Lk, H, D")
    expect_float(op, "v", v.dtype)
    _expect_head_dim(op, dim)
    if length == 0:
        raise ValueError(f"{op}: got no keys, want at least one")
    padded = padded_length(length)
    if fake:
        out = v.new_empty(batch, heads, dim, padded, dtype=E4M3)
        return out, v.new_empty(batch, heads, dim, dtype=torch.float32)
    amax = torch.linalg.vector_norm(v, float("inf"), dim=1, dtype=torch.float32)  # [B, H, D]
    scale = torch.where(amax > 0, amax / torch.finfo(E4M3).max, 1.0)
    inverse = 1 / scale
    if v.numel() and implementation("attention_fp8", v) != REFERENCE:
        return launch_quantize(v, inverse, padded), scale
    out = v.new_zeros(batch, heads, dim, padded, dtype=torch.float32)
    out[..., :length] = v.permute(0, 2, 3, 1).float() * inverse[..., None]
    return _interleaved(out).to(E4M3), scale


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [B, H, D, padded Lk], float32 scales [B, H, D]) of v [B, Lk, H, D] for `attention_fp8`.

    One scale a channel: its largest value becomes 448. Keys are padded with zeros to whole blocks of
    128 and interleaved as the head of this file says. Without gradient.
    """
    return torch.ops.prfl.quantize_values(v)


def attention_fp8(
    q8: Tensor,
    q_scale: Tensor,
    k8: Tensor,
    k_scale: Tensor,
    v8: Tensor,
    v_scale: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out bfloat16 [B, Lq, H, D], lse float32 [B, H, Lq]) of softmax attention on e4m3 inputs.

    q8 [B, Lq, H, D] with scales [B, Lq, H] and k8 [B, Lk, H, D] with scales [B, Lk, H] come from
    qk_norm_rope_fp8, v8 and its scales from `quantize_values`; D is 64 or 128, `scale` 1 / sqrt(D)
    if None. Without gradient: an input that requires grad raises ValueError.
    """
    dim = expect_rank("attention_fp8", "q8", q8, "B, Lq, H, D")[3]
    scale = dim**-0.5 if scale is None else scale
    return torch.ops.prfl.attention_fp8(q8, q_scale, k8, k_scale, v8, v_scale, scale)
