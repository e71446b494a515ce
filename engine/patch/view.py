"""Somebody else's block with the methods of ours.

`BlockView` has what memory.recompute, rollout.fp8 and the code of a `Block` itself use of a block. It is made
for one call, from the modules that a structure found and the dtype of that call.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prfl_engine.model.layers import Block, BlockRun, CrossAttention, SelfAttention
from prfl_engine.patch.layers import Norm, read
from prfl_kernels.jit import wide
from prfl_kernels.qk_norm_rope.rope import Grid


class Projections(NamedTuple):
    """The modules of an attention: linear layers and the norms of queries and keys."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module


class ImageProjections(NamedTuple):
    """The modules of cross-attention to an image."""

    k: nn.Module
    v: nn.Module
    norm_k: nn.Module


class Parts(NamedTuple):
    """What a block is made of, whatever its names are."""

    modulation: Tensor  # [1, 6, C]: shift, scale and gate of self-attention, then of the FFN
    attention: Projections
    cross: Projections
    image: ImageProjections | None
    norm: nn.Module  # the affine LayerNorm before cross-attention
    ffn: tuple[nn.Module, nn.Module]
    heads: int
    eps: float

    def linears(self) -> Iterator[nn.Module]:
        """All linear layers."""
        yield from self.attention[:4]
        yield from self.cross[:4]
        yield from () if self.image is None else self.image[:2]
        yield from self.ffn

    def norms(self) -> Iterator[nn.Module]:
        """All norms with weights."""
        yield from self.attention[4:]
        yield from self.cross[4:]
        yield from () if self.image is None else self.image[2:]
        yield self.norm


class Call(NamedTuple):
    """The arguments of a block, in our order."""

    x: Tensor  # [B, L, C], in the dtype of the residual stream
    e: Tensor  # [B, 6, C], or [B, 2, 6, C] of the first frame and the others, float32 or wider
    context: Tensor  # [B, S, C], the image tokens first
    grid: Grid
    image_tokens: int


class AttentionView:
    """A self-attention, as `Block.attend` reads it."""

    weights = SelfAttention.weights

    def __init__(self, m: Projections, heads: int, eps: float, dtype: torch.dtype):
        self.q, self.k, self.v, self.o = (read(layer, dtype) for layer in m[:4])
        self.norm_q, self.norm_k = Norm(m.norm_q.weight, eps), Norm(m.norm_k.weight, eps)
        self.num_heads = heads


class CrossAttentionView(AttentionView):
    """A cross-attention that is called as ours is."""

    __call__, attend = CrossAttention.forward, CrossAttention.attend
    fused = True

    def __init__(
        self, m: Projections, image: ImageProjections | None, image_tokens: int, heads: int, eps: float,
        dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__(m, heads, eps, dtype)
        self.image_tokens = image_tokens
        if image_tokens:
            self.k_img, self.v_img = read(image.k, dtype), read(image.v, dtype)
            self.norm_k_img = Norm(image.norm_k.weight, eps)


class BlockView:
    """A block of other modules, with the code of ours."""

    compute, sublayers, vectors, cut = Block.compute, Block.sublayers, Block.vectors, Block.cut
    attention_input, cross_input = Block.attention_input, Block.cross_input
    attend, feed, boundary = Block.attend, Block.feed, Block.boundary
    compiled = sequence = None

    def __init__(
        self, block: nn.Module, parts: Parts, dtype: torch.dtype, image_tokens: int, chunk: int | None
    ):
        heads, eps = parts.heads, parts.eps
        self.block, self.eps, self.chunk, self.dtype = block, eps, chunk, dtype
        self.self_attn = AttentionView(parts.attention, heads, eps, dtype)
        self.cross_attn = CrossAttentionView(parts.cross, parts.image, image_tokens, heads, eps, dtype)
        self.norm3, self.modulation = parts.norm, parts.modulation
        self.ffn = read(parts.ffn[0], dtype), None, read(parts.ffn[1], dtype)

    def __call__(
        self, x: Tensor, e: Tensor, context: Tensor, repeats: int, grid: Grid, run: BlockRun | None = None
    ) -> Tensor:
        """x' [B, L, C], as `Block.forward`."""
        return (run or Block.compute)(self, x, e, context, repeats, grid)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the block."""
        return self.block.parameters()


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of products: autocast's where it is on, else that of the weights."""
    device = x.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def widened(a: Tensor) -> Tensor:
    """a in float32 or wider."""
    return a.to(wide(a.dtype))
