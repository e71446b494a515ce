"""Resuming a run: whether it may, what has changed, and the state in addition to the weights.

A checkpoint holds two files for this: training_state.pt (step, moments, random numbers) and run.json (the
configuration, and digests of the data and models that it names).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prfl_engine import checksums, files
from prfl_engine.config import Config
from prfl_engine.config_file import plain, read_yaml
from prfl_engine.errors import UserError
from prfl_engine.inputs import check_out, load_pickle, read_json
from prfl_engine.metrics import FILE, check_writers, note, read_metrics
from prfl_engine.model.experts import HIGH, LOW
from prfl_engine.model.sharded import RUN
from prfl_engine.model.sources import sharded, transformer_folder
from prfl_engine.optim.block_adamw import BlockAdamW
from prfl_engine.optim.optimizer import load_state
from prfl_engine.optim.states import check_like
from prfl_engine.restarts import restarted

STATE = "training_state.pt"

# What a resumed run may change. free: it may, and the change is printed; score: it may, but validation then
# measures something else, so the best checkpoint is looked for anew; fixed: it may not; source: it may move,
# but must hold the same; state: it may as far as the optimizer's state fits; call: no property of the run.
KINDS = {
    "model": {
        "source": "path low",
        "fixed": "preset weights_dtype boundary",
        "free": "idle compute_dtype residual_dtype latent_dtype recompute keep compile chunk kernels host "
        "costs",
    },
    "lora": {"source": "path", "fixed": "rank alpha targets base", "free": "base_place"},
    "reward": {
        "source": "path query_attention mlp more",
        "fixed": "blocks feature_layer pool num_queries num_heads return_type train_embeddings loss",
        "score": "weights",
        "free": "dropout timesteps ce_weight pairs_at_once draws place",
    },
    "data": {
        "source": "train lose null_text",
        "fixed": "label paired batch_size first_frame",
        "score": "val val_lose negative_text",
        "free": "text_dropout long_caption skip_broken num_workers keep_gb",
    },
    "rollout": {
        "score": "solver steps sigmas shift sigma_range start whole_timesteps",
        "source": "lora",
        # A pool that was made under other fields is left out, and its chains start anew (rollout/pool.py).
        "free": "mode pool pool_place stride range samples seeds seeds_step seeds_keep one_index guidance "
        "guidance_at_once precision cache probe_every max_drift cuda_graph",
    },
    "chain": {"free": "window detach_input guidance unconditional"},
    "loss": {
        "free": "form weight target sft_weight sft_every anchor anchor_every anchor_place alternate split",
    },
    "optim": {
        "state": "name rounding grad_dtype in_backward offload",
        "free": "lr lr_head betas eps weight_decay schedule warmup horizon cycles clip clip_each clip_heads",
    },
    "train": {
        "fixed": "accumulate seed",
        "free": "device steps save_every keep log_every ema ema_each stop_anchor tensorboard wandb",
        "call": "out resume compat",
    },
    "parallel": {"free": "replicate sequence resident save_async timeout"},
    "eval": {
        "score": "samples timesteps seed one_noise pairs guidance rollout_lora",
        "free": "every batch_size videos",
    },
    "sample": {"free": "count seed guidance codec fps"},
}
KIND = {
    f"{section}.{name}": kind
    for section, kinds in KINDS.items()
    for kind, names in kinds.items()
    for name in names.split()
}
MODELS = (  # the other sources are lists
    "model.path", "model.low", "lora.path", "reward.path", "reward.query_attention", "reward.mlp",
    "reward.more", "data.null_text", "rollout.lora",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run starts, which its folder and configuration allow; nothing is written yet."""

    checkpoint: Path | None  # None: from step 0
    sources: dict[str, dict]  # digests by field
    changes: list[str] = field(default_factory=list)  # "section.field: old -> new"
    new_score: bool = False  # validation measures something else than before


def prepare_out(config: Config, lists: dict[str, list[Path]]) -> Start:
    """Look where the run is to start; UserError if its folder or configuration forbids it. Writes nothing.

    lists: the meta paths of data.train and, for pairs, of data.lose. A run that torchrun has started anew
    goes on, also where train.resume is false.
    """
    out = Path(config.train.out)
    resume = config.train.resume or ("auto" if restarted(out) else False)
    found = _look(out)
    check_writers(config.train.tensorboard, config.train.wandb)
    if not resume and (found or os.path.lexists(out / FILE)):
        what = found[-1].name if found else FILE
        raise UserError(
            f"train.out: {out} already holds {what}, want an empty folder or train.resume=true"
        )
    # Those of a run that was killed before its first checkpoint are no reason to refuse its resuming.
    traces = (FILE, "config.yaml", files.LOCK)
    if resume is True and not found and not any((out / name).exists() for name in traces):
        raise UserError(
            f"train.out: {out} holds no checkpoint to resume, want the folder of a run, train.resume=false, "
            "or train.resume=auto, which starts where there is nothing"
        )
    sources = {name: _digest(paths) for name, paths in lists.items()}
    for name in MODELS:
        if path := _value(asdict(config), name):
            many = [more["path"] for more in path] if name == "reward.more" else [path]
            sources[name] = _digest([Path(path) for path in many])
    if os.path.lexists(out / FILE):
        read_metrics(out)
    if not found:
        if resume:
            note(f"{out} holds no checkpoint: starting at step 0")
        return Start(None, sources)
    changes, scores = _compare(found[-1], config, sources)
    return Start(found[-1], sources, changes, scores)


