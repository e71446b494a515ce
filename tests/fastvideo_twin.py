"""A small transformer with the names, shapes and calls of FastVideo's WanTransformer3DModel."""

import math

import torch
import torch.nn.functional as F
from patch_twins import RMS, Norm, table
from torch import nn

RANKS = 1


def get_sp_world_size():
    return RANKS


class UnquantizedLinearMethod:
    pass


class ReplicatedLinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.skip_bias_add, self.quant_method = False, UnquantizedLinearMethod()

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None


class LocalAttention(nn.Module):
    """Within the context that the pipeline sets."""

    ready = True

    def forward(self, q, k, v):
        assert self.ready, "no forward context"
        return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)


class DistributedAttention(LocalAttention):
    def forward(self, q, k, v):
        assert get_sp_world_size() == 1
        return super().forward(q, k, v), None


class LaterAttention(DistributedAttention):
    """That of newer versions, which leaves out padding and turns q and k itself."""

    @torch.compiler.disable
    def forward(self, q, k, v, original_seq_len=None, freqs_cis=None):
        padding = q.shape[1] - original_seq_len
        q, k, v = (a[:, :original_seq_len] for a in (q, k, v))
        once = [a[:, ::2] for a in freqs_cis]
        y, _ = super().forward(turn(q, *once), turn(k, *once), v)
        return F.pad(y, (0, 0, 0, 0, 0, padding)), None


LaterAttention.__name__ = "DistributedAttention"


class CrossAttention(nn.Module):
    def __init__(self, dim, heads, eps, image):
        super().__init__()
        self.num_heads, self.attn = heads, LocalAttention()
        self.to_q, self.to_k, self.to_v, self.to_out = (ReplicatedLinear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMS(dim, eps), RMS(dim, eps)
        if image:
            self.add_k_proj, self.add_v_proj = ReplicatedLinear(dim, dim), ReplicatedLinear(dim, dim)
            self.norm_added_k, self.norm_added_q = RMS(dim, eps), RMS(dim, eps)

    def forward(self, x, context, context_lens):
        def heads(a):
            return a.unflatten(2, (self.num_heads, -1))

        q, total = heads(self.norm_q(self.to_q(x)[0])), 0
        if hasattr(self, "add_k_proj"):
            image, context = context[:, :257], context[:, 257:]
            k = heads(self.norm_added_k(self.add_k_proj(image)[0]))
            total = self.attn(q, k, heads(self.add_v_proj(image)[0]))
        k, v = heads(self.norm_k(self.to_k(context)[0])), heads(self.to_v(context)[0])
        return self.to_out((total + self.attn(q, k, v)).flatten(2))[0]


class Residual(nn.Module):
    def __init__(self, dim, eps, affine):
        super().__init__()
        self.norm = Norm(dim, eps, elementwise_affine=affine)

    def forward(self, residual, x, gate, shift, scale):
        total = residual + x * gate
        return self.norm(total) * (1 + scale) + shift, total


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc_in, self.act, self.fc_out = (
            ReplicatedLinear(dim, hidden), nn.GELU("tanh"), ReplicatedLinear(hidden, dim),
        )  # fmt: skip

    def forward(self, x):
        return self.fc_out(self.act(self.fc_in(x)[0]))[0]


def turn(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, dim, hidden, heads, eps, image):
        super().__init__()
        self.num_attention_heads = heads
        self.norm1 = Norm(dim, eps, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (ReplicatedLinear(dim, dim) for _ in range(4))
        self.attn1, self.norm_q, self.norm_k = DistributedAttention(), RMS(dim, eps), RMS(dim, eps)
        self.self_attn_residual_norm = Residual(dim, eps, True)
        self.attn2 = CrossAttention(dim, heads, eps, image)
        self.cross_attn_residual_norm = Residual(dim, eps, False)
        self.ffn = MLP(dim, hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attend(self, q, k, v, freqs_cis):
        return self.attn1(turn(q, *freqs_cis), turn(k, *freqs_cis), v)[0]

    def forward(self, hidden_states, encoder_hidden_states, temb, freqs_cis, *more):
        x, dtype = hidden_states, hidden_states.dtype
        a, b, c, d, f, g = (self.scale_shift_table + temb.float()).chunk(6, 1)
        n = (self.norm1(x.float()) * (1 + b) + a).to(dtype)
        q, k = self.norm_q(self.to_q(n)[0]), self.norm_k(self.to_k(n)[0])
        q, k, v = (y.unflatten(2, (self.num_attention_heads, -1)) for y in (q, k, self.to_v(n)[0]))
        y = self.attend(q, k, v, freqs_cis, *more)
        n, x = self.self_attn_residual_norm(x, self.to_out(y.flatten(2))[0], c, 0, 0)
        y = self.attn2(n.to(dtype), context=encoder_hidden_states, context_lens=None)
        n, x = self.cross_attn_residual_norm(x.to(dtype), y, 1, d, f)
        return (x.to(dtype) + self.ffn(n.to(dtype)) * g).to(dtype)


class LaterBlock(Block):
    """The block of newer versions, which is told how many tokens are no padding."""

    def __init__(self, *args):
        super().__init__(*args)
        self.attn1 = LaterAttention()

    def attend(self, q, k, v, freqs_cis, original_seq_len):
        return self.attn1(q, k, v, original_seq_len, freqs_cis=freqs_cis)[0]


class PatchEmbed(nn.Module):
    def __init__(self, channels, dim):
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))

    def forward(self, x):
        return self.proj(x)


class FastVideoTwin(nn.Module):
    def __init__(self, image=False, dim=48, heads=2, hidden=80, layers=2, eps=1e-6, later=False):
        super().__init__()
        self.later, self.padding = later, 0
        self.dim, self.heads, self.checkpointing = dim, heads, False
        self.patch_embedding = PatchEmbed(16, dim)
        self.text, self.time = nn.Linear(12, dim), nn.Linear(1, 6 * dim)
        self.image = nn.Linear(24, dim) if image else None
        self.blocks = nn.ModuleList(
            (LaterBlock if later else Block)(dim, hidden, heads, eps, image) for _ in range(layers)
        )
        self.proj_out = nn.Linear(dim, 64)

    def rotations(self, f, h, w):
        """Cosines and sines [f h w, D / 2], made anew for every forward; in newer versions each twice."""
        whole = table(self.dim // self.heads)
        third = whole.shape[1] // 3
        frames, rows, columns = whole.split([whole.shape[1] - 2 * third, third, third], 1)
        shape = (f, h, w, -1)
        parts = frames[:f, None, None], rows[None, :h, None], columns[None, None, :w]
        turns = torch.cat([a.expand(shape) for a in parts], 3).flatten(0, 2)
        turns = turns.repeat_interleave(2, 1) if self.later else turns
        return turns.real.float(), turns.imag.float()

    def forward(self, hidden_states, encoder_hidden_states, timestep, encoder_hidden_states_image=None):
        x = self.patch_embedding(hidden_states)
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        freqs_cis, context = self.rotations(*grid), self.text(encoder_hidden_states)
        temb = self.time(timestep[:, None] / 1000).unflatten(1, (6, -1))
        if encoder_hidden_states_image is not None:
            context = torch.cat([self.image(encoder_hidden_states_image), context], 1)
        tokens = x.shape[1]
        x = F.pad(x, (0, 0, 0, self.padding))
        for block in self.blocks:
            arguments = x, context, temb, freqs_cis, *(tokens,) * self.later
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.proj_out(x[:, :tokens]).transpose(1, 2).reshape(len(x), 64, math.prod(grid))
