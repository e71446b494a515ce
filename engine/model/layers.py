"""The parts of a Wan2.1 block. Module names are those of the native checkpoints.

Shapes: B batch, L video tokens, S context tokens, C width, H heads, F ffn width.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from prfl_kernels.attention.op import attention
from prfl_kernels.exchange import Cut, SequenceGroup
from prfl_kernels.jit import wide
from prfl_kernels.linear import linear
from prfl_kernels.norm.op import layer_norm, modulate
from prfl_kernels.qk_norm_rope.op import rms_norm
from prfl_kernels.qk_norm_rope.rope import Grid
from prfl_kernels.sublayers.chunks import within
from prfl_kernels.sublayers.cross_attention import ImageWeights, cross_attention
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights, LowRank
from prfl_kernels.sublayers.self_attention import SelfAttentionOutput, modulated_attention

IMAGE_TOKENS = 257  # CLIP tokens of the first frame, in front of the text tokens of an I2V context
IMAGE_DIM = 1280


class Linear(nn.Linear):
    """nn.Linear that computes and returns in `compute_dtype`, whatever its input and weights have and
    autocast says.

    lora_A [r, in] and lora_B [out, r], where prfl_engine.model.lora has set them, are a low-rank update of
    the weight, lora_scale * B A. prfl_kernels.sublayers.products adds it, here and in the fused sublayers.
    `lent`, where prfl_engine.model.lora has set it, is a further update for rollouts: no parameter, and added
    while `lent_on`.
    """

    compute_dtype: torch.dtype | None = None  # None: the dtype of the weights
    lora_scale: float = 1.0
    left_out: bool = False  # whether the layer computes without its update for now
    lent: LowRank | None = None
    lent_on: bool = False

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    @property
    def low(self) -> LowRank | None:
        """The low-rank update, of two their sum; None: there is none, or it is left out."""
        absent = self.lora_A is None or self.left_out
        own = None if absent else LowRank(self.lora_A, self.lora_B, self.lora_scale)
        if not self.lent_on or self.lent is None:
            return own
        return self.lent if own is None else own.plus(self.lent)

    @property
    def dtype(self) -> torch.dtype:
        """That the layer computes in."""
        return self.compute_dtype or self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of x [..., in]."""
        return linear(x.to(self.dtype), self.weight, self.bias, self.low)


class WideLinear(Linear):
    """A linear layer of the time embedding or the head: float32 at least, in every precision."""

    @property
    def dtype(self) -> torch.dtype:
        """That the layer computes in."""
        return wide(self.weight.dtype)


class RMSNorm(nn.Module):
    """The weight of an RMSNorm over the whole width; the arithmetic is in prfl_kernels."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] of x [..., C], in its dtype."""
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """The parameters of self-attention; the arithmetic is in prfl_kernels.sublayers.self_attention."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def weights(self) -> AttentionWeights:
        """The parameters as the fused sublayers take them."""
        pairs = sum(((m.weight, m.bias) for m in (self.q, self.k, self.v, self.o)), ())
        return AttentionWeights(*pairs, self.norm_q.weight, self.norm_k.weight)


class CrossAttention(SelfAttention):
    """Attention to the text and, in an I2V model, to the image tokens before it.

    With gradient it is one operation, which keeps what it is told to. Without, or where a linear layer is
    more than its weight, bias and low-rank update (another class), the layers run one by one.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, image: bool):
        super().__init__(dim, num_heads, eps)
        self.image_tokens = IMAGE_TOKENS if image else 0
        if image:
            self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(
        self, x_BLC: Tensor, context_BSC: Tensor, repeats: int, keep: str | Collection[str] = "all"
    ) -> Tensor:
        """The sublayer's output [B, L, C]; the last token of the context counts `repeats` times, and `keep`
        is as in prfl_kernels.sublayers.cross_attention."""
        if torch.is_grad_enabled() and self.fused:
            image, low = None, _updates(q=self.q, k=self.k, v=self.v, o=self.o)
            if self.image_tokens:
                k, v, norm = self.k_img, self.v_img, self.norm_k_img
                image = ImageWeights(k.weight, k.bias, v.weight, v.bias, norm.weight)
                low |= _updates(k_img=k, v_img=v)
            return cross_attention(
                x_BLC, context_BSC, self.weights(), self.num_heads, image, self.image_tokens,
                self.norm_q.eps, self.q.dtype, keep, repeats, low,
            )  # fmt: skip
        return self.o(self.attend(self.q(x_BLC), context_BSC, repeats))

    @property
    def fused(self) -> bool:
        """Whether the sublayer is one operation where gradient is enabled."""
        known, layers = {"weight", "bias", "lora_A", "lora_B"}, [self.q, self.k, self.v, self.o]
        layers += [self.k_img, self.v_img] if self.image_tokens else []
        return all(
            type(m) is Linear and {name for name, _ in m.named_parameters()} <= known for m in layers
        )

    def attend(self, q_BLC: Tensor, context_BSC: Tensor, repeats: int) -> Tensor:
        """What goes into the last projection, from queries before their norm; [B, L, C] in their dtype."""
        dtype = q_BLC.dtype

        def heads(x: Tensor) -> Tensor:
            return x.to(dtype).unflatten(2, (self.num_heads, -1))

        n = self.image_tokens
        q, picture, text = heads(self.norm_q(q_BLC)), context_BSC[:, :n], context_BSC[:, n:]
        out = attention(q, heads(self.norm_k(self.k(text))), heads(self.v(text)), repeats=repeats)
        if n:
            k = heads(self.norm_k_img(self.k_img(picture)))
            out = out + attention(q, k, heads(self.v_img(picture)))
        return out.flatten(2)


