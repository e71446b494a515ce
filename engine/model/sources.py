"""Where the weights of a Wan transformer come from: files in any layout, their tensors under native names.

    what a path names                                        hyper-parameters
    a native folder: safetensors, with an index or without   its config.json
    a folder of diffusers, or its parent with transformer/   its config.json
    a .safetensors, .pth, .pt, .ckpt or .bin file            config.json next to it, or its shapes
    a sharded checkpoint, or a part of it (`sharded`)        the configuration in its run.json

Names in them are native, those of diffusers, or have ComfyUI's prefix (prfl_engine.model.names). Only
headers are read; a file of torch.save is read without executing code.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prfl_engine.errors import UserError, check, named
from prfl_engine.inputs import check_file, check_float, open_state, open_tensors, read_json
from prfl_engine.model import wan_json
from prfl_engine.model.layout import name_layout
from prfl_engine.model.names import to_native
from prfl_engine.model.wan import TI2V_CHANNELS, WanConfig
from prfl_engine.tensor_files import DTYPES, NAMES

WEIGHTS = "diffusion_pytorch_model"
"""The file of a folder, before .safetensors, of Wan and of diffusers."""
CONFIG = "config.json"
INDEX = "shards.json"
"""The index of a sharded checkpoint."""
EMA = "ema"
"""The folder of the averaged weights in a checkpoint."""
PAIRS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
"""The folders of the two experts of Wan2.2 A14B, high-noise first, native and of diffusers."""
CLIP = "img_emb.proj.1.weight"
"""A tensor of the CLIP branch, which I2V models of Wan2.1 have and those of Wan2.2 do not."""
_PARTS = {Path(*part, *expert) for part in ((), (EMA,)) for expert in ((), *((name,) for name in PAIRS[0]))}
_PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_FILES = "a .safetensors, .pth, .pt, .ckpt or .bin file"


class Values(Protocol):
    """A tensor that is in a file until some of its rows are read; safetensors' slices are such."""

    def get_shape(self) -> list[int]:
        """Its shape."""

    def get_dtype(self) -> str:
        """Its dtype, as safetensors names it."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows of it."""


class Stored(NamedTuple):
    """A tensor in a file, under the name that it has there."""

    path: Path
    key: str
    values: Values

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.values.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return DTYPES[self.values.get_dtype()]


class _Pickled(NamedTuple):
    """A tensor of a file of torch.save; Values."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


class Source(NamedTuple):
    """A generator, or the trunk of a reward model, that has not been read yet."""

    path: Path
    """As the user gave it."""
    config: WanConfig
    tensors: dict[str, Stored]
    """By native names."""
    shards: tuple[Path, ...] = ()
    """The files, where each has pieces of tensors."""

    @property
    def files(self) -> list[Path]:
        """The files of the tensors, and config.json next to them, be it there or not."""
        if self.shards:
            return list(self.shards)
        paths = sorted({s.path for s in self.tensors.values()})
        return [*paths, paths[0].with_name(CONFIG)]


def find(path: str | Path) -> Source:
    """What is at a path. UserError, one line, where nothing is, and for what is no Wan transformer or one
    that the engine does not run (quantised, VACE, ...), by its name."""
    path = Path(path)
    if sharded(path) is not None:
        from prfl_engine.model.sharded import transformer  # it reads other models by this module

        return transformer(path)
    tensors: dict[str, Stored] = {}
    for key, found in (stored(path) if path.is_file() else _in_folder(transformer_folder(path))).items():
        name = to_native(key)
        if name in tensors:
            raise UserError(f"{found.path}: holds {key}, which is {tensors[name].key} in another layout")
        tensors[name] = found
    layout = name_layout({name: s.shape for name, s in tensors.items()})
    if layout is not None:
        raise UserError(f"{path}: {layout}")
    return Source(path, _config(path, tensors), tensors)


def read_config(path: str | Path) -> WanConfig:
    """The hyper-parameters of what is at a path; of a folder its config.json, and for an I2V model the
    names of the weights, where there are any."""
    path = Path(path)
    if path.is_file() or sharded(path) is not None:
        return find(path).config
    folder = transformer_folder(path)
    config = wan_json.read(folder / CONFIG)
    return find(path).config if config.image and any(folder.glob("*.safetensors")) else config


def sharded(path: str | Path) -> Path | None:
    """The sharded checkpoint that a path is, or a part of; None for another path. Parts are folders that it
    does not have: `ema` stands for the averaged weights, where what is not averaged is as it was; in the
    checkpoint or in its `ema` high_noise_model and low_noise_model stand for one of two experts."""
    path = Path(path)
    for folder in (path, *path.parents[:2]):
        if (folder / INDEX).is_file() and path.relative_to(folder) in _PARTS:
            return folder
    return None


def transformer_folder(path: Path) -> Path:
    """The folder with config.json and weights: `path`, or of a pipeline of diffusers its transformer."""
    if os.path.lexists(path / CONFIG):
        return path
    for first, second in PAIRS:
        if (path / second).is_dir():
            want = f"{path / first} or {path / second}, or model.boundary for both"
            raise UserError(f"{path}: got two experts of Wan2.2 A14B, want {want}")
    inner = path / "transformer"
    return inner if inner.is_dir() else path


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by their names there. UserError for those that are no floating-point numbers."""
    if path.suffix in _PICKLED:
        state = open_state(path)
        for key in state:
            check(isinstance(key, str), str(path), key, "names of tensors")
        found = {k: Stored(path, k, _Pickled(a)) for k, a in state.items()}
    else:
        check(path.suffix == ".safetensors", str(path), path.suffix, f"{_FILES}, or a folder with {CONFIG}")
        file = open_tensors(path)
        found = {k: Stored(path, k, file.get_slice(k)) for k in file.keys()}  # noqa: SIM118
    for key, s in found.items():
        check_float(s.values.get_dtype(), path, key)
    return found


