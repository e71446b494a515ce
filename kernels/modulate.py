"""LayerNorm with timestep modulation, and the affine LayerNorm before cross-attention.

    modulate(x, scale, shift)   = LN(x) * (1 + scale) + shift      x [B, L, C], scale and shift [B, C]
    layer_norm(x, weight, bias) = LN(x) * weight + bias            weight and bias [C]

The statistics and the affine part are computed in float32 (float64 for float64 input) whatever
the dtype of x; the result is rounded once, to out_dtype. Source: Peebles and Xie, "Scalable
Diffusion Models with Transformers" (adaLN); Wan2.1 uses eps 1e-6 in every block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and reductions run in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * (1 + scale) + shift.

    x [B, L, C] of any float dtype; scale, shift [B, C]; returns [B, L, C] in out_dtype
    (x.dtype if None).
    """
    x_wide = x.to(wide(x.dtype))
    n = F.layer_norm(x_wide, x.shape[-1:], eps=eps)
    return (n * (1 + scale[:, None]) + shift[:, None]).to(out_dtype or x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * weight + bias. x [B, L, C], weight and bias [C]; returns [B, L, C] in out_dtype."""
    dtype = wide(x.dtype)
    n = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return n.to(out_dtype or x.dtype)
