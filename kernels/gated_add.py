"""The end of a residual branch, together with the norm that the next branch begins with.

    gated_add(x, y, gate)          = x + gate * y          x, y [B, L, C], gate [B, C] or None (1)
    gated_add_modulate(x, y, ...)  = (x', modulate(x', scale, shift))   with x' = gated_add(x, y, gate)
    gated_add_norm(x, y, ...)      = (x', layer_norm(x', weight, bias))

The residual stream x keeps its own dtype; the sum is formed in float32 and rounded once.
"""

import torch
from torch import Tensor

from prfl_kernels.modulate import layer_norm, modulate, wide


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate * y in x.dtype. x, y [B, L, C] of any float dtypes; gate [B, C] or None for 1."""
    dtype = wide(x.dtype)
    y = y.to(dtype) if gate is None else y * gate[:, None]
    return (x.to(dtype) + y).to(x.dtype)


def gated_add_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', modulate(x', scale, shift)) with x' = x + gate * y. Shapes as in the two parts."""
    x = gated_add(x, y, gate)
    return x, modulate(x, scale, shift, eps, out_dtype)


def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', layer_norm(x', weight, bias)) with x' = x + gate * y. Shapes as in the two parts."""
    x = gated_add(x, y, gate)
    return x, layer_norm(x, weight, bias, eps, out_dtype)
