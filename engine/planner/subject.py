"""What a configuration trains, found without data and without weights: a folder of weights that is not here
is known by its name, and latents by their size."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prfl_engine.config import Config
from prfl_engine.data import Reader, read_lists
from prfl_engine.errors import UserError, check
from prfl_engine.model.experts import HIGH, pair_at
from prfl_engine.model.reward_files import OFFICIAL, settle
from prfl_engine.model.sources import CONFIG, read_config, transformer_folder
from prfl_engine.model.wan import PRESETS, Precision, WanConfig
from prfl_engine.planner.fit_memory import check_pooling, setup_of
from prfl_engine.planner.setup import RewardSetup, Setup

SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # latents of 81 frames at 832 x 480 and 1280 x 720
# Of Wan2.2's VAE, 16 x 16 x 4, 121 frames at 832 x 480 and 1280 x 704.
SIZES_TI2V = {"480p": (31, 30, 52), "720p": (31, 44, 80)}


@dataclass(frozen=True)
class Subject:
    """A configuration with what the planner has to know besides, and where it is from."""

    config: Config
    setup: Setup
    model: str  # the name of the generator
    assumed: tuple[str, ...]


def find(
    config: Config, path: str, latent: str | None = None, preset: str | None = None, on_cpu: bool = False
) -> Subject:
    """The subject of the configuration in the file `path`.

    latent: 480p, 720p or TxHxW, the size of latents; None: of data.train, else by the names in the
    configuration. preset: the generator, as model.preset; None: of model.path, else by its name. UserError
    where one of them cannot be found.
    """
    c, assumed = config, []
    names = [c.model.preset or "", Path(c.model.path or "").name, Path(path).stem]
    name, model = _generator(c, preset, assumed)
    shape = _shape(c, latent, [preset or "", *names], model, assumed)
    reward = _reward(c, model, assumed) if c.loss.weight > 0 or c.reward.path else None
    held_out = [shape] * c.eval.samples if c.eval.every else []
    dtypes = (c.model.weights_dtype, c.model.compute_dtype, c.model.residual_dtype)
    precision = Precision(*(getattr(torch, dtype) for dtype in dtypes))
    setup = setup_of(c, model, precision, reward, [shape] * c.data.batch_size, held_out, on_cpu)
    return Subject(c, setup, name, tuple(assumed))


def _generator(c: Config, preset: str | None, assumed: list[str]) -> tuple[str, WanConfig]:
    known = ", ".join(PRESETS)
    if preset is not None:
        check(preset in PRESETS, "--model", preset, f"one of {known}")
        return preset, PRESETS[preset]
    if c.model.path is not None:
        folder = Path(c.model.path)
        if c.model.boundary is not None and (folder / HIGH).is_dir():
            folder = pair_at(folder, c.model.low)[0]
        if folder.is_file() or (transformer_folder(folder) / CONFIG).is_file():
            return folder.name, read_config(folder)
        expert = " high" if c.model.boundary is not None else ""
        preset = _named(f"{folder.parent.name} {folder.name}{expert}", PRESETS)
        want = f"a folder or file that is here, or --model with one of {known}"
        check(preset is not None, "model.path", c.model.path, want)
        assumed.append(f"model.path is not here: taken for {preset} by its name")
        return preset, PRESETS[preset]
    check(c.model.preset in PRESETS, "model.preset", c.model.preset, f"one of {known}, or set model.path")
    return c.model.preset, PRESETS[c.model.preset]


def _named(text: str, names: Sequence[str]) -> str | None:
    """The longest of `names` that is in the text."""
    text = re.sub("[^a-z0-9.]+", "-", text.lower())
    return max((n for n in names if n in text), key=len, default=None)


def _shape(c: Config, latent: str | None, names: list[str], model: WanConfig, assumed: list[str]):
    reader, (sizes, frames) = Reader(model, first_frame=c.data.first_frame), (SIZES, 81)
    if model.model_type == "ti2v":
        sizes, frames = SIZES_TI2V, 121
    if latent is not None:
        size = sizes.get(latent.lower()) or tuple(map(int, re.findall("[0-9]+", latent)))
        ok = latent.lower() in sizes or re.fullmatch("[0-9]{1,4}x[0-9]{1,4}x[0-9]{1,4}", latent)
        fits = ok and min(size) > 0 and not any(n % p for n, p in zip(size, model.patch_size, strict=True))
        check(bool(fits), "--latent", latent, f"480p, 720p, or TxHxW in multiples of {model.patch_size}")
        return model.out_dim, *size
    if c.data.train and all(Path(p).is_file() for p in c.data.train):
        shapes = {tuple(reader.shape(p)[1:]) for p in read_lists(c.data.train, "data.train")}
        largest = max(shapes, key=lambda s: torch.Size(s).numel())
        return tuple(largest)
    found = next((n for n in (_named(name, sizes) for name in names) if n), None)
    if found is None:
        raise UserError("--latent: got nothing, want 480p, 720p or TxHxW: data.train is not here")
    size = f"latents of {found}, {frames} frames"
    assumed.append(f"data.train is not here: {size}, by the configuration's name")
    return model.out_dim, *sizes[found]


def _reward(c: Config, model: WanConfig, assumed: list[str]) -> RewardSetup:
    r, folder = c.reward, Path(c.reward.path or "")
    given = {name: value for name, value in r.pooling.items() if name != "add_query"}
    if "add_query" in r.pooling:
        given["return_type"] = "query" if r.pooling["add_query"] else None
    here = c.reward.path is not None and (folder / CONFIG).is_file()
    if here:
        trunk, settings = read_config(folder), settle(folder, given)
    else:
        trunk, settings = model, OFFICIAL | given
    layers = settings["feature_layer"]
    check_pooling(settings["pool"], layers)
    layers = layers if isinstance(layers, int) else layers[0]
    if not here:
        assumed.append(f"reward.path is not here: {layers} blocks of the generator's width, as official ones")
    return RewardSetup(
        layers, trunk, r.num_queries, settings["num_heads"], settings["return_type"] == "query",
    )  # fmt: skip
