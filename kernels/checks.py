"""The words in which an operation says which arguments it takes.

Every operation and its backward form check their arguments first, whether tensors are real or fake: eager
calls, torch.compile and fake tensors refuse the same arguments, and no implementation sees a tensor that does
not fit. A refusal is a ValueError of one line with the operation, the argument, what it got and what it
wants.

Nothing broadcasts unless the docstring of an operation says so. Batches and sequences may be empty, rows may
not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
"""Of a matrix, which is converted before it is multiplied with."""


def expect_float(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless dtype, that of argument `name` or the argument itself, is one of FLOATS."""
    if dtype not in FLOATS:
        raise ValueError(f"{op}: got {name} {dtype}, want float32, bfloat16, float16 or float64")


def expect(
    op: str, name: str, a: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless a has this shape, the device of `like`, and `dtype` (any float if None)."""
    if a.shape != shape:
        raise ValueError(f"{op}: got {name} {list(a.shape)}, want {list(shape)}")
    if dtype is None:
        if a.dtype not in FLOATS:
            expect_float(op, name, a.dtype)
    elif a.dtype != dtype:
        raise ValueError(f"{op}: got {name} {a.dtype}, want {dtype}")
    if a.device != like.device:
        raise ValueError(f"{op}: got {name} on {a.device}, want {like.device}")


def expect_matrix(op: str, name: str, a: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """`expect` of a weight matrix, which may be stored in one of STORED."""
    if a.dtype not in FLOATS and a.dtype in STORED and a.shape == shape and a.device == like.device:
        return
    expect(op, name, a, shape, like)


def expect_rank(op: str, name: str, a: Tensor, sizes: str) -> torch.Size:
    """The shape of a, of as many dimensions as `sizes` ("B, L, C") names, the last of them not empty."""
    shape = a.shape
    if len(shape) != sizes.count(",") + 1 or shape[-1] < 1:
        raise ValueError(f"{op}: got {name} {list(shape)}, want [{sizes}] with {sizes[-1]} > 0")
    return shape


def expect_rows(op: str, name: str, a: Tensor) -> torch.Size:
    """The shape of a [B, L, C], of any float dtype, C > 0."""
    expect_float(op, name, a.dtype)
    return expect_rank(op, name, a, "B, L, C")


def expect_length(op: str, name: str, values: Sequence, length: int) -> None:
    """Raise ValueError unless there are `length` values; a schema does not count them."""
    if len(values) != length:
        raise ValueError(f"{op}: got {len(values)} values in {name}, want {length}")


def expect_heads(op: str, width: int, num_heads: int) -> int:
    """The width of a head; ValueError unless num_heads divides the width of a row."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{op}: got {num_heads} heads for width {width}, want a divisor of the width")
    return width // num_heads


def expect_places(
    op: str, grid: Sequence[int], num_heads: int, offset: int, length: int, width: int
) -> None:
    """Raise ValueError unless rows of this width turn in pairs and tokens offset ... offset + length - 1 lie
    on grid (frames, rows, columns)."""
    if expect_heads(op, width, num_heads) % 2:
        raise ValueError(f"{op}: got heads of {width // num_heads} channels, want an even number")
    expect_length(op, "grid", grid, 3)
    if min(grid) < 1:
        raise ValueError(f"{op}: got grid {list(grid)}, want three sizes from 1 on")
    tokens = grid[0] * grid[1] * grid[2]
    if offset < 0 or offset + length > tokens:
        got = f"{length} tokens from offset {offset} on"
        raise ValueError(f"{op}: got {got}, want them on grid {list(grid)} of {tokens} tokens")
