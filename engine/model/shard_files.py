"""The files of a sharded checkpoint, as a reader finds tensors in them; engine/checkpoint_shards.py says what
they hold, and writes them."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from prfl_engine.errors import UserError, check
from prfl_engine.inputs import open_tensors, read_json
from prfl_engine.model.sources import INDEX, Stored
from prfl_engine.tensor_files import DTYPES, NAMES

_NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
"""The dtypes by their names in the index."""


class Piece(NamedTuple):
    """What a rank holds of a tensor."""

    name: str
    first: int  # place of its first value in the whole
    values: Tensor  # 1-dim, the memory of its owner
    shape: tuple[int, ...]  # of the whole
    mine: bool  # to write: no other rank has the same piece to write


class _Whole(NamedTuple):
    """A tensor that is in pieces; the Values of model.sources."""

    folder: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: "list[StoredPiece]"

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return NAMES[self.dtype]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        made = torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        first = start * math.prod(self.shape[1:])
        copy(found_in(self.folder, Piece(self.name, first, made.view(-1), self.shape, False), self.stored))
        return made


def stored_weights(folder: Path, which: str = "model") -> dict[str, Stored]:
    """The weights of a sharded checkpoint by their names in the model; needs no ranks.
    which: model, or ema for the averaged ones alone."""
    index, found = read_index(folder), {}
    for name, stored in stored_pieces(folder, index).items():
        kind, _, key = name.partition("/")
        if kind == which:
            dtype, shape = index["tensors"][name]
            found[key] = Stored(folder, name, _Whole(folder, name, _NAMED[dtype], tuple(shape), stored))
    return found


def read_index(folder: Path) -> dict:
    """shards.json: {"files": names, "tensors": {name: [dtype, shape]}, "updates": steps of every group}.
    UserError for anything else."""
    path, want = folder / INDEX, "the index of a sharded checkpoint"
    held = read_json(path, want)
    names, updates, tensors = (held.get(key) for key in ("files", "updates", "tensors"))
    good = isinstance(names, list) and isinstance(updates, list) and isinstance(tensors, dict)
    good = good and all(isinstance(n, str) and re.fullmatch(r"shard-\d+\.safetensors", n) for n in names)
    good = good and all(type(n) is int and n >= 0 for n in updates)
    if not good:
        raise UserError(f"{path}: got no files, tensors and updates, want {want}")
    for name, value in tensors.items():
        check(_is_layout(value), f"{path}: {name}", value, "a dtype and a shape")
    return held


def _is_layout(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        return False
    dtype, shape = value
    good = isinstance(dtype, str) and dtype in _NAMED
    return good and all(type(n) is int and 0 <= n < 2**40 for n in shape)


class StoredPiece(NamedTuple):
    """A piece in a file."""

    first: int
    size: int
    key: str
    file: safe_open


def stored_pieces(folder: Path, index: dict) -> dict[str, list[StoredPiece]]:
    """The pieces of every tensor in all files, by place; UserError for one of another kind than the index
    says."""
    found: dict[str, list[StoredPiece]] = {name: [] for name in index["tensors"]}
    for path in (folder / name for name in index["files"]):
        file = open_tensors(path, f"a file that {INDEX} names")
        for key in file.keys():  # noqa: SIM118
            name, _, first = key.rpartition("@")
            header = file.get_slice(key)
            shape, dtype = header.get_shape(), DTYPES.get(header.get_dtype())
            good = re.fullmatch(r"\d{1,18}", first) and name in found and len(shape) == 1
            if not good or str(dtype) != f"torch.{index['tensors'][name][0]}":
                raise UserError(f"{path}: {key}: got {dtype} {shape}, want a piece as {INDEX} has it")
            found[name].append(StoredPiece(int(first), shape[0], key, file))
    return {name: sorted(stored, key=lambda s: s.first) for name, stored in found.items()}


def copy(parts: "list[tuple[Tensor, StoredPiece, int]]") -> None:
    """Read from the files what `found_in` has found."""
    for values, s, start in parts:
        values.copy_(s.file.get_slice(s.key)[start : start + len(values)])


def found_in(folder: Path, piece: Piece, stored: list[StoredPiece]) -> list[tuple[Tensor, StoredPiece, int]]:
    """(part of the piece, where it is stored, from which place there); UserError where some is nowhere."""
    made, at, end = [], piece.first, piece.first + len(piece.values)
    for s in stored:
        if s.first <= at < min(end, s.first + s.size):
            stop = min(end, s.first + s.size)
            made.append((piece.values[at - piece.first : stop - piece.first], s, at - s.first))
            at = stop
    if at < end:
        raise UserError(f"{folder}: {piece.name}: value {at} is in no file, want all of {list(piece.shape)}")
    return made
