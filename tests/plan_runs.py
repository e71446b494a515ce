"""Random small runs, and the bytes that they have in each phase."""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as _fsdp_param
import yaml
from helpers import tiny_config, tiny_model, tiny_reward, write_data
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

from prfl_engine import build, train
from prfl_engine.config import load_config
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.resident import Resident
from prfl_engine.model.checkpoint import save_reward, save_transformer
from prfl_engine.model.experts import HIGH, LOW
from prfl_engine.model.sources import read_config
from prfl_engine.optim import updates
from prfl_engine.planner.meta import COLLECTIVES
from prfl_engine.planner.setup import ROUND

OPTIMIZERS = (
    ("float32", {}),
    ("bfloat16", {}),
    ("bfloat16", {"rounding": "stochastic"}),
    ("bfloat16", {"grad_dtype": "float32"}),
    ("float32", {"name": "adamw8bit"}),
    ("bfloat16", {"name": "adamw8bit", "rounding": "stochastic"}),
    ("float32", {"offload": "states"}),
    ("bfloat16", {"offload": "all", "rounding": "stochastic"}),
    ("bfloat16", {"in_backward": True, "rounding": "stochastic", "offload": "states"}),
    ("float32", {"in_backward": True}),
)
POLICIES = (
    "none", "full", "attention", "attention",
    {"keep": ["attention"], "offload": ["input"]},
    {"keep": [], "offload": ["attention", "input"]},
)  # fmt: skip


def random_values(folder: Path, seed: int, wide: int) -> dict:
    """The values of a configuration with the folders that it names; wide: how many times as wide its blocks
    are. Its rollouts always end at the last step, so that all steps have the most bytes they may have."""
    draw = random.Random(seed)
    heads = draw.choice((2, 4))
    config = tiny_config(
        "i2v" if draw.random() < 0.2 and wide == 1 else "t2v", dim=32 * wide * heads,
        ffn_dim=wide * draw.choice((128, 384)),
        num_heads=heads, num_layers=draw.randint(2, 4) + (wide > 1), text_len=draw.choice((16, 70)),
        text_dim=32,
    )  # fmt: skip
    shape, blocks = (16, draw.choice((1, 3)), 16, draw.choice((8, 16))), draw.randint(1, 2)
    save_transformer(tiny_model(config), folder / "policy")
    save_reward(tiny_reward(config, blocks=blocks, num_heads=heads), folder / "reward", 0)
    lists = [
        str(write_data(folder / name, config, 3, [shape], text=config.text_len)) for name in ("data", "val")
    ]
    weights, optim = OPTIMIZERS[seed % len(OPTIMIZERS)]
    steps, alone = draw.choice((3, 5)), "in_backward" in optim
    persistent = not alone and draw.random() < 0.2
    samples, more = 1 if alone else draw.choice((1, 1, 2)), random.Random(-1 - seed)
    return {
        "model": {
            "path": str(folder / "policy"), "recompute": draw.choice(POLICIES),
            "chunk": draw.choice((None, None, 24)), "weights_dtype": weights,
            "compute_dtype": draw.choice(("float32", "bfloat16")),
            "residual_dtype": draw.choice(("float32", "float32", "bfloat16")),
            "keep": draw.choice(("all", "nothing", "attention", "projections")),
        },
        "lora": {"rank": draw.choice((0, 0, 0, 4))},
        "reward": {
            "path": str(folder / "reward"), "blocks": blocks, "feature_layer": blocks, "num_heads": heads,
        },
        "data": {
            "train": lists[:1], "val": lists[1:], "num_workers": 0, "text_dropout": 0.0, "long_caption": 1.0,
            "batch_size": more.choice((1, 1, 2)) if samples == 1 else 1,
        },
        "rollout": {
            "steps": steps, "samples": samples, "range": [steps - 2, steps - 2],
            "mode": "persistent" if persistent else "fresh",
            "cache": 0.0 if persistent else more.choice((0.0, 0.0, 0.0, 0.1)),
        },
        "chain": {
            "window": 1 if alone else draw.choice((1, 1, 2, "all")), "detach_input": more.random() < 0.2,
        },
        "loss": {"alternate": alone or draw.random() < 0.2, "weight": draw.choice((0.0, 0.1, 0.1, 0.1))},
        "optim": optim | {"clip": None},
        "train": {
            "out": str(folder / "run"), "device": "cpu", "tensorboard": False, "steps": 3,
            "ema": draw.choice((0.0, 0.0, 0.9)), "accumulate": 1 if alone else draw.choice((1, 2)),
        },
        "eval": {
            "every": draw.choice((0, 2)), "samples": more.randint(2, 4), "batch_size": draw.randint(1, 2),
            "timesteps": [201, 1000], "videos": more.choice((0, 1, 4)),
        },
    }  # fmt: skip


