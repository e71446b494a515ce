"""The original block against ours, on a few hundred tokens, with random weights.

Names and shapes do not show another activation, a mask or a norm that is left out; numbers do, and so do
windows and blocks of a sparse attention that are smaller than the probe. Random weights
of the same shapes show more than those of a fresh model, many of which are zero, and they are there where the
model's own are sharded, on meta or in 16 bits. Takes the memory of one block in float32.
"""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prfl_engine.errors import UserError
from prfl_engine.patch.memo import Memo
from prfl_engine.patch.structure import TEXT_TOKENS, Structure
from prfl_engine.patch.view import BlockView

TOLERANCE = 1e-5
GRID = (5, 8, 9)
FAILS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError)  # of code that got another layout


class _Both(nn.Module):
    """A block, and what it and ours make of the same arguments."""

    def __init__(self, block: nn.Module, structure: Structure, memo: Memo):
        super().__init__()
        self.block, self.structure, self.memo = block, structure, memo

    def forward(self, arguments: tuple) -> tuple[Tensor, Tensor]:
        block, structure = self.block, self.structure
        given, _ = structure.unpatched(arguments, {})
        with structure.exact(block):
            want = type(block).forward(block, *given)
        call = structure.bind(block, self.memo, *arguments)
        if isinstance(call, str):
            raise ValueError(call)
        view = BlockView(block, structure.parts(block), torch.float32, call.image_tokens, None)
        return want, view.compute(call.x, call.e, call.context, 1, call.grid)


def _drawn(name: str, p: Tensor, generator: torch.Generator) -> Tensor:
    """Random values in the shape of a parameter."""
    a = torch.randn(p.shape, generator=generator, device=generator.device)
    if p.dim() == 1:
        return 1 + 0.2 * a if "norm" in name and name.endswith("weight") else 0.2 * a
    return a / math.sqrt(p.shape[-1]) if p.dim() == 2 else 0.5 * a


@torch.no_grad()
def probe(name: str, block: nn.Module, structure: Structure) -> float:
    """The relative L2 distance of our block's result from the original's, in float32.

    Raises UserError where it is above TOLERANCE, or where the original cannot be called as it is called in
    the structure.
    """
    parts = structure.parts(block)
    width = parts.modulation.shape[2]
    device = parts.modulation.device if parts.modulation.device.type != "meta" else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    values = {f"block.{k}": _drawn(k, p, generator) for k, p in block.named_parameters()}
    context = normal(2, 5 if parts.image is None else 257 + TEXT_TOKENS, width)
    x, e = normal(2, math.prod(GRID), width), 0.5 * normal(2, 6, width)
    memo, found = Memo(), []
    both = _Both(block, structure, memo)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for arguments in structure.examples(memo, x, e, context, GRID, width // parts.heads):
            try:
                with torch.autocast(device.type, enabled=False):
                    want, got = functional_call(both, values, (arguments,))
            except FAILS as error:
                found.append(f"{type(error).__name__}: {error}")
                continue
            distance = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if distance <= TOLERANCE:
                return distance
            found.append(f"a relative distance of {distance:.1e}")
    finally:
        torch.set_float32_matmul_precision(precision)
    raise UserError(
        f"{name}: the original {type(block).__name__} and ours differ: {'; '.join(found)}; "
        f"want at most {TOLERANCE:g} in float32"
    )
