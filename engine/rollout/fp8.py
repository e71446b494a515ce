"""The blocks of a transformer in e4m3, without gradient, for rollouts.

    every linear layer   y = (x8 w8^T) x_scale w_scale + b    one scale a token and one an output channel
    self-attention       on e4m3 q and k (a scale a token and head), v (a scale a channel) and weights

Values are quantised in the pass that computes them: norm and modulation, norm and rotation, GELU. Only
attention's output needs a separate pass. Products return bfloat16, whatever the ordinary precision is; the
residual stream keeps its dtype; norms, softmax and sums are float32. Keys and values of the text and
attention to it are computed in the ordinary precision: 1 % of the work. The cost: e4m3 has 3 mantissa bits,
so a value is off by up to 6 %, 2.6 % root mean square.

Weights are quantised once for every version of them; the copies take one byte a value more. Of a sharded
model every rank has whole copies: a block is gathered to be quantised. Its forward gathers it all the same,
since it also reads what is not in e4m3.
Source of the scaling: DeepSeek-V3 technical report, section 3.3; FlashAttention-3 (Shah et al. 2024).
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from prfl_engine.errors import UserError
from prfl_engine.model.layers import Block, Linear
from prfl_engine.model.wan import WanTransformer
from prfl_engine.shards import unsharded
from prfl_kernels.attention.fp8 import HEAD_DIMS, attention_fp8, quantize_values
from prfl_kernels.exchange import Cut, all_keys, to_heads, to_tokens
from prfl_kernels.fp8.linear import MULTIPLE, fp8_linear
from prfl_kernels.fp8.quantize import quantize_fp8
from prfl_kernels.linear import linear
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate_fp8, gated_add_norm_fp8
from prfl_kernels.norm.op import modulate_fp8
from prfl_kernels.qk_norm_rope.op import qk_norm_rope_fp8
from prfl_kernels.qk_norm_rope.rope import Grid


def weight_of(layer: Linear) -> Tensor:
    """The weight [N, K] that a linear layer multiplies with, its low-rank update included, in float32."""
    weight, low = layer.weight.float(), layer.low
    return weight if low is None else weight.add(linear(low.up.float(), low.down.mT), alpha=low.scale)


class Product:
    """Linear layers of one input as one product in e4m3: weights [N, K], N over all of them."""

    def __init__(self, *linears: Linear):
        self.linears = linears
        self.weight: Tensor | None = None  # e4m3 [N, K]; refilled in place, since a graph may read it
        self.scale: Tensor | None = None  # float32 [N]
        self.bias: Tensor | None = None

    def quantize(self) -> None:
        for first, layer in zip(self._firsts(), self.linears, strict=True):
            weight, scale = quantize_fp8(weight_of(layer))
            if self.weight is None:
                rows = sum(a.out_features for a in self.linears)
                self.weight = weight.new_empty(rows, layer.in_features)
                self.scale, self.bias = scale.new_empty(rows), scale.new_empty(rows, dtype=torch.bfloat16)
            rows = slice(first, first + layer.out_features)
            self.weight[rows], self.scale[rows], self.bias[rows] = weight, scale, layer.bias

    def _firsts(self) -> list[int]:
        return [sum(a.out_features for a in self.linears[:i]) for i in range(len(self.linears))]

    def __call__(self, x8: Tensor, scale: Tensor) -> Tensor:
        return fp8_linear(x8, scale, self.weight, self.scale, self.bias, torch.bfloat16)


class Fp8Block:
    """The forward of a block, a `BlockRun`."""

    def __init__(self, block: Block):
        attn, cross, (first, _, second) = block.self_attn, block.cross_attn, block.ffn
        self.qkv, self.o = Product(attn.q, attn.k, attn.v), Product(attn.o)
        self.cross_q, self.cross_o = Product(cross.q), Product(cross.o)
        self.first, self.second = Product(first), Product(second)
        self.products = self.qkv, self.o, self.cross_q, self.cross_o, self.first, self.second

    def __call__(
        self, block: Block, x_BLC: Tensor, e_B6C: Tensor, context_BSC: Tensor, repeats: int, grid: Grid
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors = block.vectors(e_B6C)
        eps, boundary = block.eps, block.boundary(vectors, grid)
        y = self._attend(modulate_fp8(x_BLC, scale1, shift1, eps, boundary), block, grid)
        norm = block.norm3.weight, block.norm3.bias
        x, *n = gated_add_norm_fp8(x_BLC, y, gate1, *norm, eps, boundary)
        y = block.cross_attn.attend(self.cross_q(*n), context_BSC, repeats)
        y = self.cross_o(*quantize_fp8(y))
        x, *n = gated_add_modulate_fp8(x, y, None, scale2, shift2, eps, boundary)
        hidden = self.first(*n)
        del n, y
        return gated_add(x, self.second(*quantize_fp8(hidden, gelu=True)), gate2, boundary)

    def _attend(self, n, block, grid):
        attn, (q, k, v) = block.self_attn, self.qkv(*n).chunk(3, -1)
        norms = attn.norm_q.weight, attn.norm_k.weight
        cut = block.cut(grid)
        first = 0 if cut is None else cut.span.start
        q8, k8, *scales = qk_norm_rope_fp8(q, k, *norms, grid, attn.num_heads, block.eps, first)
        v = v.unflatten(2, (attn.num_heads, -1))
        if cut is not None:
            q8, k8 = (a.view(q8.dtype) for a in _to_heads([q8.view(torch.uint8), k8.view(torch.uint8)], cut))
            scales = [a.squeeze(3) for a in _to_heads([a[..., None] for a in scales], cut)]
            (v,) = _to_heads([v], cut)
            if cut.far:
                k8, scales[1], v = (_all_keys(a, cut) for a in (k8.view(torch.uint8), scales[1], v))
                k8 = k8.view(q8.dtype)
        values = quantize_values(v)
        del q, k, v, n
        out, _ = attention_fp8(q8, scales[0], k8, scales[1], *values)
        if cut is not None:
            (out,) = to_tokens([out], cut.near, cut.near_group)
        return self.o(*quantize_fp8(out.flatten(2)))


def _to_heads(tensors: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    return [a.contiguous() for a in to_heads(tensors, cut.near, cut.near_group)]


def _all_keys(a: Tensor, cut: Cut) -> Tensor:
    return all_keys([a], cut.far, cut.far_group)[0].contiguous()


def check_widths(dim: int, ffn_dim: int, num_heads: int) -> None:
    """UserError for a block of these sizes that cannot run in e4m3."""
    head_dim = dim // num_heads
    if head_dim not in HEAD_DIMS:
        raise UserError(f"rollout.precision: got fp8 with heads of {head_dim}, want heads of 64 or 128")
    if dim % MULTIPLE or ffn_dim % MULTIPLE:
        raise UserError(
            f"rollout.precision: got fp8 with widths {dim} and {ffn_dim}, want multiples of {MULTIPLE}"
        )


class Fp8Blocks:
    """All blocks of a model with e4m3 copies of their weights: tokens [B, L, C] to those after the last
    block."""

    def __init__(self, model: WanTransformer):
        check_widths(model.config.dim, model.config.ffn_dim, model.config.num_heads)
        self.model, self.blocks = model, [Fp8Block(block) for block in model.blocks]
        self.version: Hashable = None

    @torch.no_grad()
    def follow(self, version: Hashable = None) -> None:
        """Refresh the cached e4m3 weights, unless they are known to be unchanged since the last call.

        They are unchanged if `version`, which the caller changes with every optimizer step, is the same, and
        every parameter has the same address and the same count of writes (torch's). The count alone is not
        enough: fused AdamW and writes through .data do not change it. version None: always quantise. Of a
        sharded model `version` alone decides, since all ranks must decide alike, and call this together.
        """
        sharded = any(isinstance(block, FSDPModule) for block in self.model.blocks)
        parameters = () if sharded else self.model.blocks.parameters()
        found = version, tuple((p.data_ptr(), p._version) for p in parameters)
        if version is None or found != self.version:
            for block, fp8 in zip(self.model.blocks, self.blocks, strict=True):
                with unsharded(block):
                    for product in fp8.products:
                        product.quantize()
            self.version = found

    def __call__(
        self,
        blocks: Sequence[Block],
        tokens: Tensor,
        e_B6C: Tensor,
        context: Tensor,
        repeats: int,
        grid: Grid,
    ) -> Tensor:
        """Run `blocks`, all of the model's, in e4m3: tokens [B, L, C] to tokens. A `RunBlocks`."""
        for block, fp8 in zip(blocks, self.blocks, strict=True):
            tokens = block(tokens, e_B6C, context, repeats, grid, fp8)
        return tokens

    def nbytes(self) -> int:
        """Bytes of the quantised weights."""
        products = (p for block in self.blocks for p in block.products)
        return sum(a.nbytes for p in products for a in (p.weight, p.scale, p.bias) if a is not None)
