"""What a sharded checkpoint holds, without the ranks that wrote it: a generator, adapter or reward model.

Hyper-parameters and scales are those of the configuration in its run.json. Folders that a sharded checkpoint
does not have stand for parts of it: `ema` for the averaged weights, where what is not averaged is as it was;
in the checkpoint or in its `ema` high_noise_model and low_noise_model for one of two experts.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prfl_engine import checksums
from prfl_engine.build import adapter_of
from prfl_engine.checkpoint_shards import INDEX, stored_weights
from prfl_engine.errors import UserError, check, named
from prfl_engine.inputs import read_json
from prfl_engine.model import lora_files
from prfl_engine.model.checkpoint import fitting, load_strict
from prfl_engine.model.experts import HIGH, LOW, pair_at
from prfl_engine.model.lora import PARTS
from prfl_engine.model.reward import RewardModel, make_pool
from prfl_engine.model.reward_files import OFFICIAL, settle
from prfl_engine.model.sources import Source, Stored, count_blocks, read_config
from prfl_engine.model.wan import PRESETS, WanConfig
from prfl_engine.resume import RUN
from prfl_kernels.sublayers.products import LowRank

EMA = "ema"
EXPERTS = {HIGH: "high", LOW: "low"}
_PARTS = {Path(*part) for part in ((), (EMA,), (HIGH,), (LOW,), (EMA, HIGH), (EMA, LOW))}
TRUNK = "transformer."


class Reward(NamedTuple):
    """A reward model: `model` with pooling and MLP; the values of its transformer are in `trunk` alone."""

    model: RewardModel
    trunk: Source
    step: int


def sharded(path: Path) -> Path | None:
    """The sharded checkpoint that a path is, or a part of; None for another path."""
    for folder in (path, *path.parents[:2]):
        if (folder / INDEX).is_file() and path.relative_to(folder) in _PARTS:
            return folder
    return None


def read(path: Path) -> Source | Reward | dict[str, LowRank]:
    """The generator, the reward model or the updates of an adapter, of a path that is `sharded`. UserError
    for what run.json does not say, and for the adapter of a reward model."""
    folder = sharded(path)
    checksums.check(checksums.listed(folder))
    weights, parts = stored_weights(folder), path.relative_to(folder).parts
    if EMA in parts:
        averaged = stored_weights(folder, EMA)
        check(bool(averaged), str(path), "no averaged weights", "a checkpoint of a run with train.ema")
        weights |= averaged
    values = read_json(folder / RUN, "the configuration of a run").get("config")
    where = f"{folder / RUN}: config"
    check(isinstance(values, dict), where, values, "a configuration")
    expert = next((name for name in parts if name in EXPERTS), None)
    weights = _of_expert(path, weights, expert)
    if not any(key.endswith(PARTS) for key in weights):
        if any(key.startswith(TRUNK) for key in weights):
            return _reward(folder, weights, values, where)
        with named(where):
            return Source(path, _generator(values, expert), weights)
    if any(key.startswith(TRUNK) for key in weights):
        want = "want another one; best in the folder of the run has its files"
        raise UserError(f"{folder}: got a sharded checkpoint of the adapter of a reward model, {want}")
    with named(where):
        return _adapter(weights, _section(values, "lora"), expert)


def _of_expert(path: Path, weights: dict[str, Stored], expert: str | None) -> dict[str, Stored]:
    """The weights of one of two experts by their names in it, of any other model all. UserError for a path
    that is of both, or of what is not there."""
    held = {k.partition(".")[0] for k in weights}
    there = {name: short for name, short in EXPERTS.items() if short in held}
    if expert is None:
        want = " or ".join(str(path / name) for name in there)
        check(not there, str(path), "the weights of experts", f"one of them: {want}")
        return weights
    check(expert in there, str(path), "no weights of this expert", "a checkpoint that has trained it")
    prefix = f"{there[expert]}."
    return {k.removeprefix(prefix): s for k, s in weights.items() if k.startswith(prefix)}


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    check(isinstance(section, dict), name, section, "a section of a configuration")
    return section


def _generator(values: dict[str, Any], expert: str | None = None) -> WanConfig:
    """The hyper-parameters of the generator that a run began with, which those of two experts share."""
    model = _section(values, "model")
    path, preset = model.get("path"), model.get("preset")
    if path is None:
        check(preset in PRESETS, "model.preset", preset, f"one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    with named("model.path"):
        return read_config(str(path) if expert is None else pair_at(str(path), model.get("low"))[0])


def _adapter(
    weights: dict[str, Stored], lora: dict[str, Any], expert: str | None = None
) -> dict[str, LowRank]:
    rank, alpha, path = (lora.get(name) for name in ("rank", "alpha", "path"))
    check(type(rank) is int and rank > 0, "lora.rank", rank, "a whole number from 1 on")
    good = alpha is None or (type(alpha) in (int, float) and alpha > 0)
    check(good, "lora.alpha", alpha, "a positive number")
    scales: dict[str, float] = {}
    if path is not None and expert is not None:
        path = adapter_of(str(path), expert, both=False)
    if path is not None:  # its patterns may give a layer a scale of its own
        with named("lora.path"):
            updates, own = lora_files.read(str(path))
        scales = {name: updates[name].scale for name in own}
    found = {}
    for name in sorted({key.rpartition(".")[0] for key in weights if key.endswith(PARTS)}):
        down, up = (weights[f"{name}.{part}"].values[:].float() for part in PARTS)
        found[name] = LowRank(down, up, scales.get(name, (rank if alpha is None else alpha) / rank))
    return found


def _reward(folder: Path, weights: dict[str, Stored], values: dict[str, Any], where: str) -> Reward:
    step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    check(step is not None, str(folder), folder.name, "a folder checkpoint-N, as a run names it")
    inner = {k.removeprefix(TRUNK): s for k, s in weights.items() if k.startswith(TRUNK)}
    with named(where):
        reward = _section(values, "reward")
        begin = reward.get("path")
        names = "num_heads", "feature_layer", "return_type", "pool"
        given = {k: reward[k] for k in names if reward.get(k, "auto") != "auto"}
        if begin is None:
            config = _generator(values)
            given = OFFICIAL | {"feature_layer": count_blocks(inner)} | given
        else:
            with named("reward.path"):
                config, given = read_config(str(begin)), settle(Path(begin), given)
    trunk = fitting(config, inner, folder, count_blocks(inner), head=False)
    parts: dict[str, dict[str, Tensor]] = {"pool": {}, "mlp": {}}
    for key, stored in weights.items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][name] = stored.values[:]
    queries, add_query = len(parts["pool"].get("queries", ())), given["return_type"] == "query"
    pool = make_pool(given["pool"], config.dim, queries, given["num_heads"], add_query=add_query)
    layers = given["feature_layer"]
    model = RewardModel(trunk, pool, layers if isinstance(layers, int) else tuple(layers))
    for part, state in parts.items():
        load_strict(model.get_submodule(part), state, f"{folder}: {part}")
    return Reward(model, Source(folder, config, inner), int(step[1]))
