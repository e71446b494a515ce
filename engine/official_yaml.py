"""The YAML files of HY-Video-PRFL, read as they are, and what its scripts do where ours do something else.

A file is recognised by its sections. KEYS (official_keys.py) says for every key which of our fields it sets,
what value it has to have, or that it has no meaning here; a run names the latter, and unknown keys, in one
line. `settings` makes our mapping of a file; `OFFICIAL` is what train.compat=official sets. docs/official.md
explains both.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prfl_engine.bounds import check_path
from prfl_engine.errors import UserError, check, show
from prfl_engine.official_keys import KEYS, Copy, Only

Job = Literal["train", "train-reward", "eval-reward"]
SECTIONS = {"dataset", "optimizer", "lrm", "extra_model"}
NULL_TEXT = "temp_data/null/wanx/null.npy"
"""Where the scripts look for the embedding of the null prompt, from the working directory."""

OFFICIAL = {
    "model.latent_dtype": "bfloat16",
    "lora.targets": ["q", "k", "v", "o"],
    "data.skip_broken": 100,
    "rollout.one_index": "turn",
    "rollout.whole_timesteps": True,
    "loss.split": True,
    "optim.clip_each": True,
    "optim.clip_heads": False,
    "train.ema_each": "micro_batch",
    "eval.one_noise": True,
    "eval.pairs": False,
}
"""The fields that train.compat=official sets, as far as they are not set themselves."""


def recognised(values: Mapping[str, Any]) -> bool:
    """Whether the sections of a YAML file are those of HY-Video-PRFL."""
    return len(SECTIONS & values.keys()) >= 2


@dataclass
class Translation:
    """A file in our words."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # by section and field
    origin: dict[str, str] = field(default_factory=dict)  # the official key that a field is from
    ignored: list[str] = field(default_factory=list)  # the keys without meaning here
    reward: bool = False  # a file of reward training
    updates: int = 0  # optimizer.max_train_steps, to which its schedule of learning rates refers


def compat(values: dict[str, dict[str, Any]], updates: int = 0) -> None:
    """Give the fields of OFFICIAL that are not set their values, where train.compat asks for it."""
    train = values.get("train")
    if not isinstance(train, dict) or train.get("compat") != "official":
        return
    preset = dict(OFFICIAL)
    if updates and values.get("optim", {}).get("schedule") == "cosine":
        preset["optim.horizon"] = updates
    for name, value in preset.items():
        section, _, key = name.partition(".")
        if isinstance(fields := values.setdefault(section, {}), dict):
            fields.setdefault(key, value)


