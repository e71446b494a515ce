"""The structures that are known: whose blocks they are, by names; what is what in them; how they are called.

A structure gives the parts of a block, says what of it is not understood, and turns the arguments of a call
into ours, or says why this call is for the original code.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl_engine.patch.layers import hooked
from prfl_engine.patch.memo import Memo, ours, rows_equal
from prfl_engine.patch.view import Call, ImageProjections, Parts, Projections, widened
from prfl_kernels.qk_norm_rope.rope import Grid, axis_angles, rope_angles

TEXT_TOKENS = 512  # of a text context, in all of these models
ROPE = "another table of rotations than Wan's (RIFLEx, NTK, interpolation)"
TOKENS = "tokens that are padded, or cut over processes"
MODULATION = "modulation that differs from token to token"


class Structure(ABC):
    """One layout of a transformer. It has no state."""

    name: str

    @abstractmethod
    def matches(self, block: nn.Module) -> bool:
        """Whether the block has the attributes of this structure."""

    @abstractmethod
    def parts(self, block: nn.Module) -> Parts:
        """The modules of a block that matches."""

    @abstractmethod
    def complaint(self, block: nn.Module) -> str | None:
        """What of the block, besides its layers, our code does not do; also asked before every call."""

    @abstractmethod
    def model_complaint(self, model: nn.Module) -> str | None:
        """What of the whole transformer our code does not do."""

    @abstractmethod
    def bind(self, block: nn.Module, memo: Memo, *args, **kwargs) -> Call | str:
        """Our arguments of a call of the block, or why the original code takes it."""

    @abstractmethod
    def examples(self, x: Tensor, e: Tensor, context: Tensor, grid: Grid, head_dim: int) -> Iterator[tuple]:
        """The arguments of a block as its callers may write them."""

    def unpatched(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments for the original code."""
        return args, kwargs

    def others(self, model: nn.Module, memo: Memo) -> dict[nn.Module, Any]:
        """More modules whose forward is replaced, and by what."""
        return {}

    @contextmanager
    def exact(self, block: nn.Module) -> Iterator[None]:
        """Inside it the original code attends in the dtype of its tensors, on any device."""
        yield