class Block(nn.Module):
    """Self-attention, cross-attention and FFN on the residual stream, modulated by the timestep.

    x += gate1 * Attn(LN(x) (1 + scale1) + shift1);  x += Cross(LN_affine(x), context);
    x += gate2 * FFN(LN(x) (1 + scale2) + shift2). The last token of the context counts `repeats` times
    (WanTransformer.repeats). e [B, 6, C] is the timestep's, or [B, 2, 6, C]: the tokens of the first frame
    take the first of two.

    Every use of a block is a call of this module, so a wrapper of its forward (FSDP2, a hook) sees all of
    them. How the block computes in that call is an argument, a `BlockRun` that uses the other methods.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, image: bool):
        super().__init__()
        self.eps = eps
        self.chunk: int | None = None  # tokens that the fused sublayers work on at a time
        self.sequence: SequenceGroup | None = None  # the ranks over which the tokens are cut
        self.compiled: Callable | None = None  # torch.compile of `sublayers`, unbound: copies share it
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, image)
        self.ffn = nn.Sequential(
            Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BLC: Tensor,
        e_B6C: Tensor,
        context_BSC: Tensor,
        repeats: int,
        grid: Grid,
        run: "BlockRun | None" = None,
    ) -> Tensor:
        """x' [B, L, C] of x [B, L, C], e [B, 6, C] or [B, 2, 6, C], and context [B, S, C], by `run` or else
        by `compute`."""
        return (run or Block.compute)(self, x_BLC, e_B6C, context_BSC, repeats, grid)

    def compute(
        self,
        x_BLC: Tensor,
        e_B6C: Tensor,
        context_BSC: Tensor,
        repeats: int,
        grid: Grid,
        keep: str | Sequence[str | Collection[str]] = "all",
    ) -> Tensor:
        """x' [B, L, C]; `keep` is what the sublayers save for the backward, one for all of them or one each,
        see prfl_kernels.sublayers.self_attention."""
        return (self.compiled or Block.sublayers)(self, x_BLC, e_B6C, context_BSC, repeats, grid, keep)

    def sublayers(self, x_BLC: Tensor, e_B6C: Tensor, context_BSC: Tensor, repeats, grid, keep) -> Tensor:
        """The code of `compute`."""
        vectors, keeps = self.vectors(e_B6C), [keep] * 3 if isinstance(keep, str) else keep
        x, n, _ = self.attend(x_BLC, vectors, grid, keeps[0])
        y = self.cross_attn(n, context_BSC, repeats, keeps[1])
        return self.feed(x, y, vectors, grid, keeps[2])

    def vectors(self, e_B6C: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate [B, C] or [B, 2, C] of self-attention, then those of the FFN."""
        return (self.modulation.to(e_B6C.dtype) + e_B6C).unbind(-2)

    def boundary(self, vectors: Sequence[Tensor], grid: Grid) -> int:
        """How many tokens here take the first of two vectors; 0 where there is one."""
        return first_tokens(grid, self.sequence) if vectors[0].dim() == 3 else 0

    def cut(self, grid: Grid) -> Cut | None:
        """How the tokens of a grid are cut over ranks, None if all of them are here."""
        return None if self.sequence is None else self.sequence.cut(math.prod(grid))

    def attention_input(self, x_BLC: Tensor, e_B6C: Tensor, grid: Grid) -> Tensor:
        """What the projections of self-attention read, [B, L, C] in the dtype of products."""
        shift, scale, *_ = vectors = self.vectors(e_B6C)
        return modulate(x_BLC, scale, shift, self.eps, self.dtype, self.boundary(vectors, grid))

    def cross_input(self, x_BLC: Tensor) -> Tensor:
        """What the queries of cross-attention read, [B, L, C] in the dtype of products."""
        return layer_norm(x_BLC, self.norm3.weight, self.norm3.bias, self.eps, self.dtype)

    def attend(self, x_BLC: Tensor, vectors, grid, keep="all", attention=None) -> SelfAttentionOutput:
        """The self-attention sublayer and the norm that cross-attention reads."""
        attn = self.self_attn
        return modulated_attention(
            x_BLC, *vectors[:3], attn.weights(), grid, attn.num_heads,
            norm=(self.norm3.weight, self.norm3.bias), attention=attention, keep=keep,
            low=_updates(q=attn.q, k=attn.k, v=attn.v, o=attn.o), chunk=self.chunk, eps=self.eps,
            dtype=self.dtype, cut=self.cut(grid), boundary=self.boundary(vectors, grid),
        )  # fmt: skip

    def feed(self, x_BLC: Tensor, y_BLC: Tensor, vectors, grid: Grid, keep="all") -> Tensor:
        """x + y and the FFN sublayer on it; y is cross-attention's output."""
        first, _, second = self.ffn
        weights = FFNWeights(first.weight, first.bias, second.weight, second.bias)
        return modulated_ffn(
            x_BLC, y_BLC, *vectors[3:], weights, keep=keep,
            low=_updates(w1=first, w2=second), chunk=self.chunk, eps=self.eps, dtype=self.dtype,
            boundary=self.boundary(vectors, grid),
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Of products and attention."""
        return self.self_attn.q.dtype


BlockRun = Callable[[Block, Tensor, Tensor, Tensor, int, Grid], Tensor]
"""Computes x' of a block: (block, x [B, L, C], e as Block.forward, context [B, S, C], repeats, grid)."""


def first_tokens(grid: Grid, sequence: SequenceGroup | None) -> int:
    """How many of the tokens on this rank are those of the first frame."""
    tokens = math.prod(grid)
    return within(grid[1] * grid[2], slice(0, tokens) if sequence is None else sequence.cut(tokens).span)


def _updates(**linears: Linear) -> dict[str, LowRank]:
    """The low-rank updates that there are, by name."""
    return {name: m.low for name, m in linears.items() if m.low is not None}


class Head(nn.Module):
    """Modulated norm and the projection of every token to its patch, in float32."""

    def __init__(self, dim: int, patch_values: int, eps: float):
        super().__init__()
        self.eps = eps
        self.head = WideLinear(dim, patch_values)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x_BLC: Tensor, e_BC: Tensor, boundary: int = 0) -> Tensor:
        """Patches [B, L, patch_values] of tokens [B, L, C] at the embedded timestep e [B, C], or at those of
        the tokens before the boundary, and of the others, e [B, 2, C]."""
        shift, scale = (self.modulation.to(e_BC.dtype) + e_BC[..., None, :]).unbind(-2)
        return self.head(modulate(x_BLC, scale, shift, self.eps, wide(x_BLC.dtype), boundary))


class ImageEmbedding(nn.Module):
    """CLIP features [B, 257, 1280] to context tokens [B, 257, C]; LayerNorm eps is torch's 1e-5."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(IMAGE_DIM),
            Linear(IMAGE_DIM, IMAGE_DIM),
            nn.GELU(),
            Linear(IMAGE_DIM, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, clip: Tensor) -> Tensor:
        """Context tokens [B, 257, C], in the dtype of products."""
        norm_in, linear_in, gelu, linear_out, norm_out = self.proj
        dtype = linear_in.dtype
        n = layer_norm(clip, norm_in.weight, norm_in.bias, norm_in.eps, dtype)
        y = linear_out(gelu(linear_in(n)))
        return layer_norm(y, norm_out.weight, norm_out.bias, norm_out.eps, dtype)
