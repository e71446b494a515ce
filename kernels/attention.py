"""Softmax attention without mask or dropout, self or cross.

    out = softmax(q k^T / sqrt(D)) v          q [B, Lq, H, D], k and v [B, Lk, H, D]

Layout is (batch, sequence, heads, head dim), as in FlashAttention. The implementation is
torch.nn.functional.scaled_dot_product_attention, which picks a flash kernel where there is one.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out [B, Lq, H, D] in q.dtype from q [B, Lq, H, D] and k, v [B, Lk, H, D] of one dtype."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
