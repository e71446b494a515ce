"""What the fused branches share: linear layers, the gradient of a gate without the branch's output, and
the choice of what a branch keeps.

A branch ends with x' = x + gate * (a W^T + b), gate [B, N] per sample. From the gradient d of x' and
the un-gated weight gradient G_b = d_b^T a_b of every sample b, kept in float32,

    da = d (gate * W),   dW = sum_b gate_b * G_b,   db = sum_b gate_b * sum_l d
    d gate_b = rowsum(W * G_b) + b * sum_l d        (gate * scales rows)

so that neither a W^T nor gate * d is needed, and d gate costs a pass over W instead of a product over
all tokens. Exact: d gate_n = sum_l d_ln (sum_k W_nk a_lk + b_n).
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_kernels.jit import wide


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in x.dtype; x [..., K], weight [N, K] and bias [N] of any float dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider, for [M, K] [K, N] or [B, M, K] [B, K, N].

    On CUDA the float32 sum of a product of 16-bit numbers is returned as it is; elsewhere torch has no
    such product and it is rounded to 16 bits on the way.
    """
    if a.is_cuda and a.element_size() == 2:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return (a @ b).to(wide(a.dtype))


def weight_gradients(d: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dW, db) in the dtypes of weight and bias, of d [B, L, N] at the output of `linear` of x [B, L, K]."""
    d, x = d.flatten(0, 1), x.flatten(0, 1)
    return wide_product(d.mT, x).to(weight.dtype), d.sum(0, dtype=wide(d.dtype)).to(bias.dtype)


def gated_input_gradient(d: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """da [B, L, K] in d.dtype: d [B, L, N] times weight [N, K] with rows scaled by gate [B, N]."""
    scaled = (gate.to(wide(d.dtype))[..., None] * weight).to(d.dtype)
    return torch.bmm(d, scaled)


def gated_weight_gradients(
    d: Tensor, gate: Tensor, a: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dW, db, d gate), each in the dtype of its tensor; a [B, L, K] is the input of the product."""
    dtype = wide(d.dtype)
    product = wide_product(d.mT, a)  # [B, N, K]
    total = d.sum(1, dtype=dtype)  # [B, N]
    dgate = (product * weight).sum(2) + bias * total
    gate_wide = gate.to(dtype)
    product *= gate_wide[..., None]
    dweight = product[0] if len(d) == 1 else product.sum(0)
    dbias = (gate_wide * total).sum(0)
    return dweight.to(weight.dtype), dbias.to(bias.dtype), dgate.to(gate.dtype)


def kept(op: str, modes: dict[str, tuple[str, ...]], keep: str | Collection[str]) -> Collection[str]:
    """The names behind a mode, or the names themselves; ValueError for what is neither."""
    names = modes.get(keep, ()) if isinstance(keep, str) else keep
    if keep not in modes if isinstance(keep, str) else not set(keep) <= set(modes["all"]):
        raise ValueError(f"{op}: got keep {keep!r}, want one of {', '.join(modes)} or of {modes['all']}")
    return names
