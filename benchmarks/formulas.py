"""The operations in plain differentiable torch, in float32 or wider and rounded once: the peers and the truth
of the benchmark, and what tests compare kernels with. Sources stand beside the operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_kernels.jit import wide
from prfl_kernels.qk_norm_rope.rope import rope_angles


def layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, base: float, eps: float, dtype: torch.dtype
) -> Tensor:
    """LN(x) (base + scale) + shift in `dtype`; x [B, L, C], scale and shift [B, C], or [C] for all."""
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]
    return (F.layer_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=eps) * (base + scale) + shift).to(dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + y gate in the dtype of x; x and y [B, L, C], gate [B, C] or None for 1."""
    dtype = wide(x.dtype)
    return (x.to(dtype) + (y.to(dtype) if gate is None else y * gate[:, None])).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, not rounded to the dtype of x; x [..., C], weight [C]."""
    return F.rms_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=eps) * weight


def rotation(
    head_dim: int, grid: tuple[int, int, int], offset: int, length: int, device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, 1, D / 2] of tokens `offset` to offset + length of the grid."""
    angles = rope_angles(head_dim, grid)[offset : offset + length, None].to(device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def norm_rope(x: Tensor, weight: Tensor, heads: int, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """[B, L, H, D] in the dtype of x: RMSNorm of x [B, L, C], then the rotation of pairs of channels."""
    even, odd = rms_norm(x, weight, eps).unflatten(-1, (heads, -1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def bias_gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(h + bias), by tanh, in the dtype of h; h [..., C], bias [C]."""
    h_wide = h.to(wide(h.dtype))
    return F.gelu(h_wide if bias is None else h_wide + bias, approximate="tanh").to(h.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [B, L, H, D]: two products in the dtype of q, a softmax in float32 between."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    p = ((q @ k.mT).to(wide(q.dtype)) * q.shape[-1] ** -0.5).softmax(-1)
    return (p.to(v.dtype) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's fused attention."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def reward_pool(x: Tensor, u: Tensor) -> Tensor:
    """softmax over tokens of x u, times x: [B, N, C] in float32 or wider; x [B, L, C], u [N, C]."""
    x = x.to(wide(x.dtype))
    return (x @ u.to(x.dtype).T).softmax(1).mT @ x


def reward_pool_with_lse(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """... and the log-sum-exp [B, N] of the scores."""
    return reward_pool(x, u), (x.to(wide(x.dtype)) @ u.to(wide(x.dtype)).T).logsumexp(1)


def solver_step(x, x_last, m0, m1, velocity, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(next state, corrected state, x at noise 0), each [B, C, L]; columns [B, 9]."""
    sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0 = columns.T[..., None, None]
    m_t = x - sigma * velocity
    x_c = a_x * x + a_l * x_last + a_0 * m0 + a_1 * m1 + a_t * m_t
    return b_x * x_c + b_t * m_t + b_0 * m0, x_c, m_t


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values, and scales [...] in float32, of x [..., C]."""
    scale = x.float().abs().amax(-1) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale
