"""The files of a reward model, and the settings that their weights do not show.

Next to the official three files (transformer, query_attention unless tokens are pooled without queries, mlp)
is reward.json with the pooling (pool, num_heads, return_type), feature_layer (a number, or a list of several)
and the training step. An official folder has none and is read without it.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prfl_engine import checksums
from prfl_engine.errors import UserError, check
from prfl_engine.inputs import read_json
from prfl_engine.model.reward import POOLS, QueryPool, RewardModel
from prfl_engine.model.sources import sharded

SETTINGS = "reward.json"
OFFICIAL = {"num_heads": 8, "feature_layer": 8, "return_type": "query", "pool": "query"}


def write_settings(model: RewardModel, folder: Path, step: int) -> None:
    """Write reward.json of a model."""
    layers, pool = model.layers, model.pool
    values = {"feature_layer": layers[0] if len(layers) == 1 else list(layers), "step": step}
    if isinstance(pool, QueryPool):
        return_type = "query" if pool.add_query else None
        values |= {"num_heads": pool.multihead_attn.num_heads, "return_type": return_type}
    else:
        values |= {"pool": pool.kind}
    (folder / SETTINGS).write_text(json.dumps(values, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """The values of a folder's reward.json; {} where there is none; all of a sharded checkpoint. UserError
    for values that cannot be."""
    if sharded(folder) is not None:
        from prfl_engine.model.sharded import reward_settings  # it reads other reward models by this module

        return reward_settings(folder)
    path = folder / SETTINGS
    if not os.path.lexists(path):
        return {}
    values = read_json(path, "the settings of a reward model")
    layers = values.get("feature_layer", 1)
    several = isinstance(layers, list) and len(layers) > 1 and layers == sorted(set(map(_number, layers)))
    if several:
        values["feature_layer"] = tuple(layers)
    for name, least in (("num_heads", 1), ("feature_layer", 1), ("step", 0)):
        value = values.get(name, least)
        value = layers[0] if several and name == "feature_layer" else value
        check(type(value) is int and value >= least, f"{path}: {name}", value, f"a whole number from {least}")
    value = values.get("return_type")
    check(value in ("query", None), f"{path}: return_type", value, "query or null")
    value = values.setdefault("pool", "query")
    check(value in POOLS, f"{path}: pool", value, ", ".join(POOLS))
    return {name: values[name] for name in (*OFFICIAL, "step") if name in values}


def _number(value: Any) -> int:
    return value if type(value) is int else -1


def settle(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """num_heads, feature_layer, return_type and pool: as reward.json says, else as given, else the official
    values. UserError where both say something, and not the same.
    """
    layers = given.get("feature_layer", 1)
    if not isinstance(layers, int):
        given = given | {"feature_layer": layers[0] if len(layers) == 1 else tuple(layers)}
    stored = {name: value for name, value in read_settings(folder).items() if name != "step"}
    for name, value in given.items():
        if name in stored and value != stored[name]:
            got, want = json.dumps(value), json.dumps(stored[name])
            raise UserError(f"reward.{name}: got {got}, want {want} as {folder / SETTINGS} says")
    settings = OFFICIAL | given | stored
    for name in ("num_heads", "return_type"):
        if settings["pool"] != "query" and name in given:
            got = json.dumps(given[name])
            raise UserError(f"reward.{name}: got {got}, want auto: {folder} pools by {settings['pool']}")
    return settings


def find_head(folder: Path, name: str) -> Path:
    """query_attention or mlp of a folder: NAME_step_N.ckpt of the largest N, or else NAME.ckpt."""
    steps = [path for path in folder.glob(f"{name}_step_*.ckpt") if step_of(path) is not None]
    plain = folder / f"{name}.ckpt"
    if not steps and not plain.is_file():
        raise UserError(f"{folder}: got no {name}_step_N.ckpt, want the official reward model files")
    return max(steps, key=step_of, default=plain)


def find_reward(
    transformer: Path,
    query_attention: str | Path | None = None,
    mlp: str | Path | None = None,
    num_heads: int | None = None,
    add_query: bool | None = None,
    feature_layer: int | Sequence[int] | None = None,
    pool: str | None = None,
) -> tuple[dict[str, Any], Path | None, Path | None]:
    """(num_heads, feature_layer, return_type and pool, the file of the pooling, that of the MLP) of a reward
    model whose arguments are as load_reward takes them. No file of a pooling without queries, and neither
    file of a sharded checkpoint, which has all parts.

    UserError where reward.json says otherwise, where a file is not there or not as checksums.json says, and
    where they are not of one step.
    """
    given = {"num_heads": num_heads, "feature_layer": feature_layer, "pool": pool}
    given = {name: value for name, value in given.items() if value is not None}
    if add_query is not None:
        given["return_type"] = "query" if add_query else None
    settings = settle(transformer, given)
    if sharded(transformer) is not None:
        for name, value in ("query_attention", query_attention), ("mlp", mlp):
            check(value is None, f"reward.{name}", value, f"none: {transformer} has all parts")
        return settings, None, None
    return settings, *head_files(transformer, settings["pool"], query_attention, mlp)


def head_files(
    folder: Path, pool: str, query_attention: str | Path | None = None, mlp: str | Path | None = None
) -> tuple[Path | None, Path]:
    """The files of the pooling, None where its kind `pool` has no weights, and of the MLP of a reward model:
    those that are given, else those of the folder with its transformer.

    UserError where one is missing, where they are not of one step, and where they or reward.json are not as
    checksums.json says.
    """
    queries = Path(query_attention or find_head(folder, "query_attention")) if pool == "query" else None
    mlp = Path(mlp or find_head(folder, "mlp"))
    _check_steps(folder, queries, mlp)
    checksums.check(path for path in (folder / SETTINGS, queries, mlp) if path is not None)
    return queries, mlp


def _check_steps(folder: Path, query_attention: Path | None, mlp: Path) -> None:
    """UserError unless both files, and the transformer of `folder` where reward.json says it, are of one
    step, as far as their names say it; two files in one folder both say it, or neither does.
    query_attention None: a pooling without queries."""
    first = query_attention or mlp
    steps = step_of(first), step_of(mlp)
    known = None not in steps or first.parent == mlp.parent
    if known and steps[0] != steps[1]:
        raise UserError(f"{mlp}: with {first.name}, want two files of one step")
    step = read_settings(folder).get("step")
    if None not in (step, steps[0]) and step != steps[0]:
        raise UserError(f"{first}: got step {steps[0]}, want {step} as {folder / SETTINGS} says")


def step_of(path: Path) -> int | None:
    """N of NAME_step_N.ckpt."""
    match = re.search(r"_step_([0-9]+)$", path.stem)
    return None if match is None else int(match[1])
