"""Operations with two vectors a sample and a boundary between their tokens, and plain formulas with a vector
for every token."""

from functools import partial

import torch
from fused import normal

from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate, gated_add_norm
from prfl_kernels.norm.op import modulate

F32 = torch.float32
EPS = 1e-6
NAMES = "modulate", "gated_add", "gated_add_modulate", "gated_add_norm", "gated_add_modulate, one gate"


def _every(a, boundary, length):
    """[B, L, C]: the vector of every token."""
    if a is None or a.dim() < 3:
        return a if a is None or a.dim() == 1 else a[:, None]
    counts = torch.tensor([boundary, length - boundary], device=a.device)
    return a.repeat_interleave(counts, 1)


def _plain(name, boundary, dtype, x, *rest):
    """By plain torch, in float32 or wider inside, rounded as the operations round."""
    wide, total = torch.promote_types(x.dtype, F32), x
    x = x.to(wide)
    if name != "modulate":
        y, gate, *rest = rest
        x = x + y.to(wide) * _every(gate, boundary, x.shape[1]).to(wide)
        total = x.to(total.dtype)
        x = total.to(wide)
    if name == "gated_add":
        return total
    scale, shift = (_every(a, boundary, x.shape[1]).to(wide) for a in rest)
    hat = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
    n = (hat * (scale + (name != "gated_add_norm")) + shift).to(total.dtype if dtype is None else dtype)
    return n if name == "modulate" else (total, n)


def case(name, batch, length, width, boundary, residual=F32, update=F32, vectors=F32):
    """(operation, formula, inputs)."""
    x, y = normal(batch, length, width, dtype=residual), normal(batch, length, width, dtype=update)
    gate, scale, shift = (normal(batch, 2, width, dtype=vectors) for _ in range(3))
    op, inputs = {
        "modulate": (modulate, [x, scale, shift]),
        "gated_add": (gated_add, [x, y, gate]),
        "gated_add_modulate": (gated_add_modulate, [x, y, gate, scale, shift]),
        "gated_add_norm": (gated_add_norm, [x, y, gate, normal(width), normal(width)]),
        "gated_add_modulate, one gate": (gated_add_modulate, [x, y, gate[:, 0], scale, shift]),
    }[name]
    return partial(op, boundary=boundary), partial(_plain, name, boundary, None), inputs
