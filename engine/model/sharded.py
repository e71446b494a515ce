"""What a sharded checkpoint holds, without the ranks that wrote it: a generator, adapter or reward model.

Hyper-parameters and scales are those of the configuration in its run.json. A path may name a part of the
checkpoint (sources.sharded).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prfl_engine.errors import UserError, check, named
from prfl_engine.inputs import read_json
from prfl_engine.model import lora_files
from prfl_engine.model.experts import HIGH, LOW, adapter_of, pair_at
from prfl_engine.model.lora import PARTS
from prfl_engine.model.reward_files import OFFICIAL, settle
from prfl_engine.model.shard_files import read_index, stored_weights
from prfl_engine.model.sources import EMA, INDEX, Source, Stored, count_blocks, read_config, sharded
from prfl_engine.model.wan import PRESETS, WanConfig
from prfl_kernels.sublayers.products import LowRank

RUN = "run.json"
"""The configuration of the run that wrote a checkpoint."""
EXPERTS = {HIGH: "high", LOW: "low"}
"""The two experts by the folders that stand for them: what the names of their weights begin with."""
TRUNK = "transformer."
"""What the names of the transformer's weights begin with in a reward model."""
GENERATOR = "a generator"
"""Held.kind of a whole generator, or of one of two experts."""
ADAPTER = "an adapter"
"""Held.kind of the LoRA updates of a generator."""
REWARD = "a reward model"
"""Held.kind of a reward model."""


class Held(NamedTuple):
    """A sharded checkpoint, or a part of it."""

    folder: Path
    kind: str  # GENERATOR, ADAPTER or REWARD
    weights: dict[str, Stored]  # by their names in the model
    expert: str | None  # the folder that stands for it
    values: dict[str, Any]  # the configuration of its run
    where: str  # which is there

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is read from."""
        shards = read_index(self.folder)["files"]
        return tuple(self.folder / name for name in (INDEX, RUN, *shards))


def held(path: str | Path) -> Held:
    """What is at a path that is `sharded`. UserError where it is not there, and for the adapter of a reward
    model."""
    path, folder = Path(path), sharded(path)
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
    reward, adapted = any(k.startswith(TRUNK) for k in weights), any(k.endswith(PARTS) for k in weights)
    if reward and adapted:
        want = "want another one; best in the folder of the run has its files"
        raise UserError(f"{folder}: got a sharded checkpoint of the adapter of a reward model, {want}")
    kind = REWARD if reward else ADAPTER if adapted else GENERATOR
    return Held(folder, kind, weights, expert, values, where)


def transformer(path: Path) -> Source:
    """The generator, or the trunk of the reward model, at a path that is `sharded`."""
    found = held(path)
    check(found.kind != ADAPTER, str(path), found.kind, "a generator or a reward model")
    if found.kind == GENERATOR:
        with named(found.where):
            return Source(path, _generator(found.values, found.expert), found.weights, found.files)
    inner = {k.removeprefix(TRUNK): s for k, s in found.weights.items() if k.startswith(TRUNK)}
    with named(found.where):
        begin = _section(found.values, "reward").get("path")
        if begin is None:
            return Source(path, _generator(found.values), inner, found.files)
        with named("reward.path"):
            return Source(path, read_config(str(begin)), inner, found.files)


def adapter(path: Path) -> tuple[dict[str, LowRank], set[str], tuple[Path, ...]]:
    """The adapter at a path that is `sharded`, as lora_files.read gives it, and its files."""
    found = held(path)
    check(found.kind == ADAPTER, str(path), found.kind, "an adapter")
    with named(found.where):
        updates, own = _updates(found)
    return updates, own, found.files


def reward_settings(path: Path) -> dict[str, Any]:
    """The settings of the reward model at a path that is `sharded`, as reward.json has them, all of them."""
    found = held(path)
    check(found.kind == REWARD, str(path), found.kind, "a reward model")
    step = re.fullmatch(r"checkpoint-(\d+)", found.folder.name)
    check(step is not None, str(found.folder), found.folder.name, "a folder checkpoint-N, as a run names it")
    with named(found.where):
        reward = _section(found.values, "reward")
        given = {k: reward[k] for k in OFFICIAL if reward.get(k, "auto") != "auto"}
        if (begin := reward.get("path")) is None:
            blocks = count_blocks(k.removeprefix(TRUNK) for k in found.weights)
            settings = OFFICIAL | {"feature_layer": blocks} | given
        else:
            with named("reward.path"):
                settings = settle(Path(begin), given)
    layers = settings["feature_layer"]
    return settings | {
        "feature_layer": layers if isinstance(layers, int) else tuple(layers), "step": int(step[1]),
    }  # fmt: skip


def heads(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of the pooling and the MLP of the reward model at a path that is `sharded`, as
    checkpoint.read_heads gives them."""
    parts: dict[str, dict[str, Tensor]] = {"mlp": {}}
    for key, stored in held(path).weights.items():
        part, _, name = key.partition(".")
        if part in ("pool", "mlp"):
            parts.setdefault(part, {})[name] = stored.values[:]
    return parts


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


def _updates(found: Held) -> tuple[dict[str, LowRank], set[str]]:
    """The updates of an adapter by their layers, and the layers with a scale of their own."""
    lora = _section(found.values, "lora")
    rank, alpha, path = (lora.get(name) for name in ("rank", "alpha", "path"))
    check(type(rank) is int and rank > 0, "lora.rank", rank, "a whole number from 1 on")
    good = alpha is None or (type(alpha) in (int, float) and alpha > 0)
    check(good, "lora.alpha", alpha, "a positive number")
    scales: dict[str, float] = {}
    if path is not None and found.expert is not None:
        path = adapter_of(str(path), found.expert, both=False)
    if path is not None:  # its patterns may give a layer a scale of its own
        with named("lora.path"):
            updates, own = lora_files.read(str(path))
        scales = {name: updates[name].scale for name in own}
    made = {}
    for name in sorted({key.rpartition(".")[0] for key in found.weights if key.endswith(PARTS)}):
        down, up = (found.weights[f"{name}.{part}"].values[:].float() for part in PARTS)
        made[name] = LowRank(down, up, scales.get(name, (rank if alpha is None else alpha) / rank))
    alike = len({(len(low.down), low.scale) for low in made.values()}) == 1
    return made, set() if alike else set(scales) & made.keys()
