"""Safetensors files written tensor by tensor, so that no second copy of what they hold is in memory.

The bytes are those that safetensors' own writer makes, which wants all tensors of a file at once. Format:
https://github.com/huggingface/safetensors (8 bytes of length, a JSON header, the tensors without gaps).
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""(dtype, shape) of tensors by name."""

# In the order in which safetensors writes them: the widest first, so that every tensor is aligned.
NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_RANK = {dtype: i for i, dtype in enumerate(NAMES)}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
"""The dtypes by their names in a header."""


def in_order(layout: Layout) -> list[str]:
    """The names in the order in which a file holds its tensors."""
    return sorted(layout, key=lambda name: (_RANK[layout[name][0]], name))


def write_tensors(
    path: Path, layout: Layout, values: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a file of the tensors of `layout`; `values` gives them `in_order`, on any device.

    One tensor at a time is drawn and copied to the CPU. ValueError where one is not as the layout says,
    OSError with the name of the file.
    """
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in in_order(layout):
        dtype, shape = layout[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, value in zip(in_order(layout), values, strict=False):
                if (value.dtype, tuple(value.shape)) != layout[name]:
                    got = value.dtype, tuple(value.shape)
                    raise ValueError(f"{path}: {name}: got {got}, want {layout[name]}")
                flat = value.detach().reshape(-1).contiguous().cpu()
                file.write(flat.view(torch.uint8).numpy())
            if file.tell() != 8 + len(text) + end:
                raise ValueError(f"{path}: got too few tensors, want {len(layout)}")
    except OSError as error:  # of a write it does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None


def divide(layout: Layout, limit: int) -> list[Layout]:
    """The layouts of files that hold `layout` in order: each at most `limit` bytes, or one tensor."""
    files: list[Layout] = [{}]
    room = limit
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * math.prod(shape)
        if files[-1] and size > room:
            files.append({})
            room = limit
        files[-1][name] = dtype, shape
        room -= size
    return files


def write_divided(folder: Path, stem: str, layouts: list[Layout], values: Iterator[Tensor]) -> None:
    """Write STEM.safetensors, or STEM-I-of-N.safetensors with an index as Hugging Face's libraries have it.

    values: those of the first file in_order, then of the second.
    """
    names = [f"{stem}.safetensors"]
    if len(layouts) > 1:
        names = [f"{stem}-{i:05d}-of-{len(layouts):05d}.safetensors" for i in range(1, len(layouts) + 1)]
    for name, layout in zip(names, layouts, strict=True):
        write_tensors(folder / name, layout, values, {"format": "pt"})
    if len(layouts) > 1:
        index = {key: name for name, layout in zip(names, layouts, strict=True) for key in layout}
        total = sum(dtype.itemsize * math.prod(shape) for f in layouts for dtype, shape in f.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(text)
