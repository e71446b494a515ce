"""The layout of FastVideo, whose blocks hold the projections of self-attention themselves."""

import inspect
import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prfl_engine.patch.layers import Replacement
from prfl_engine.patch.memo import Memo, few_vectors, grid_of
from prfl_engine.patch.structure import (
    MODULATION,
    ROPE,
    TEXT_TOKENS,
    TOKENS,
    Structure,
    attend,
)
from prfl_engine.patch.view import Call, ImageProjections, Parts, Projections, widened
from prfl_kernels.qk_norm_rope.rope import rope_angles, rotate

IMAGE_TOKENS = 257


class Patches(Replacement):
    """The forward of the patch embedding: its result, whose grid is kept for the blocks."""

    def __init__(self, embedding: nn.Module, memo: Memo):
        self.module, self.memo = embedding, memo

    def __call__(self, *args, **kwargs) -> Tensor:
        """Patches [B, C, T, h, w]."""
        made = type(self.module).forward(self.module, *args, **kwargs)
        self.memo.grid = tuple(made.shape[2:]) if made.dim() == 5 else None
        return made


def _attend(q: Tensor, k: Tensor, v: Tensor, *more, freqs_cis=None) -> tuple[Tensor, None]:
    """Self-attention of FastVideo, which turns q and k itself where it is given the rotations."""
    if freqs_cis is not None:
        step = 1 + (freqs_cis[0].shape[1] == q.shape[3])  # each twice in a row
        cos, sin = (a[:, None, ::step].to(q.dtype) for a in freqs_cis)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return attend(q, k, v), None


BACKENDS = "FLASH_ATTN", "TORCH_SDPA"  # attention without approximation


class FastVideo(Structure):
    """WanTransformer3DModel of FastVideo."""

    name = "WanTransformer3DModel as FastVideo has it"

    def matches(self, block):
        names = "to_q", "attn1", "attn2", "self_attn_residual_norm", "ffn", "scale_shift_table"
        return all(hasattr(block, k) for k in names)

    def parts(self, block):
        c, image = block.attn2, None
        if hasattr(c, "add_k_proj"):
            image = ImageProjections(c.add_k_proj, c.add_v_proj, c.norm_added_k)
        own = block.to_q, block.to_k, block.to_v, block.to_out, block.norm_q, block.norm_k
        return Parts(
            block.scale_shift_table, Projections(*own),
            Projections(c.to_q, c.to_k, c.to_v, c.to_out, c.norm_q, c.norm_k), image,
            block.self_attn_residual_norm.norm, (block.ffn.fc_in, block.ffn.fc_out),
            block.num_attention_heads, block.norm1.eps,
        )  # fmt: skip

    def complaint(self, block):
        kinds = type(block.attn1).__name__, type(block.attn2.attn).__name__
        if kinds != ("DistributedAttention", "LocalAttention"):
            return f"attn1, attn2: their attention is {' and '.join(kinds)}"
        for name, attention in (("attn1", block.attn1), ("attn2", block.attn2.attn)):
            backend = getattr(attention, "backend", None)
            if backend is not None and getattr(backend, "name", backend) not in BACKENDS:
                return f"{name}: its attention is {backend}, which may quantise or leave out keys"
        return None

    def model_complaint(self, model):
        if not hasattr(model, "patch_embedding"):
            return "it has no patch_embedding"
        if "forward" in vars(model.patch_embedding):
            return "patch_embedding: its forward was replaced"
        return None

    @torch.compiler.disable  # it reads tables of rotations
    def bind(
        self, block, memo, hidden_states, encoder_hidden_states, temb, freqs_cis, original_seq_len=None,
        **more,
    ):  # fmt: skip
        for name, value in more.items():
            if value is not None:
                return f"argument {name}, which is not known"
        # inspect.unwrap: FastVideo keeps it out of torch.compile by a decorator.
        ranks = inspect.unwrap(type(block.attn1).forward).__globals__.get("get_sp_world_size")
        if ranks is None or ranks() > 1 or hidden_states.dim() != 3:
            return TOKENS
        if original_seq_len not in (None, hidden_states.shape[1]):
            return TOKENS
        head_dim = hidden_states.shape[2] // block.num_attention_heads
        found = [
            memo.ask(kind, table, lambda a, part=part: grid_of(a, head_dim, part, memo.grid))
            for part, (kind, table) in enumerate(zip(("cos", "sin"), freqs_cis, strict=True))
        ]
        if found[0] is None or found[0] != found[1]:
            return ROPE
        if math.prod(found[0]) != hidden_states.shape[1]:
            return TOKENS
        if temb.dim() == 4:
            temb = few_vectors(temb, found[0], memo)
            if temb is None:
                return MODULATION
        image = IMAGE_TOKENS if hasattr(block.attn2, "add_k_proj") else 0
        if image and encoder_hidden_states.shape[1] != image + TEXT_TOKENS:
            return f"{encoder_hidden_states.shape[1]} context tokens, not 512 of text and those of an image"
        return Call(hidden_states, widened(temb), encoder_hidden_states, found[0], image)

    def others(self, model, memo):
        return {model.patch_embedding: Patches(model.patch_embedding, memo)}

    def examples(self, memo, x, e, context, grid, head_dim):
        memo.grid = grid
        angles = rope_angles(head_dim, grid).to(x.device)
        arguments = x, context, e, (angles.cos().float(), angles.sin().float())
        yield arguments
        yield *arguments, x.shape[1]  # where self-attention itself leaves out padding, and turns q and k

    @contextmanager
    def exact(self, block):
        block.attn1.forward = _attend
        block.attn2.attn.forward = attend
        try:
            yield
        finally:
            del block.attn1.forward, block.attn2.attn.forward
