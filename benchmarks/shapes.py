"""The shapes of Wan2.1, A14B's experts and TI2V-5B on one rank, and random tensors in them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Model(NamedTuple):
    name: str
    width: int
    heads: int
    ffn: int


MODELS = {
    "1.3B": Model("1.3B", 1536, 12, 8960),
    "5B": Model("5B", 3072, 24, 14336),
    "14B": Model("14B", 5120, 40, 13824),
}
TI2V = 27280  # tokens of TI2V-5B: 121 frames of 704 x 1280
# (frames, rows, columns) of tokens: 81 frames of 480 x 832 and of 720 x 1280; two for CPUs if asked for.
GRIDS = {
    32760: (21, 30, 52), 75600: (21, 45, 80), TI2V: (31, 22, 40), 1080: (9, 10, 12), 4096: (16, 16, 16),
}  # fmt: skip
DEFAULT = (32760, 75600)
TEXT = 512
SMALL_MODELS = {
    "1.3B": Model("1.3B", 256, 2, 384), "5B": Model("5B", 384, 3, 640), "14B": Model("14B", 512, 4, 1024),
}  # fmt: skip
SMALL_GRIDS = {312: (3, 8, 13), 720: (3, 12, 20)}
SMALL_TEXT = 64


class Shape(NamedTuple):
    """One rank of `sp`: its share of the tokens of every sample, or of the heads in attention."""

    model: Model
    grid: tuple[int, int, int]
    sp: int
    batch: int
    text: int
    dtype: torch.dtype  # of everything but parameters and modulation, which are float32, and of
    residual: torch.dtype  # the residual stream
    device: str

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def length(self) -> int:
        return self.tokens // self.sp

    @property
    def offset(self) -> int:
        """Index of the last rank's first token."""
        return self.tokens - self.length

    @property
    def heads(self) -> int:
        return max(1, self.model.heads // self.sp)

    @property
    def head_dim(self) -> int:
        return self.model.width // self.model.heads

    def exact(self) -> "Shape":
        return self._replace(dtype=torch.float64, residual=torch.float64)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def rows(self) -> Tensor:
        return self.normal(self.batch, self.length, self.model.width, dtype=self.dtype)

    def residual_rows(self) -> Tensor:
        return self.rows().to(self.residual)

    def modulation(self) -> Tensor:
        """One of a block's six vectors, a slice of [B, 6, C]."""
        return self.normal(self.batch, 6, self.model.width)[:, 1]

    def vector(self) -> Tensor:
        return self.normal(self.model.width)

    def hidden(self) -> Tensor:
        """What the FFN's first product gives."""
        return self.normal(self.batch, self.length, self.model.ffn, dtype=self.dtype)

    def projected(self) -> tuple[Tensor, ...]:
        """q, k and v before the norm, slices of the buffer of all three."""
        return self.normal(self.batch, self.length, 3 * self.model.width, dtype=self.dtype).chunk(3, dim=-1)

    def per_head(self, length: int | None = None) -> Tensor:
        """[B, L, H, D], by default of all tokens and this rank's heads."""
        shape = self.batch, length or self.tokens, self.heads, self.head_dim
        return self.normal(*shape, dtype=self.dtype)

    def statistics(self, *shape: int) -> Tensor:
        """From 0.5 to 1.5, as 1 / std and the like may be."""
        return torch.rand(shape, device=self.device) + 0.5


def wan(model: str, tokens: int, residual: torch.dtype = torch.float32, sp: int = 1) -> Shape:
    """A model of MODELS in bfloat16 on meta tensors, batch 1; where GRIDS has no grid of that many tokens,
    they stand in one line."""
    grid = GRIDS.get(tokens, (1, 1, tokens))
    return Shape(MODELS[model], grid, sp, 1, TEXT, torch.bfloat16, residual, "meta")


def gate_shape(dtype: torch.dtype, residual: torch.dtype, device: str) -> Shape:
    """Small and odd: 105 tokens, 77 keys of text, 3 heads of the models' 128 channels."""
    return Shape(Model("gate", 384, 3, 656), (3, 5, 7), 1, 2, 77, dtype, residual, device)
