"""Small transformers with the names, shapes and calls of other codebases, for what patches them.

Official: the WanModel of Wan2.1 and HY-Video-PRFL; tokenwise=True: that of Wan2.2, whose modulation is one of
every token. Pool: HY-Video-PRFL's QueryAttention.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TEXT = 512


def wide(a):
    """In float32 or wider."""
    return a.to(torch.promote_types(a.dtype, torch.float32))


def attend(q, k, v, k_lens=None, window_size=(-1, -1)):
    """Attention of [B, L, H, D]: to the first k_lens[b] keys, and at most window_size tokens away."""
    length, keys = q.shape[1], k.shape[1]
    mask = torch.ones(len(q), 1, length, keys, dtype=torch.bool)
    if k_lens is not None:
        mask &= torch.arange(keys) < k_lens.view(-1, 1, 1, 1)
    if window_size != (-1, -1):
        mask &= (torch.arange(length)[:, None] - torch.arange(keys)).abs() <= window_size[0]
    q, k, v = (a.transpose(1, 2) for a in (q, k.to(q.dtype), v.to(q.dtype)))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def flash_attention(q, k, v, k_lens=None, window_size=(-1, -1)):
    """The same in 16 bits, whatever the tensors have, as the official one runs."""
    low = (a.bfloat16() for a in (q, k, v))
    return attend(*low, k_lens, window_size).to(q.dtype)


def table(head_dim, theta=10000.0):
    """Rotations [1024, D / 2] of the positions of an axis, those of frames first."""
    third = 2 * (head_dim // 6)
    parts = []
    for dim in (head_dim - 2 * third, third, third):
        speed = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(1024, dtype=torch.float64), speed)
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, 1)


def rotate(x, grid_sizes, freqs):
    """Every sample of x [B, L, H, D] turned by its own grid; what is behind its tokens stays."""
    made, half = [], x.shape[3] // 2
    third = half // 3
    for sample, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
        n = f * h * w
        frames, rows, columns = freqs.split([half - 2 * third, third, third], 1)
        shape = (f, h, w, -1)
        turns = torch.cat([
            frames[:f, None, None].expand(shape), rows[None, :h, None].expand(shape),
            columns[None, None, :w].expand(shape),
        ], 3).reshape(n, 1, half)  # fmt: skip
        pairs = torch.view_as_complex(sample[:n].double().unflatten(2, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turns).flatten(2).to(wide(sample).dtype)
        made.append(torch.cat([turned, wide(sample[n:])]))
    return torch.stack(made)


class RMS(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = wide(x)
        return (y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x) * self.weight


class Norm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(wide(x)).type_as(x)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, eps):
        super().__init__()
        self.num_heads, self.window_size = heads, (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMS(dim, eps), RMS(dim, eps)

    def heads(self, x):
        return x.unflatten(2, (self.num_heads, -1))

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k = (self.heads(norm(m(x))) for norm, m in ((self.norm_q, self.q), (self.norm_k, self.k)))
        q, k = rotate(q, grid_sizes, freqs), rotate(k, grid_sizes, freqs)
        how = dict(k_lens=seq_lens, window_size=self.window_size)
        return self.o(flash_attention(q, k, self.heads(self.v(x)), **how).flatten(2))


class CrossAttention(SelfAttention):
    def __init__(self, dim, heads, eps, image):
        super().__init__(dim, heads, eps)
        if image:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), RMS(dim, eps)

    def forward(self, x, context, context_lens):
        q, total = self.heads(self.norm_q(self.q(x))), 0
        if hasattr(self, "k_img"):
            image, context = context[:, :-TEXT], context[:, -TEXT:]
            k, v = self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image))
            total = flash_attention(q, k, v)
        k, v = self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))
        return self.o((total + flash_attention(q, k, v, k_lens=context_lens)).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, heads, eps, image, tokenwise):
        super().__init__()
        self.tokenwise = tokenwise
        self.norm1, self.norm2 = (Norm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = Norm(dim, eps)
        self.self_attn, self.cross_attn = (
            SelfAttention(dim, heads, eps), CrossAttention(dim, heads, eps, image),
        )  # fmt: skip
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, note=None):
        assert e.dtype == wide(e).dtype
        with torch.autocast(x.device.type, enabled=False):
            if self.tokenwise:
                a, b, c, d, f, g = (part.squeeze(2) for part in (self.modulation[None] + e).chunk(6, 2))
            else:
                a, b, c, d, f, g = (self.modulation + e).chunk(6, 1)
        x = x + self.self_attn(wide(self.norm1(x)) * (1 + b) + a, seq_lens, grid_sizes, freqs) * c
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + self.ffn(wide(self.norm2(x)) * (1 + f) + d) * g


class Official(nn.Module):
    def __init__(
        self, image=False, tokenwise=False, dim=48, heads=2, ffn_dim=80, layers=2, eps=1e-6, text_dim=12,
        image_dim=24,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.text_len, self.dim, self.tokenwise = (1, 2, 2), TEXT, dim, tokenwise
        self.patch_embedding = nn.Conv3d(36 if image else 16, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Linear(text_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(8, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, ffn_dim, heads, eps, image, tokenwise) for _ in range(layers)
        )
        self.head = nn.Linear(dim, 64)
        if image:
            self.img_emb = nn.Linear(image_dim, dim)
        self.freqs = table(dim // heads)

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None, **more):
        """Velocities of a list of latents [16, T, h, w], each [64, tokens]; t [B], or [B, seq_len]."""
        x = x if y is None else [torch.cat([u, v]) for u, v in zip(x, y, strict=True)]
        x = [self.patch_embedding(u[None]) for u in x]
        grid_sizes = torch.tensor([u.shape[2:] for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.shape[1] for u in x])
        x = torch.cat([F.pad(u, (0, 0, 0, seq_len - u.shape[1])) for u in x])
        if self.tokenwise and t.dim() == 1:
            t = t[:, None].expand(-1, seq_len)
        angles = (t / 1000).to(self.head.weight.dtype)[..., None] * torch.arange(1.0, 5.0)
        with torch.autocast("cpu", enabled=False):
            e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], -1)).unflatten(-1, (6, self.dim))
        context = self.text_embedding(torch.stack([F.pad(u, (0, 0, 0, TEXT - len(u))) for u in context]))
        if clip_fea is not None:
            context = torch.cat([self.img_emb(clip_fea), context], 1)
        for block in self.blocks:
            x = block(
                x, e=e, seq_lens=seq_lens, grid_sizes=grid_sizes, freqs=self.freqs, context=context,
                context_lens=None, **more,
            )  # fmt: skip
        return [u[: math.prod(g)].T for u, g in zip(self.head(x), grid_sizes.tolist(), strict=True)]


class Pool(nn.Module):
    def __init__(self, dim, num_queries=1, num_heads=4, dropout=0.0, return_type=None, layer_norm=False):
        super().__init__()
        self.num_queries, self.return_type = num_queries, return_type
        self.layer_norm, self.product_text = layer_norm, False
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)

    def forward(self, x, e=None, text=None):
        x = x if x.dim() == 3 else x[:, None]
        queries = self.queries.expand(len(x), -1, -1)
        queries = queries if e is None else queries + e
        out = self.multihead_attn(queries, x, x, need_weights=False)[0].mean(1)
        return out + queries if self.return_type == "query" else out