def check_blocks(keys: Iterable[str], source: str | Path, blocks: int) -> None:
    """UserError unless tensors of these names are of so many blocks: said before a model is built."""
    held = count_blocks(keys)
    check(held == blocks, f"{source}: num_layers", blocks, f"the {held} blocks that the tensors are of")


def count_blocks(keys: Iterable[str]) -> int:
    """How many blocks there are, by the largest number."""
    return 1 + max((int(m[1]) for k in keys if (m := re.match(r"blocks\.(\d{1,9})\.", k))), default=-1)


def _in_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder, by their names there; of any *.safetensors files, sharded or not."""
    index, single = (folder / f"{WEIGHTS}.safetensors{end}" for end in (".index.json", ""))
    if os.path.lexists(single):
        paths = [single]
    elif os.path.lexists(index):
        names = read_json(index, "an index of safetensors files").get("weight_map")
        good = isinstance(names, dict) and all(isinstance(n, str) and "/" not in n for n in names.values())
        if not good:
            raise UserError(f"{index}: not an index, want JSON with a weight_map of file names")
        paths = [folder / name for name in sorted(set(names.values()))]
        for path in paths:
            check_file(path, f"a safetensors file, {index.name} names it")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    found: dict[str, Stored] = {}
    for path in paths:
        held = stored(path)
        if both := found.keys() & held.keys():
            key = min(both)
            raise UserError(f"{path}: holds {key}, which {found[key].path.name} holds too")
        found |= held
    if not found:
        raise UserError(f"{folder}: no safetensors file, want a folder of Wan weights, or {_FILES}")
    return found


def _config(path: Path, tensors: Mapping[str, Stored]) -> WanConfig:
    file = path.with_name(CONFIG) if path.is_file() else transformer_folder(path) / CONFIG
    if path.is_file() and not os.path.lexists(file):
        return by_shapes({name: s.shape for name, s in tensors.items()}, path)
    config = wan_json.read(file)
    return replace(config, clip=CLIP in tensors) if config.image else config


def by_shapes(shapes: Mapping[str, tuple[int, ...]], source: Path) -> WanConfig:
    """The hyper-parameters that tensors show. The others are those of all of Wan, as ComfyUI takes them:
    heads of width 128, texts of 512 tokens, eps 1e-6. UserError where they are no whole generator."""

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if len(found := shapes.get(key, ())) != dims:
            raise UserError(f"{key} is {list(found)}, want {dims} dimensions, as in Wan")
        return found

    with named(str(source)):
        dim, channels, *patch = shape("patch_embedding.weight", 5)
        check(dim % 128 == 0, "width", dim, f"a multiple of 128, or {CONFIG} next to the file")
        out = shape("head.head.weight", 2)[0] // max(1, math.prod(patch))
        kind = "i2v" if channels != out else "ti2v" if channels == TI2V_CHANNELS else "t2v"
        return WanConfig(
            model_type=kind,
            dim=dim,
            ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
            num_heads=dim // 128,
            num_layers=count_blocks(shapes),
            in_dim=channels,
            out_dim=out,
            text_dim=shape("text_embedding.0.weight", 2)[1],
            freq_dim=shape("time_embedding.0.weight", 2)[1],
            patch_size=tuple(patch),
            clip=CLIP in shapes,
        )
