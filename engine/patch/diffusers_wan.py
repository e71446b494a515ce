"""The layout of diffusers."""

import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prfl_engine.patch.layers import Replacement
from prfl_engine.patch.memo import Memo, few_vectors, ours
from prfl_engine.patch.structure import MODULATION, ROPE, TEXT_TOKENS, TOKENS, Structure
from prfl_engine.patch.view import Call, ImageProjections, Parts, Projections, widened
from prfl_kernels.qk_norm_rope.rope import Grid, rope_angles


class Rotations(Replacement):
    """The forward of diffusers' rope on a patched model: cosines, sines, and the grid of the tokens or why
    there is none for us."""

    def __init__(self, rope: nn.Module, memo: Memo):
        self.module, self.memo = rope, memo

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Grid | str]:
        """(cos, sin, grid) of latents [B, c, T, H, W]."""
        rope = self.module
        cos, sin = type(rope).forward(rope, hidden_states)
        if not self.known():
            return cos, sin, ROPE
        return cos, sin, tuple(n // p for n, p in zip(hidden_states.shape[2:], rope.patch_size, strict=True))

    @torch.compiler.assume_constant_result  # compiled code looks whenever it is made
    def known(self) -> bool:
        """Whether the tables are those of Wan."""
        rope, dim = self.module, self.module.attention_head_dim
        return self.memo.ask("cos", rope.freqs_cos, lambda a: ours(a, dim, "cos")) and self.memo.ask(
            "sin", rope.freqs_sin, lambda a: ours(a, dim, "sin")
        )


class Diffusers(Structure):
    """WanTransformer3DModel of diffusers."""

    name = "WanTransformer3DModel as diffusers has it"
    MODEL = {"rope", "patch_embedding", "condition_embedder", "blocks", "norm_out", "proj_out"}
    BACKENDS = ("flash", "_flash", "native", "_native", "xformers")  # attention without approximation

    def matches(self, block):
        return all(hasattr(block, k) for k in ("attn1", "attn2", "norm2", "ffn", "scale_shift_table")) and (
            hasattr(block.attn1, "to_q")
        )

    def parts(self, block):
        a, c = block.attn1, block.attn2
        image = None
        if c.add_k_proj is not None:
            image = ImageProjections(c.add_k_proj, c.add_v_proj, c.norm_added_k)
        return Parts(
            block.scale_shift_table, Projections(a.to_q, a.to_k, a.to_v, a.to_out[0], a.norm_q, a.norm_k),
            Projections(c.to_q, c.to_k, c.to_v, c.to_out[0], c.norm_q, c.norm_k), image, block.norm2,
            (block.ffn.net[0].proj, block.ffn.net[2]), a.heads, block.norm1.eps,
        )  # fmt: skip

    def complaint(self, block):
        for name, attn in (("attn1", block.attn1), ("attn2", block.attn2)):
            p = attn.processor
            if type(p).__name__ != "WanAttnProcessor":
                return f"{name}: its processor is a {type(p).__name__}"
            if getattr(attn, "fused_projections", False):
                return f"{name}: its projections are fused (fuse_qkv_projections)"
            if getattr(p, "_parallel_config", None) is not None:
                return f"{name}: it runs context-parallel"
            backend = getattr(p, "_attention_backend", None)
            if backend is not None and not str(getattr(backend, "value", backend)).startswith(self.BACKENDS):
                return f"{name}: its attention is {backend}, which quantises or leaves out keys"
        return None

    def model_complaint(self, model):
        children = {name for name, m in model.named_children() if m is not None}
        if more := children - self.MODEL:
            return f"it has {', '.join(sorted(more))} besides a WanTransformer3DModel's parts"
        if getattr(model, "_parallel_config", None) is not None:
            return "it runs context-parallel"
        if "forward" in vars(model.rope):
            return "rope: its forward was replaced"
        if not hasattr(model.rope, "freqs_cos"):
            return "rope: it has no freqs_cos and freqs_sin, as newer versions of diffusers have"
        known = model.rope.freqs_cos.is_meta or Rotations(model.rope, Memo()).known()
        return None if known else f"rope: it has {ROPE}"

    @contextmanager
    def exact(self, block):
        """Backends of 16 bits take no float32."""
        processors = block.attn1.processor, block.attn2.processor
        held = [(p, p._attention_backend) for p in processors if getattr(p, "_attention_backend", None)]
        try:
            for p, backend in held:
                p._attention_backend = type(backend)("native")
            yield
        finally:
            for p, backend in held:
                p._attention_backend = backend

    def bind(self, block, memo, hidden_states, encoder_hidden_states, temb, rotary_emb):
        if len(rotary_emb) != 3:
            return "rotations that the model's own rope has not made"
        grid = rotary_emb[2]
        if isinstance(grid, str):
            return grid
        if math.prod(grid) != hidden_states.shape[1]:
            return TOKENS
        if temb.dim() == 4:
            temb = None if torch.compiler.is_compiling() else few_vectors(temb, grid, memo)
            if temb is None:
                return MODULATION
        image = 0 if block.attn2.add_k_proj is None else encoder_hidden_states.shape[1] - TEXT_TOKENS
        if image < 0 or (image == 0 and block.attn2.add_k_proj is not None):
            return f"{encoder_hidden_states.shape[1]} context tokens, none of an image"
        return Call(hidden_states, widened(temb), encoder_hidden_states, grid, image)

    def unpatched(self, args, kwargs):
        if "rotary_emb" in kwargs:
            return args, kwargs | {"rotary_emb": kwargs["rotary_emb"][:2]}
        return (*args[:3], args[3][:2]), kwargs

    def others(self, model, memo):
        return {model.rope: Rotations(model.rope, memo)}

    def examples(self, memo, x, e, context, grid, head_dim):
        angles = rope_angles(head_dim, grid).to(x.device).repeat_interleave(2, 1)[None, :, None]
        yield x, context, e, (angles.cos().to(x.dtype), angles.sin().to(x.dtype), grid)
