"""Learned-query pooling of the reward model, after folding the projections out of it.

    s = x u^T  [L, N],   p = softmax over L,   pooled = p^T x  [N, C]         for every sample

where the N = queries * heads rows of u are the folded queries: with the key projection Wk of head
h folded into its query, u_h = Wk_h^T (Wq_h query + bq_h) / sqrt(D), attention over keys Wk x + bk
has the scores x . u_h up to a constant that the softmax drops, and the value projection can be
applied to the pooled vector instead of to every token. 4 L C N operations instead of 4 L C^2 for
the keys and values of torch.nn.MultiheadAttention, and neither is ever stored.
"""

import torch
from torch import Tensor

from prfl_kernels.modulate import wide


def reward_pool(x: Tensor, u: Tensor) -> Tensor:
    """Pooled features [B, N, C], float32 or wider, from x [B, L, C] and folded queries u [N, C]."""
    x = x.to(wide(x.dtype))
    p = torch.softmax(x @ u.to(x.dtype).T, dim=1)  # [B, L, N]
    return p.transpose(1, 2) @ x
