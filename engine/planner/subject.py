"""What a configuration trains, found without data and without weights: a folder of weights that is not here
is known by its name, and latents by their size."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prfl_engine.config import Config
from prfl_engine.data import Reader, check_frames, read_lists
from prfl_engine.errors import UserError, check
from prfl_engine.guidance import check_scales
from prfl_engine.model.experts import HIGH, pair_at
from prfl_engine.model.reward_files import OFFICIAL, settle
from prfl_engine.model.sources import read_config
from prfl_engine.model.wan import PRESETS, Precision, WanConfig
from prfl_engine.planner.fit_memory import check_pooling, setup_of
from prfl_engine.planner.setup import RewardSetup, RewardTraining, Setup, Validation

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
    config: Config,
    path: str,
    latent: str | None = None,
    preset: str | None = None,
    on_cpu: bool = False,
    readers: int = 1,
    train_reward: bool = False,
) -> Subject:
    """The subject of the configuration in the file `path`; train_reward: of `prfl train-reward`. readers: as
    `fit_memory.setup_of` takes it.

    latent: 480p, 720p or TxHxW, the size of latents; None: of data.train, else by the names in the
    configuration. preset: the generator, as model.preset; None: of model.path, else by its name. UserError
    where one of them cannot be found.
    """
    c, assumed = config, []
    if not train_reward and c.loss.weight > 0 and c.reward.path is None:
        want = "the folder of a reward model, or --train-reward for the training of one"
        raise UserError(f"reward.path: got null, want {want}")
    names = [c.model.preset or "", Path(c.model.path or "").name, Path(path).stem]
    if train_reward and c.reward.path is not None:
        name, model, known = _trained_reward(c, preset, assumed)
    else:
        name, model = _generator(c, preset, assumed)
        known = OFFICIAL | {"feature_layer": c.reward.blocks} | _given(c)
    shape = _shape(c, latent, [preset or "", *names], model, assumed)
    if c.data.first_frame:
        check_frames(shape, "a latent")
    if train_reward:
        return Subject(c, _reward_setup(c, model, shape, known, on_cpu, assumed), name, tuple(assumed))
    if c.eval.every:
        check_scales(c, c.eval.guidance, c.eval.guidance, "eval.guidance")
    rewards = [_reward(c, model, assumed)] if c.loss.weight > 0 or c.reward.path else []
    rewards += [
        _reward(replace(c, reward=own), model, assumed, f"reward.more {name}")
        for name, own in c.reward.further
    ]
    held_out = [shape] * c.eval.samples if c.eval.every else []
    shapes = [shape] * c.data.batch_size
    setup = setup_of(c, model, _precision(c), rewards, shapes, held_out, on_cpu, readers)
    return Subject(c, setup, name, tuple(assumed))


def _precision(c: Config) -> Precision:
    dtypes = (c.model.weights_dtype, c.model.compute_dtype, c.model.residual_dtype)
    return Precision(*(getattr(torch, dtype) for dtype in dtypes))


def _generator(c: Config, preset: str | None, assumed: list[str]) -> tuple[str, WanConfig]:
    known = ", ".join(PRESETS)
    if preset is not None:
        check(preset in PRESETS, "--model", preset, f"one of {known}")
        return preset, PRESETS[preset]
    if c.model.path is not None:
        folder = Path(c.model.path)
        if c.model.boundary is not None and (folder / HIGH).is_dir():
            folder = pair_at(folder, c.model.low)[0]
        if folder.exists():  # without a config.json it is refused, as in training
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


def _reward(c: Config, model: WanConfig, assumed: list[str], name: str = "reward.path") -> RewardSetup:
    r, folder, given = c.reward, Path(c.reward.path), _given(c)
    if folder.exists():
        trunk, settings = read_config(folder), settle(folder, given)
    else:
        trunk, settings = model, OFFICIAL | given
    layers = settings["feature_layer"]
    check_pooling(settings["pool"], layers)
    layers = layers if isinstance(layers, int) else layers[0]
    if not folder.exists():
        assumed.append(f"{name} is not here: {layers} blocks of the generator's width, as official ones")
    return RewardSetup(
        layers, trunk, r.num_queries, settings["num_heads"], settings["return_type"] == "query", r.storage,
    )  # fmt: skip


def _given(c: Config) -> dict:
    """num_heads, feature_layer, return_type and pool that the configuration sets."""
    given = {name: value for name, value in c.reward.pooling.items() if name != "add_query"}
    if "add_query" in c.reward.pooling:
        given["return_type"] = "query" if c.reward.pooling["add_query"] else None
    return given


def _trained_reward(c: Config, preset: str | None, assumed: list[str]) -> tuple[str, WanConfig, dict]:
    """Name, transformer and settings of the reward model that is trained further."""
    folder = Path(c.reward.path)
    if folder.exists():
        return folder.name, read_config(folder), settle(folder, _given(c))
    preset = preset or _named(folder.name, PRESETS)
    want = f"a folder that is here, or --model with one of {', '.join(PRESETS)}"
    check(preset in PRESETS, "reward.path", c.reward.path, want)
    known = OFFICIAL | _given(c)
    layers = known["feature_layer"]
    assumed.append(f"reward.path is not here: {layers} blocks of {preset}, as official ones")
    return f"reward model of {preset}", PRESETS[preset], known


def _reward_setup(
    c: Config, model: WanConfig, shape: tuple[int, ...], known: dict, on_cpu: bool, assumed: list[str]
) -> Setup:
    """What `prfl train-reward` takes. UserError where it would refuse."""
    check(c.model.budget is None, "model.recompute", c.model.recompute, "a mode or names for a reward model")
    if c.reward.path is None:
        check(c.model.path is not None, "model.path", None, "the generator that the reward starts from")
    count = 0
    if c.eval.every:
        count = c.eval.samples
        if c.data.val and all(Path(p).is_file() for p in c.data.val):
            count = len(read_lists(c.data.val, "data.val"))
        else:
            assumed.append(f"data.val is not here: {count} held-out samples, as many as eval.samples")
    check_pooling(known["pool"], known["feature_layer"])
    pairs = c.reward.loss == "bt"
    sides = 1 + (pairs and c.eval.pairs)  # of a held-out sample
    reward = RewardSetup(
        known["feature_layer"], model, c.reward.num_queries, known["num_heads"],
        known["return_type"] == "query",
    )  # fmt: skip
    validation = None
    if count:
        size = min(c.eval.batch_size, count)
        batches = -(-count // c.eval.batch_size)
        values = batches * (1 + len(c.eval.timesteps) * sides)
        read = min(c.eval.batch_size + 1, count) if on_cpu else 0
        validation = Validation((size, *shape), True, batches, values, 0, read, count, sides)
    precision, at_once = _precision(c), c.reward.pairs_at_once
    return Setup(
        model, (c.data.batch_size * (1 + at_once), *shape), precision.compute, precision.residual,
        precision.weights, reward,
        graded=False, sft=False, blocks=known["feature_layer"], chunk=c.model.chunk, keep=c.model.keep,
        lora=c.lora if c.lora.rank else None, validation=validation, sequence=c.parallel.sequence,
        first_frame=c.data.first_frame,
        trains=RewardTraining(pairs, at_once, c.reward.train_embeddings, c.reward.dropout),
        grad_dtype=torch.float32 if c.optim.grad_dtype == "float32" else None,
        arriving=c.optim if c.optim.in_backward else None,
    )  # fmt: skip
