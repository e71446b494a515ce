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

from prfl_engine import checksums
from prfl_engine.errors import TrainingError, check
from prfl_engine.files import atomic_folder
from prfl_engine.inputs import check_finite, check_new
from prfl_engine.model import lora_files, names, wan_json
from prfl_engine.model.checkpoint import assembled, fitting, heads_of, read_heads, write_heads
from prfl_engine.model.reward_files import find_head, read_settings, settle, step_of
from prfl_engine.model.sharded import ADAPTER, GENERATOR, REWARD, held
from prfl_engine.model.sources import (
    CONFIG,
    WEIGHTS,
    Source,
    Stored,
    check_blocks,
    count_blocks,
    find,
    sharded,
)
from prfl_engine.model.wan import WanConfig
from prfl_engine.tensor_files import Layout, divide, in_order, write_divided
from prfl_kernels.sublayers.products import LowRank

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


ADAPTERS = {
    "peft": lora_files.write_peft, "diffusers": lora_files.write_diffusers,
    "comfyui": lora_files.write_shared, "kohya": lora_files.write_kohya,
}  # fmt: skip
"""Those that an adapter is written in; each writes files of its own into a folder."""


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    dtype: torch.dtype | None = None,
    shard: float | None = None,
) -> str:
    """Write what is at `source` to the new folder `out` in the layout `to`; returns a line about it.

    A generator is anything that sources.find reads; a reward model is written as its official files. dtype
    None: each tensor keeps its own. shard: 10^9 bytes of a file at most (None: SHARD), unless a single tensor
    is larger. sha256.txt has the checksum of the bytes of every tensor by its native name, so a model has the
    same one in every layout.
    An adapter is anything that lora_files.read reads; it is written in float32.
    UserError for a mistake, and for values that are not finite, in the new dtype too; TrainingError for files
    that do not read back as they were written. Then nothing is written.
    """
    out, path = check_new(out, "--out"), Path(source)
    kind = _kind(path)
    if kind == ADAPTER:
        for name, value in (("--dtype", dtype), ("--shard", shard)):
            check(value is None, name, value, "none with an adapter")
        check(to in ADAPTERS, "--to", to, f"one of {', '.join(ADAPTERS)} for an adapter")
        return _convert_adapter(lora_files.read(path)[0], out, to)
    found = find(path)
    check(shard is None or 0 < shard < 1e9, "--shard", shard, "a positive number of 10^9 bytes")
    check(to in GENERATORS, "--to", to, f"one of {', '.join(GENERATORS)} for a generator")
    if GENERATORS[to].one_file:
        check(shard is None, "--shard", shard, f"none with --to {to}, which is one file")
    checksums.check(found.files)
    if kind == REWARD:
        check(to == "native", "--to", to, "native for a reward model, which has its official files alone")
        return _convert_reward(found, out, dtype, shard or SHARD)
    return _convert_generator(found, out, GENERATORS[to], dtype, shard or SHARD)


def _convert_generator(
    found: Source, out: Path, form: _Format, dtype: torch.dtype | None, shard: float
) -> str:
    check_blocks(found.tensors, f"{found.path}: {CONFIG}", found.config.num_layers)
    native = fitting(found.config, found.tensors, found.path).state_dict()
    with atomic_folder(out) as folder:
        size = _write(folder, found, list(native), form, dtype, shard)
    return f"{out}: {len(native)} tensors, {size / 1e9:.3g} GB, read back and equal; checksums in {SUMS}"


def _kind(path: Path) -> str:
    """What is at a path: GENERATOR, ADAPTER or REWARD."""
    if sharded(path) is not None:
        return held(path).kind
    if lora_files.holds_adapter(path):
        return ADAPTER
    return REWARD if path.is_dir() and any(path.glob("mlp*.ckpt")) else GENERATOR


def _convert_reward(found: Source, out: Path, dtype: torch.dtype | None, shard: float) -> str:
    """A reward model, whose trunk is `found`. Without reward.json its step is that of its files' names, or 0
    where they have none."""
    path = found.path
    trunk = fitting(found.config, found.tensors, path, count_blocks(found.tensors), head=False)
    model = assembled(trunk, read_heads(path), heads_of(path), **settle(path, {}))
    step = read_settings(path).get("step")
    if step is None:  # an official one
        step = step_of(find_head(path, "mlp")) or 0
    with atomic_folder(out) as folder:
        size = _write(folder, found, list(trunk.state_dict()), GENERATORS["native"], dtype, shard)
        write_heads(model, folder, step)
        for part, state in read_heads(folder).items():
            own = model.get_submodule(part).state_dict()
            if any(not torch.equal(own[k], a) for k, a in state.items()):
                raise TrainingError(f"{folder}: {part} does not read back as it was written")
    what = f"a reward model of step {step}, its transformer of {size / 1e9:.3g} GB"
    return f"{out}: {what}, read back and equal"


def _write(
    folder: Path, found: Source, native: list[str], form: _Format, dtype: torch.dtype | None, shard: float
) -> int:
    """Write these tensors of a source with the configuration, read them back, write their checksums; returns
    the bytes of the tensors."""
    stored = {form.rename(k): found.tensors[k] for k in native}
    layout: Layout = {k: (dtype or s.dtype, s.shape) for k, s in stored.items()}
    layouts = [layout] if form.one_file else divide(layout, int(1e9 * shard))
    sums: dict[str, str] = {}
    write_divided(folder, form.stem, layouts, _values(layouts, stored, sums))
    form.write_config(found.config, folder / CONFIG)
    _check_written(folder, found.config, {k: sums[form.rename(k)] for k in native})
    (folder / SUMS).write_text("".join(f"{sums[form.rename(k)]}  {k}\n" for k in sorted(native)))
    return sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())


def _convert_adapter(updates: dict[str, LowRank], out: Path, to: str) -> str:
    with atomic_folder(out) as folder:
        ADAPTERS[to](updates, folder)
        (file,) = folder.glob("*.safetensors")
        got, _ = lora_files.read(folder)
        for name, low in updates.items():
            back = got.get(name)
            same = back is not None and torch.equal(back.down, low.down)
            # Where the scale is in B, or alpha is a float32, one rounding is between them.
            if not same or not torch.allclose(back.scale * back.up, low.scale * low.up, 1e-6, 1e-37):
                raise TrainingError(f"{folder}: {name} does not read back as it was written")
    return f"{out / file.name}: {len(updates)} updates, read back and equal"


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
