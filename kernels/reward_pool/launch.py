"""What an implementation gets: the tensors of one launch, allocated and checked by `op`.

x has unit last stride, all others are contiguous; x has at least one element. u, pooled and what follows from
them are float32, or float64 for float64 features.
"""

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """Fill pooled, lse and scores."""

    x: Tensor  # [B, L, C]
    u: Tensor  # [N, C]
    pooled: Tensor  # [B, N, C]
    lse: Tensor  # [B, N], log-sum-exp of the scores
    scores: Tensor  # [B, L, N]


class Backward(NamedTuple):
    """Fill dx and du, each if wanted, else None."""

    x: Tensor  # [B, L, C]
    u: Tensor  # [N, C]
    dpooled: Tensor  # [B, N, C]
    delta: Tensor  # [B, N], pooled . dpooled - d lse
    scores: Tensor  # [B, L, N]
    lse: Tensor  # [B, N]
    dx: Tensor | None  # [B, L, C] in the dtype of x
    du: Tensor | None  # [N, C]