def _look(out: Path) -> list[Path]:
    """The checkpoints in a folder that can be the output of a run."""
    check_out(out, "train.out")
    try:
        files.check_free(out)
        return files.checkpoints(out)
    except OSError as error:
        raise UserError(f"train.out: {out}: {error.strerror}, want a folder that can be written to") from None


# Configuration.


def write_run(folder: Path, config: Config, sources: dict[str, dict]) -> None:
    """Write run.json into a checkpoint."""
    text = json.dumps({"config": plain(asdict(config)), "sources": sources}, indent=2)
    (folder / RUN).write_text(text + "\n")


def _compare(checkpoint: Path, config: Config, sources: dict[str, dict]) -> tuple[list[str], bool]:
    """(changes since the checkpoint, do they change scores?); UserError for one that may not be made."""
    old, known = _read_run(checkpoint)
    new, usual = plain(asdict(config)), plain(asdict(Config()))
    changes, scores = [], False
    for name, kind in KIND.items():
        got, want = _value(new, name), _value(old, name, _value(usual, name))
        same = got == want or kind not in ("fixed", "source")
        if kind == "source" and known is not None:
            same = _same(name, sources.get(name), known.get(name))
            if not same and got == want:
                raise UserError(f"{name}: got {got!r}, want what it held when {checkpoint} was written")
        if not same:
            raise UserError(f"{name}: got {got!r}, want {want!r} as in {checkpoint} (train.resume)")
        if got != want and kind != "call":
            changes.append(f"{name}: {want!r} -> {got!r}")
            scores |= kind == "score"
    return changes, scores


def _read_run(checkpoint: Path) -> tuple[dict, dict | None]:
    """(configuration, digests of its sources) of a checkpoint; None: not known, of an older version's."""
    path = checkpoint / RUN
    checksums.check([path])
    if os.path.lexists(path):
        held = read_json(path, "the configuration of a run")
        config, sources = held.get("config"), held.get("sources")
        sections = [config, sources]
        sections += [v for part in sections if isinstance(part, dict) for v in part.values()]
        if not all(isinstance(section, dict) for section in sections):
            raise UserError(f"{path}: got no configuration of a run, want the file as it was written")
        return config, sources
    path = checkpoint.parent / "config.yaml"
    if not path.exists():
        raise UserError(f"{checkpoint}: got no {RUN} and no {path}, want one: what the run was is unknown")
    note(f"{checkpoint} has no {RUN}: compared with {path}; that data and models are the same is not checked")
    held = read_yaml(path)
    if not all(isinstance(section, dict) for section in held.values()):
        raise UserError(f"{path}: got no configuration of a run, want the file as it was written")
    return held, None


def _value(config: dict, name: str, default: Any = None) -> Any:
    section, _, key = name.partition(".")
    return config.get(section, {}).get(key, default)


# Data and models.