def attend(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    """Attention [B, L, H, D] of q, k, v [B, L, H, D] to everything, in their dtype."""
    q, k, v = (a.to(q.dtype).transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Official(Structure):
    """WanModel of Wan2.1, Wan2.2, HY-Video-PRFL and VideoX-Fun."""

    name = "WanModel as Wan2.1, Wan2.2, HY-Video-PRFL and VideoX-Fun have it"

    def matches(self, block):
        return all(hasattr(block, k) for k in ("self_attn", "cross_attn", "norm3", "ffn", "modulation"))

    def parts(self, block):
        a, c = block.self_attn, block.cross_attn
        image = ImageProjections(c.k_img, c.v_img, c.norm_k_img) if hasattr(c, "k_img") else None
        return Parts(
            block.modulation, Projections(a.q, a.k, a.v, a.o, a.norm_q, a.norm_k),
            Projections(c.q, c.k, c.v, c.o, c.norm_q, c.norm_k), image, block.norm3,
            (block.ffn[0], block.ffn[-1]), a.num_heads, block.norm1.eps,
        )  # fmt: skip

    def complaint(self, block):
        for name in ("self_attn", "cross_attn", "ffn", "norm1", "norm2", "norm3"):
            if found := hooked(getattr(block, name)):
                return f"{name}: {found}"
        window = getattr(block.self_attn, "window_size", (-1, -1))
        return None if tuple(window) == (-1, -1) else f"self_attn: it attends to a window of {window}"

    def model_complaint(self, model):
        if not hasattr(model, "freqs"):
            return "it has no table of rotations (freqs)"
        parts = self.parts(unwrapped(model.blocks[0]))
        head_dim = parts.modulation.shape[2] // parts.heads
        table = model.freqs
        return None if table.is_meta or ours(table, head_dim, "complex") else f"freqs: it has {ROPE}"

    def bind(
        self, block, memo, x, e, seq_lens, grid_sizes, freqs, context, context_lens, dtype=None, t=None,
        **more,
    ):  # fmt: skip
        for name, value in more.items():
            if value is not None:
                return f"argument {name}, which is not known"
        if context_lens is not None:
            return "contexts of several lengths (context_lens)"
        grids, lengths = grid_sizes.tolist(), seq_lens.tolist()
        if any(grid != grids[0] for grid in grids):
            return "samples of several sizes in one batch"
        tokens = math.prod(grids[0])
        if x.shape[1] != tokens or any(n != tokens for n in lengths):
            return TOKENS
        head_dim = x.shape[2] // block.self_attn.num_heads
        if not memo.ask("rope", freqs, lambda a: ours(a, head_dim, "complex")):
            return ROPE
        image = 0
        if hasattr(block.cross_attn, "k_img"):
            image = context.shape[1] - TEXT_TOKENS
            if image not in (257, 514):
                return f"{context.shape[1]} context tokens, not 512 of text and those of one or two images"
        if e.dim() == 4:
            if not memo.ask("modulation", e, rows_equal):
                return MODULATION
            e = e[:, 0]  # its gradient is that of all rows: they come from one timestep
        x = x.to(torch.promote_types(x.dtype, e.dtype))
        return Call(x, widened(e), context, tuple(grids[0]), image)

    def examples(self, x, e, context, grid, head_dim):
        batch, length, _ = x.shape
        angles = axis_angles(head_dim, 1024).to(x.device)
        freqs = torch.polar(torch.ones_like(angles), angles)
        rest = (
            torch.tensor([length] * batch), torch.tensor([grid] * batch), freqs, context, None,
        )  # fmt: skip
        yield x, e, *rest
        yield x, e[:, None].expand(batch, length, *e.shape[1:]).contiguous(), *rest

    @contextmanager
    def exact(self, block):
        kinds = {id(f.__globals__): f.__globals__ for f in _forwards(block.self_attn, block.cross_attn)}
        before = [(g, k, g[k]) for g in kinds.values() for k in ("flash_attention", "attention") if k in g]
        try:
            for names, k, _ in before:
                names[k] = attend
            yield
        finally:
            for names, k, function in before:
                names[k] = function


def _forwards(*modules: nn.Module) -> Iterator[Any]:
    """The functions that compute the modules."""
    for m in modules:
        for kind in type(m).__mro__:
            if "forward" in vars(kind) and hasattr(vars(kind)["forward"], "__globals__"):
                yield vars(kind)["forward"]


class Rotations:
    """The forward of diffusers' rope on a patched model: cosines, sines, and the grid of the tokens or why
    there is none for us."""

    def __init__(self, rope: nn.Module, memo: Memo):
        self.module, self.memo = rope, memo

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Grid | str]:
        """(cos, sin, grid) of latents [B, c, T, H, W]."""
        rope = self.module
        cos, sin = type(rope).forward(rope, hidden_states)
        if not torch.compiler.is_compiling() and not self.known():
            return cos, sin, ROPE
        return cos, sin, tuple(n // p for n, p in zip(hidden_states.shape[2:], rope.patch_size, strict=True))

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
        for name in ("attn1", "attn2", "ffn", "norm1", "norm2", "norm3"):
            if found := hooked(getattr(block, name)):
                return f"{name}: {found}"
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
        if found := hooked(model.rope):
            return f"rope: {found}"
        known = model.rope.freqs_cos.is_meta or Rotations(model.rope, Memo()).known()
        return None if known else f"rope: it has {ROPE}"

    def bind(self, block, memo, hidden_states, encoder_hidden_states, temb, rotary_emb):
        if len(rotary_emb) != 3:
            return "rotations that the model's own rope has not made"
        grid = rotary_emb[2]
        if isinstance(grid, str):
            return grid
        if math.prod(grid) != hidden_states.shape[1]:
            return TOKENS
        if temb.dim() == 4:
            if torch.compiler.is_compiling() or not memo.ask("modulation", temb, rows_equal):
                return MODULATION
            temb = temb[:, 0]
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

    def examples(self, x, e, context, grid, head_dim):
        angles = rope_angles(head_dim, grid).to(x.device).repeat_interleave(2, 1)[None, :, None]
        yield x, context, e, (angles.cos().to(x.dtype), angles.sin().to(x.dtype), grid)


STRUCTURES: tuple[Structure, ...] = (Diffusers(), Official())


def unwrapped(block: nn.Module) -> nn.Module:
    """The block inside of checkpoint wrappers and torch.compile."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        if name in block._modules:
            return unwrapped(block._modules[name])
    return block