class _File:
    """The keys of a file, flat."""

    def __init__(self, values: Mapping[str, Any]):
        self.flat: dict[str, Any] = {}
        self._flatten(values, "")

    def _flatten(self, values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                self._flatten(value, f"{prefix}{key}.")
            else:
                self.flat[f"{prefix}{key}"] = value

    def get(self, key: str, default: Any = None) -> Any:
        assert key in KEYS, key
        value = self.flat.get(key, default)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{key}: got {show(value)}, want a number") from None

    def whole(self, key: str, default: int, least: int) -> int:
        value = self.number(key, default)
        ok = value.is_integer() and value >= least
        check(ok, key, self.flat.get(key), f"a whole number from {least}")
        return int(value)


def settings(values: Mapping[str, Any], world: int | None = None) -> Translation:
    """Our fields for a file's mapping. world: processes of the run; None: those that torchrun has started.
    UserError, by the official key, for what we cannot do."""
    file = _File(values)
    made = Translation(reward="lrm.loss" in file.flat)
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    for key, value in file.flat.items():
        rule = KEYS.get(key)
        if rule is None:
            made.ignored.append(key)
        elif isinstance(rule, Copy) and value is not None:
            _put(made, rule.field, value, key)
        elif isinstance(rule, Only) and value is not None:
            _check(rule, key, value)
    for part in (_models, _data, _optimizer, _length, _reward):
        part(file, made, world)
    return made


def _check(rule: Only, key: str, value: Any) -> None:
    try:
        ok = rule.holds(value)
    except (TypeError, ValueError):
        ok = False
    check(ok, key, value, rule.want)


def _put(made: Translation, name: str, value: Any, key: str) -> None:
    """Set a field of ours; `key` is what an error about its value has to name."""
    section, _, field_name = name.partition(".")
    made.values.setdefault(section, {})[field_name] = value
    made.origin[name] = key


def _models(file: _File, made: Translation, world: int) -> None:
    """Where weights come from: what is resumed, else what is named, else the base model."""
    keys = ["model.init_transformer_path", "model.base_path"]
    if not made.reward:
        keys.insert(0, "model.resume_transformer_path")
    key = next((key for key in keys if file.get(key)), None)
    if key is not None:
        _put(made, "model.path", file.get(key), key)
    names = ("transformer", "query_attention", "mlp")
    start = "resume" if made.reward else "lrm"
    found = {name: f"model.{start}_{name}_path" for name in names}
    if file.get("lrm.pool", "q_attn") != "q_attn":
        del found["query_attention"]
    if not made.reward or any(file.get(key) for key in found.values()):
        for name, key in found.items():
            field_name = "reward.path" if name == "transformer" else f"reward.{name}"
            _put(made, field_name, file.get(key), key)
    if file.get("model.lora.use_lora", False):
        _put(made, "lora.rank", file.whole("model.lora.lora_rank", 128, 1), "model.lora.lora_rank")
        if path := file.get("model.lora.resume_lora_path"):
            _put(made, "lora.path", path, "model.lora.resume_lora_path")
    if file.get("model.ema.use_ema", False):
        _put(made, "train.ema", file.get("model.ema.ema_decay", 0.99), "model.ema.ema_decay")
    share = file.number("model.selective_checkpointing", 1)
    if file.get("model.gradient_checkpointing", False) and share > 0:
        _put(made, "model.recompute", "full", "model.gradient_checkpointing")
        if share != 1:
            made.ignored.append("model.selective_checkpointing")
    if file.get("model.fsdp.fsdp_sharding_startegy") == "full":
        _put(made, "parallel.replicate", 1, "model.fsdp.fsdp_sharding_startegy")
    elif "model.fsdp.fsdp_sharding_startegy" in file.flat:
        made.ignored.append("model.fsdp.fsdp_sharding_startegy")
    key, dtypes = "train.precision", {"bf16": "bfloat16", "fp32": "float32"}
    value = file.get(key, "bf16")
    check(value in list(dtypes), key, value, "bf16 or fp32")  # any value may be looked for in a list
    _put(made, "model.compute_dtype", dtypes[value], key)
    if value == "fp32":  # its latents have the same precision, with train.compat too
        _put(made, "model.latent_dtype", "float32", key)


def _data(file: _File, made: Translation, world: int) -> None:
    key = "dataset.sp_size"
    sequence = file.whole(key, 1, 1)
    if world > 1:
        check(world % sequence == 0, key, sequence, f"a divisor of the {world} processes")
        _put(made, "parallel.sequence", sequence, key)
    elif sequence > 1:
        made.ignored.append(key)  # one process
    key = "dataset.uncond_prob"
    drop = file.get(key, [0.0])
    check(isinstance(drop, list) and bool(drop), key, drop, "a list, of the prompt and of the image")
    drop = 0.0 if made.reward else drop[0]  # reward training never drops a prompt
    _put(made, "data.text_dropout", drop, key)
    if made.reward:
        if key in file.flat:
            made.ignored.append(key)
    elif drop:
        _put(made, "data.null_text", NULL_TEXT, key)
    if path := file.get("dataset.val_meta_file_list"):
        _put(made, "data.val", path, "dataset.val_meta_file_list")


def _optimizer(file: _File, made: Translation, world: int) -> None:
    lr = file.get("optimizer.learning_rate")
    if lr is not None:
        _put(made, "optim.lr", lr, "optimizer.learning_rate")
        head = file.get("optimizer.learning_rate_mlp", lr)
        _put(made, "optim.lr_head", head, "optimizer.learning_rate_mlp")
    betas = [file.get(f"optimizer.adam_beta{i}", usual) for i, usual in ((1, 0.9), (2, 0.999))]
    _put(made, "optim.betas", betas, "optimizer.adam_beta1")
    key, warmup = "optimizer.lr_scheduler", file.whole("optimizer.lr_warmup_steps", 0, 0)
    kind = file.get(key, "constant")
    known = "constant", "constant_with_warmup", "cosine"
    check(kind in known, key, kind, ", ".join(known))
    if kind == "constant":  # it has no warm-up
        keys = "optimizer.lr_warmup_steps", "optimizer.lr_num_cycles"
        made.ignored += [key for key in keys if key in file.flat]
        return
    _put(made, "optim.warmup", warmup, "optimizer.lr_warmup_steps")
    if kind == "cosine":
        _put(made, "optim.schedule", "cosine", key)
        _put(made, "optim.cycles", file.number("optimizer.lr_num_cycles", 0.5), "optimizer.lr_num_cycles")


def _length(file: _File, made: Translation, world: int) -> None:
    """Its steps are micro-batches of every group of processes; ours are cycles of them."""
    groups = max(1, world // file.whole("dataset.sp_size", 1, 1))
    key = "train.gradient_accumulation_steps"
    cycle = file.whole(key, 1, 1)
    if made.reward:
        if cycle > 1:
            made.ignored.append(key)  # as in its script
        cycle = 1
    _put(made, "train.accumulate", cycle * groups, key)
    key = "optimizer.max_train_steps"
    made.updates = file.whole(key, 1_000_000, 1)
    left = made.updates - _done(file, made)
    check(left >= cycle, key, made.updates, f"{cycle} more than the step that is resumed")
    _put(made, "train.steps", left // cycle, key)
    every = file.whole("train.save_interval", 100, 0)
    every = -(-every // cycle) if every else left // cycle  # 0: it saves nothing, we the end
    _put(made, "train.save_every", every, "train.save_interval")
    if made.reward and file.get("dataset.val_meta_file_list"):
        _put(made, "eval.every", every, "train.save_interval")
    times = file.get("lrm.timestep") or file.get("eval.timestep")
    if times:
        _put(made, "eval.timesteps", times, "lrm.timestep" if file.get("lrm.timestep") else "eval.timestep")
    folder, name = file.get("save.output_dir", "outputs"), str(file.get("train_id", "prfl"))
    check_path(folder, "save.output_dir")
    check_path(name, "train_id")
    _put(made, "train.out", str(Path(folder, name)), "save.output_dir")


def _done(file: _File, made: Translation) -> int:
    """The step in the name of what is resumed."""
    keys = ["model.resume_transformer_path", "model.lora.resume_lora_path"]
    keys += ["model.resume_mlp_path"] if made.reward else []
    found = [re.search(r"[-_](\d+)(\.\w+)?/*$", str(file.get(key, ""))) for key in keys]
    return max([int(match[1]) for match in found if match], default=0)


def _reward(file: _File, made: Translation, world: int) -> None:
    key = "lrm.trainable_blocks"
    if blocks := file.get(key):
        want = "the first blocks, [0, 1, ..., n - 1]"
        check(isinstance(blocks, list) and blocks == list(range(len(blocks))), key, blocks, want)
        _put(made, "reward.blocks", len(blocks), key)
    key = "lrm.feature_layer"
    layers = file.get(key)
    if layers:
        layers = layers if isinstance(layers, list) else [layers]
        _put(made, "reward.feature_layer", layers[0] if len(layers) == 1 else layers, key)
    pools = {"q_attn": "query", "mean": "mean", "max": "max"}
    kind = file.get("lrm.pool", "q_attn")
    check(kind in list(pools), "lrm.pool", kind, ", ".join(pools))
    _put(made, "reward.pool", pools[kind], "lrm.pool")
    names = {"num_queries": 1, "num_heads": 8, "dropout": 0.0, "return_type": None}
    for name, usual in names.items():
        key = f"lrm.query_attention.{name}"
        if kind == "q_attn":
            _put(made, f"reward.{name}", file.get(key, usual), key)
        elif key in file.flat:
            made.ignored.append(key)
    if times := file.get("lrm.timestep"):
        _put(made, "reward.timesteps", times, "lrm.timestep")


PATHS = {  # the fields that hold paths, and what is wanted there
    "model.path": "the folder of a Wan transformer",
    "reward.path": "the folder of a reward model's transformer",
    "reward.query_attention": "a reward model's query_attention_step_N.ckpt",
    "reward.mlp": "a reward model's mlp_step_N.ckpt",
    "lora.path": "the folder of an adapter",
    "data.train": "a .list of meta JSON paths",
    "data.lose": "a .list of meta JSON paths",
    "data.val": "a .list of meta JSON paths",
    "data.null_text": "the null prompt's embedding, from the working directory",
}


def check_paths(made: Translation, config: Mapping[str, Mapping[str, Any]], job: Job) -> None:
    """UserError, by the official key, for a path that the file names or lacks; and for a job of the other
    kind. config: the fields by section."""
    if made.reward != (job != "train"):
        got, other = made.values["reward"].get("loss"), "train-reward" if made.reward else "train"
        raise UserError(f"lrm.loss: got {got} with prfl {job}, want prfl {other} for this file")
    if job == "eval-reward" and config["reward"]["path"] is None:
        raise UserError(f"model.resume_transformer_path: got null, want {PATHS['reward.path']}")
    for name, want in PATHS.items():
        if (key := made.origin.get(name)) is None:
            continue
        section, _, field_name = name.partition(".")
        given = config[section][field_name]
        if given is None and section == "reward" and "reward.path" not in made.origin:
            continue  # the folder that took its place has all files
        if given is None:
            raise UserError(f"{key}: got null, want {want}")
        for path in given if isinstance(given, tuple) else [given]:
            if not os.path.exists(path):
                raise UserError(f"{key}: {path}: nothing is there, want {want}")


def report(made: Translation, path: Path, official: bool) -> str:
    """The line about a file that was translated."""
    ignored = ", ".join(dict.fromkeys(made.ignored))
    how = "" if official else "; train.compat=official does what its scripts do where we do otherwise"
    return f"{path}: a file of HY-Video-PRFL; without meaning here: {ignored or 'nothing'}{how}"