def _digest(paths: list[Path]) -> dict:
    """What tells data and models apart: {"count", "where", "content"}, the latter two digests of the absolute
    paths, and of the names and of parts of the files.

    Of at most 64 of the paths, spread evenly, those parts are the size and both ends (4 KiB) of the arrays
    that a meta JSON names, of the weights in a folder, or of the file itself. All parts of a sharded
    checkpoint are in the same files, so the name of the part counts, too.
    """
    where, content = hashlib.sha256(), hashlib.sha256()
    for path in paths:
        where.update(os.fsencode(path.absolute()) + b"\0")
        content.update(os.fsencode(path.name) + b"\0" if len(paths) > 1 else b"")
    some = paths if len(paths) <= 64 else [paths[i * len(paths) // 64] for i in range(64)]
    for path in some:
        if (whole := sharded(path)) is not None:
            content.update(b"".join(os.fsencode(part) + b"\0" for part in path.relative_to(whole).parts))
    for file in (file for path in some for file in _files(path)):
        try:
            size = file.stat().st_size
            content.update(f"{file.name} {size}\0".encode(errors="surrogateescape"))
            with open(file, "rb") as opened:
                content.update(opened.read(4096))
                opened.seek(max(0, size - 4096))
                content.update(opened.read(4096))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}, want a file that can be read") from None
    return {"count": len(paths), "where": where.hexdigest(), "content": content.hexdigest()}


def _files(path: Path) -> Iterable[Path]:
    path = sharded(path) or path
    if path.is_dir():
        inner = [path / name for name in (HIGH, LOW, "transformer_2") if (path / name).is_dir()]
        folders = [*inner, *([path / "transformer"] if (path / "transformer_2").is_dir() else [])]
        found = (p for folder in folders or [transformer_folder(path)] for p in folder.iterdir())
        return sorted(p for p in found if p.suffix in (".safetensors", ".ckpt") and p.is_file())
    if path.suffix != ".json":
        return [path] if path.is_file() else []
    try:
        meta = read_json(path, "a meta JSON")
    except UserError:
        return []  # the reader of the data names it
    named = [Path(v) for v in meta.values() if isinstance(v, str)]
    named = [p if p.is_absolute() or p.is_file() else path.parent / p for p in named if p.suffix == ".npy"]
    return [p for p in named if p.is_file()]


def _same(name: str, got: dict | None, want: dict | None) -> bool:
    """Whether a source holds what it did. A list does if its paths are the same; a model if its files are, or
    if it is gone: then either nothing needs it or loading it fails."""
    if got is None or want is None or got["count"] != want.get("count"):
        return got is want
    if got["content"] == want.get("content"):
        return True
    gone = _digest([])["content"] in (got["content"], want.get("content"))
    return got["where"] == want.get("where") and (name not in MODELS or gone)


# The state in addition to the weights.


@dataclass
class Progress:
    """How far a run is, and what it carries from step to step apart from weights and moments."""

    step: int = 0
    best: float = -math.inf
    unlogged: dict[str, Tensor] = field(default_factory=dict)  # see measurements.Measurements
    unvalidated: bool = False  # stopped by a signal before the validation of this step
    broken: dict[int, str] = field(default_factory=dict)  # MicroBatches.left_out
    shapes: list[tuple[int, ...] | None] | None = None  # MicroBatches.planned


def save_state(
    folder: Path,
    progress: Progress,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write training_state.pt; optimizer None: its state is in a sharded checkpoint."""
    state = {"step": progress.step, "best": progress.best, "unlogged": progress.unlogged}
    state |= {"unvalidated": progress.unvalidated, "broken": progress.broken, "shapes": progress.shapes}
    if optimizer is not None:
        state |= {"optimizer": optimizer.state_dict(), "kind": type(optimizer).__name__}
    state["rng"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    torch.save(state, folder / STATE)


def read_state(
    folder: Path, device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> Progress:
    """Load training_state.pt of the checkpoint `folder` into the optimizer, unless its state is in a sharded
    checkpoint, and into torch's random generators.

    UserError names the first entry that does not fit, before any of them is used.
    """
    path = folder / STATE
    # One that copies what it loads need not find room for all of it twice.
    state = load_pickle(path, mmap=isinstance(optimizer, BlockAdamW))
    kind, own = state.get("kind", "AdamW"), type(optimizer).__name__
    if optimizer is not None and kind != own:
        raise UserError(f"{path}: holds a state of {kind}, want {own}: the optim section differs")
    try:
        progress = _progress(state, int(folder.name.rpartition("-")[2]))
        check_like("rng", state.get("rng"), torch.get_rng_state())
        if device.type == "cuda" and "cuda_rng" in state:
            check_like("cuda_rng", state["cuda_rng"], torch.cuda.get_rng_state(device))
        if optimizer is not None:
            load_state(optimizer, state.get("optimizer"))
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
    except (ValueError, RuntimeError) as error:  # RuntimeError: random bits that are no state
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: does not fit this run: {line}") from None
    progress.unlogged = {k: v.to(device) for k, v in progress.unlogged.items()}
    return progress


def _progress(state: dict, step: int) -> Progress:
    found = Progress(
        state.get("step"), state.get("best"), state.get("unlogged", {}), state.get("unvalidated", False),
        state.get("broken", {}), state.get("shapes"),
    )  # fmt: skip
    pairs = found.broken.items() if isinstance(found.broken, dict) else [(None, None)]
    if not all(type(place) is int and place >= 0 and isinstance(why, str) for place, why in pairs):
        raise ValueError(f"broken: got {found.broken!r}, want places of samples and why they are broken")
    if not (found.shapes is None or (isinstance(found.shapes, list) and all(map(_is_shape, found.shapes)))):
        raise ValueError("shapes: got something else, want those of samples")
    if type(found.step) is not int or found.step != step:
        raise ValueError(f"step: got {found.step!r}, want {step} as its folder's name has it")
    if type(found.best) not in (int, float) or not found.best < math.inf:
        raise ValueError(f"best: got {found.best!r}, want a score")
    if type(found.unvalidated) is not bool:
        raise ValueError(f"unvalidated: got {found.unvalidated!r}, want true or false")
    if not isinstance(found.unlogged, dict):
        raise ValueError(f"unlogged: got {type(found.unlogged).__name__}, want a dict")
    for name, value in found.unlogged.items():
        number = isinstance(value, Tensor) and not value.dim() and value.is_floating_point()
        if not isinstance(name, str) or not number:
            raise ValueError(f"unlogged: {name}: want a name and a 0-dim tensor of floating-point numbers")
    return found


def _is_shape(shape: Any) -> bool:
    return shape is None or (isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape))
