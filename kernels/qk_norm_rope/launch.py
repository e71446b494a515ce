"""What an implementation gets: the tensors and numbers of one launch, allocated and checked by `op`.

Inputs have unit last stride, outputs are contiguous; q has at least one element. Without grid there is no
rotation; without k the fields of k are None.
"""

from typing import NamedTuple

from torch import Tensor

from prfl_kernels.qk_norm_rope.rope import Grid


class Forward(NamedTuple):
    """Fill out, and quant (to e4m3) or rstd (1/rms, all other dtypes; the other is None)."""

    q: Tensor  # [B, L, C]
    k: Tensor | None
    weight_q: Tensor  # [C]
    weight_k: Tensor | None
    out_q: Tensor  # [B, L, H, D]
    out_k: Tensor | None
    quant_q: Tensor | None  # [B, L, H] float32
    quant_k: Tensor | None
    rstd_q: Tensor | None  # [B, L] float32 or wider
    rstd_k: Tensor | None
    grid: Grid | None
    num_heads: int
    eps: float
    offset: int

    @property
    def fp8(self) -> bool:
        return self.quant_q is not None


class Backward(NamedTuple):
    """Fill dq, dk and, where it is wanted, dweight, which comes as zeros."""

    dout_q: Tensor  # [B, L, H, D], of any strides but the last
    dout_k: Tensor | None
    q: Tensor  # [B, L, C]
    k: Tensor | None
    weight_q: Tensor  # [C]
    weight_k: Tensor | None
    rstd_q: Tensor  # [B, L] float32 or wider, contiguous
    rstd_k: Tensor | None
    dq: Tensor  # [B, L, C]
    dk: Tensor | None
    dweight: Tensor | None  # [2, C] in the dtype of rstd, of q and of k
    grid: Grid | None
    num_heads: int
    offset: int
