"""The operations in plain differentiable torch, in float32 or wider and rounded once: what kernels are
compared with where the operation itself is not to be asked."""

import torch
import torch.nn.functional as F

from prfl_kernels.jit import wide
from prfl_kernels.qk_norm_rope.rope import rope_angles, rotate


def norm_reference(x, scale, shift, base, eps, out_dtype):
    """LN(x) (base + scale) + shift; scale and shift [B, C], or [C] for all."""
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]
    n = F.layer_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=eps)
    return (n * (base + scale) + shift).to(out_dtype)


def gated_add_reference(x, y, gate):
    dtype = wide(x.dtype)
    y = y.to(dtype) if gate is None else y * gate[:, None]
    return (x.to(dtype) + y).to(x.dtype)


def rms_norm_reference(x, weight, eps):
    x_wide = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * weight).to(x.dtype)


def rope_reference(x, weight, grid, num_heads, eps, offset):
    """RMSNorm and rotation of one of q and k, in float32 or wider."""
    angles = rope_angles(x.shape[2] // num_heads, grid)[offset : offset + x.shape[1], None]
    n = rms_norm_reference(x.to(wide(x.dtype)), weight, eps).unflatten(-1, (num_heads, -1))
    return rotate(n, angles.cos().to(n), angles.sin().to(n))


def reward_pool_reference(x, u):
    """(pooled [B, N, C], log-sum-exp of the scores [B, N])."""
    x = x.to(wide(x.dtype))
    s = x @ u.to(x.dtype).T
    return torch.softmax(s, dim=1).mT @ x, s.logsumexp(1)