def configuration(folder: Path, seed: int, size: int = 1) -> Path:
    """The file of such a configuration, for so many processes. The head of a reward model and the
    embedding of images have their width, so blocks that are gathered are wider than in one process, and there
    are no images: else these would decide alone."""
    values = random_values(folder, seed, 1 if size == 1 else 3)
    if values["loss"]["weight"] == 0:
        values["loss"]["alternate"] = False
    if size > 1:
        draw = random.Random(1000 + seed)
        replicate = draw.choice((1, 1, 2)) if size > 2 else 1
        sequence = draw.choice([n for n in (1, 2) if size // replicate % n == 0])
        values["parallel"] = {
            "sequence": sequence, "replicate": replicate, "resident": draw.random() < 0.3
        }
        values["train"] |= {"steps": 2, "accumulate": values["train"]["accumulate"] * (size // sequence)}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def on_copies(collective):
    """A collective that a group works on copies of tensors for, not counted: gloo's threads hold the tensors
    of one for a moment after it is over, so that what is alive would depend on when they run."""

    def called(*args, **named):
        with _disable_current_modes():
            copied, own = tree_map(_copied, (args, named)), tree_leaves((args, named))[0]
            made = collective(*copied[0], **copied[1])
            own.copy_(tree_leaves(copied)[0])  # the first is what it fills
        return made

    return called


def _copied(a):
    return a.clone() if isinstance(a, torch.Tensor) else a


def with_rewards(folder: Path, seed: int) -> Path:
    """The file of one for one process, with a further reward of other depth and width, and several draws."""
    values = random_values(folder, seed, 1)
    own = read_config(folder / "policy")
    config = replace(own, dim=64, num_heads=2, num_layers=3, ffn_dim=96)
    save_reward(tiny_reward(config, seed=7, blocks=3, num_heads=2), folder / "other", 0)
    values["reward"] |= {"draws": 2 + seed % 2, "more": [{"name": "other", "path": str(folder / "other")}]}
    values["loss"]["weight"] = 0.1
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def guided(folder: Path, seed: int, **sections) -> Path:
    """The file of one for one process with guided chains, whose graded step is the fourth of five."""
    values = random_values(folder, seed, 1)
    values["data"] |= {"batch_size": 1, "negative_text": str(next(folder.glob("data/**/null.npy")))}
    values["rollout"] |= {
        "mode": "fresh", "steps": 5, "range": [3, 3], "samples": 1, "cache": 0.0, "guidance": 3
    }
    values["chain"] = {"guidance": 3}
    values["loss"], values["eval"]["every"] = {"weight": 0.1, "sft_weight": 0.0}, 0
    for name, section in sections.items():
        values[name] |= section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def with_experts(folder: Path, seed: int, size: int, **sections) -> Path:
    """The file of one for so many processes with two experts, whose graded step is the low-noise one's."""
    path = configuration(folder, seed, size)
    values = yaml.safe_load(path.read_text())
    for number, name in enumerate((HIGH, LOW)):
        config = read_config(folder / "policy")
        save_transformer(tiny_model(config, number), folder / "pair" / name)
    values["model"] |= {"path": str(folder / "pair"), "boundary": 0.8}
    values["rollout"] |= {"steps": 5, "range": [3, 3], "cache": 0.0}
    for name, section in sections.items():
        values[name] |= section
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class Measured:
    """Most bytes of the phases of a run, all that is alive included; of the host, what is there by intent."""

    training: int = 0
    optimizer: int = 0
    validation: int = 0
    host: int = 0
    live: LiveBytes = field(default_factory=lambda: OfShards(ROUND))


class OfShards(LiveBytes):
    """Of a DTensor the part that is here."""

    def _see(self, a: torch.Tensor) -> None:
        super()._see(a.to_local() if isinstance(a, DTensor) else a)

    def resized(self, a: torch.Tensor) -> None:
        """The storage of a tensor has been resized, which no operation shows."""
        self._see(a)
        self.peak, self._lap = max(self.peak, self.now), max(self._lap, self.now)


def measured(path: Path, monkeypatch) -> Measured:
    """Train by the configuration of a file and count."""
    found = Measured()
    live, (fit, update) = found.live, (train.fit, updates.update)
    policy_of, reward_of, models = train.make_policy, train.make_frozen_reward, []

    def seen(make):
        def made(*given):
            models.append(make(*given))
            return models[-1]

        return made

    def watched(c, begin, policy, groups, stream, losses, validate, *rest):
        def validated(step):
            if step == 0:  # the same as at the end, with less beside it
                return {"score": 0.0}
            live.lap()
            made = validate(step)
            found.validation = max(found.validation, live.lap())
            return made

        live.add(p for model in models for p in model.parameters())
        with live:
            fit(c, begin, policy, groups, stream, losses, validate and validated, *rest)

    def updated(*given):
        found.training = max(found.training, live.lap())
        norm = update(*given)
        found.optimizer = max(found.optimizer, live.lap())
        return norm

    def resizing(call):
        def called(a):
            call(a)
            live.resized(a)

        return called

    for name in (*COLLECTIVES, "all_reduce"):
        monkeypatch.setattr(dist, name, on_copies(getattr(dist, name)))
    for name in ("free_storage", "alloc_storage"):
        monkeypatch.setattr(_fsdp_param, name, resizing(getattr(_fsdp_param, name)))
    for module in (train, build):
        monkeypatch.setattr(module, "make_policy", seen(policy_of))
        monkeypatch.setattr(module, "make_frozen_reward", seen(reward_of))

    gather, drop = Resident.gather, Resident.drop

    def gathered(resident):
        for p in resident.model.parameters():  # they are there before the first gather
            p.untyped_storage().resize_(p.nbytes)
            live.resized(p)
        gather(resident)

    def dropped(resident):
        drop(resident)
        for p in resident.model.parameters():
            live.resized(p)

    monkeypatch.setattr(Resident, "gather", gathered)
    monkeypatch.setattr(Resident, "drop", dropped)
    monkeypatch.setattr(updates, "update", updated)
    monkeypatch.setattr(train, "fit", watched)
    train.train(load_config(path))
    found.host = live.host_peak
    return found


def size(tensors) -> int:
    """Bytes of tensors in any nesting, as the allocator rounds them."""
    live = LiveBytes(ROUND)
    live.add(a for a in tree_iter(list(tensors)) if isinstance(a, torch.Tensor))
    return live.now
