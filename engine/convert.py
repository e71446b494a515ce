"""Generators and adapters in the layouts of other programs: `prfl convert`.

A generator goes from its files to the new ones one tensor at a time, so memory holds one of them. The new
files are read back: the SHA-256 of every tensor must be that of what was written.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_engine.errors import TrainingError, check
from prfl_engine.files import atomic_folder
from prfl_engine.inputs import check_finite, check_new
from prfl_engine.model import names, wan_json
from prfl_engine.model.checkpoint import fitting
from prfl_engine.model.sources import CONFIG, WEIGHTS, Stored, check_blocks, find
from prfl_engine.model.wan import WanConfig
from prfl_engine.tensor_files import Layout, divide, in_order, write_divided

SUMS = "sha256.txt"
SHARD = 5.0
"""10^9 bytes of a file, where nothing else is asked for."""


class _Format(NamedTuple):
    """How a generator is named and described."""

    stem: str
    rename: Callable[[str], str]
    write_config: Callable[[WanConfig, Path], None]
    one_file: bool = False


GENERATORS = {
    "native": _Format(WEIGHTS, str, WanConfig.to_json),
    "diffusers": _Format(WEIGHTS, names.to_diffusers, wan_json.write_diffusers),
    "comfyui": _Format("diffusion_model", names.to_comfyui, WanConfig.to_json, one_file=True),
}
"""The layouts that a generator is written in. ComfyUI reads one file; config.json next to it is for us."""


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    dtype: torch.dtype | None = None,
    shard: float | None = None,
) -> str:
    """Write what is at `source` to the new folder `out` in the layout `to`; returns a line about it.

    A generator is anything that sources.find reads; dtype None: each tensor keeps its own. shard: 10^9 bytes
    of a file at most (None: SHARD), unless a single tensor is larger. sha256.txt has the checksum of the
    bytes of every tensor by its native name, so a model has the same one in every layout.
    UserError for a mistake, and for values that are not finite, in the new dtype too; TrainingError for files
    that do not read back as they were written. Then nothing is written.
    """
    out = check_new(out, "--out")
    check(shard is None or 0 < shard < 1e9, "--shard", shard, "a positive number of 10^9 bytes")
    check(to in GENERATORS, "--to", to, f"one of {', '.join(GENERATORS)} for a generator")
    form, found = GENERATORS[to], find(source)
    if form.one_file:
        check(shard is None, "--shard", shard, f"none with --to {to}, which is one file")
    check_blocks(found.tensors, f"{source}: {CONFIG}", found.config.num_layers)
    native = fitting(found.config, found.tensors, source).state_dict()
    stored = {form.rename(k): found.tensors[k] for k in native}
    layout: Layout = {k: (dtype or s.dtype, s.shape) for k, s in stored.items()}
    layouts = [layout] if form.one_file else divide(layout, int(1e9 * (shard or SHARD)))
    sums: dict[str, str] = {}
    with atomic_folder(out) as folder:
        write_divided(folder, form.stem, layouts, _values(layouts, stored, sums))
        form.write_config(found.config, folder / CONFIG)
        _check_written(folder, found.config, {k: sums[form.rename(k)] for k in native})
        (folder / SUMS).write_text("".join(f"{sums[form.rename(k)]}  {k}\n" for k in sorted(native)))
    size = sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
    return f"{out}: {len(native)} tensors, {size / 1e9:.3g} GB, read back and equal; checksums in {SUMS}"


def _values(layouts: list[Layout], stored: dict[str, Stored], sums: dict[str, str]) -> Iterator[Tensor]:
    """The tensors of the files in the order in which they are written; `sums` gets their checksums."""
    for layout in layouts:
        for key in in_order(layout):
            source, (dtype, _) = stored[key], layout[key]
            value = source.values[:]
            check_finite(value, source.path, source.key)
            if value.dtype != dtype:
                value = value.to(dtype)
                check_finite(value, source.path, f"{source.key} as {dtype}".replace("torch.", ""))
            value = value.contiguous()
            sums[key] = _sum(value)
            yield value


def _sum(value: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    flat = value.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def _check_written(folder: Path, config: WanConfig, sums: dict[str, str]) -> None:
    """TrainingError unless the files of a folder hold what was written, by native names."""
    read = find(folder)
    if read.config != config:
        raise TrainingError(f"{folder / CONFIG}: reads as {read.config}, want {config}")
    got = {k: _sum(s.values[:]) for k, s in read.tensors.items()}
    for key in sorted(got.keys() | sums.keys()):
        if got.get(key) != sums.get(key):
            raise TrainingError(f"{folder}: {key} does not read back as it was written")
