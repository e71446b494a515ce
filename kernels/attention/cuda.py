"""Attention forward in CUDA C++ for an H100 (csrc/cuda/attention_hopper.cu): what `attention` runs as "cuda".

The launcher picks the tile by the number of keys; up to 1,024, as in cross-attention, a block computes many
tiles of queries.

`forward` has the contract of triton_kernels.forward without repeats and `launch_forward_fp8` that of
fp8.launch_forward; head dim 128. Out and lse are those of every other implementation up to the order of sums,
so a backward of theirs follows this forward.
"""

from functools import partial

import torch
from torch import Tensor

from prfl_kernels import cuda_kernels
from prfl_kernels import extension as compiled
from prfl_kernels.attention.repeats import forward_with_repeats
from prfl_kernels.attention.triton_kernels import addressable
from prfl_kernels.dispatch import CUDA, Implementation, requires

HEAD_DIM = 128


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, 128], lse [B, H, Lq]) in bfloat16, of at least one query and key; scale > 0."""
    q, k, v = (addressable(a) for a in (q, k, v))
    batch, queries, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    cuda_kernels.launch(
        "attention_hopper_forward", q=q, k=k, v=v, out=out, lse=lse, batch=batch, queries=queries,
        keys=k.shape[1], heads=heads, scale=scale,
    )  # fmt: skip
    return out, lse


def launch_forward_fp8(
    q8: Tensor,
    q_scale: Tensor,
    k8: Tensor,
    k_scale: Tensor,
    v8: Tensor,
    v_scale: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as fp8.launch_forward."""
    q8, k8 = addressable(q8), addressable(k8)
    batch, queries, heads, _ = q8.shape
    out = q8.new_empty(q8.shape, dtype=torch.bfloat16)
    lse = q8.new_empty(batch, heads, queries, dtype=torch.float32)
    # By head, so that a block's scales are one run of memory; padding is any finite number.
    by_head = k_scale.new_ones(batch, heads, v8.shape[3])
    by_head[..., : k8.shape[1]] = k_scale.mT
    cuda_kernels.launch(
        "attention_hopper_fp8_forward", q=q8, q_scale=q_scale.contiguous(), k=k8, k_scale=by_head,
        v=v8.contiguous(), v_scale=v_scale.contiguous(), out=out, lse=lse, batch=batch, queries=queries,
        keys=k8.shape[1], heads=heads, scale=scale,
    )  # fmt: skip
    return out, lse


# Written for capability 9.0 alone.
_on_hopper = partial(
    requires, "cuda", (9, 9), head_dims=(HEAD_DIM,), build=lambda device: compiled.absence(CUDA, device)
)
_forward, _backwards = forward_with_repeats(forward), ("fa3", "fa3_hub", "cudnn", "triton")
_what, _probe = "own CUDA C++ kernel", _on_hopper(dtypes=(torch.bfloat16,))
IMPLEMENTATION = Implementation(CUDA, _what, _probe, _forward, backwards=_backwards)
IMPLEMENTATION_FP8 = Implementation(CUDA, _what, _on_hopper(), launch_forward_fp8)
