"""The layout of the official code, and of what is made from it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from prfl_engine.patch.memo import few_vectors, ours
from prfl_engine.patch.structure import (
    MODULATION,
    ROPE,
    TEXT_TOKENS,
    TOKENS,
    Structure,
    attend,
    unwrapped,
)
from prfl_engine.patch.view import Call, ImageProjections, Parts, Projections, widened
from prfl_kernels.qk_norm_rope.rope import axis_angles


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
        window = getattr(block.self_attn, "window_size", (-1, -1))
        return None if tuple(window) == (-1, -1) else f"self_attn: it attends to a window of {window}"

    def model_complaint(self, model):
        if not hasattr(model, "freqs"):
            return "it has no table of rotations (freqs)"
        parts = self.parts(unwrapped(model.blocks[0]))
        head_dim = parts.modulation.shape[2] // parts.heads
        table = model.freqs
        return None if table.is_meta or ours(table, head_dim, "complex") else f"freqs: it has {ROPE}"

    @torch.compiler.disable  # it reads the grids and lengths from their tensors
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
            e = few_vectors(e, tuple(grids[0]), memo)
            if e is None:
                return MODULATION
        x = x.to(torch.promote_types(x.dtype, e.dtype))
        return Call(x, widened(e), context, tuple(grids[0]), image)

    def examples(self, memo, x, e, context, grid, head_dim):
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
        names = "flash_attention", "attention"
        before = [(g, k, g[k]) for g in kinds.values() for k in names if callable(g.get(k))]
        try:
            for here, k, _ in before:
                here[k] = attend
            yield
        finally:
            for here, k, function in before:
                here[k] = function


def _forwards(*modules: nn.Module) -> Iterator[Callable]:
    """The functions that compute the modules."""
    for m in modules:
        for kind in type(m).__mro__:
            if "forward" in vars(kind) and hasattr(vars(kind)["forward"], "__globals__"):
                yield vars(kind)["forward"]
