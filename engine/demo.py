"""The whole job on real video, on this machine: data, generator, reward model, PRFL, report.

Every stage writes to its own folder and is found finished there when the demo is run again.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prfl_engine import chain, demo_data, flow
from prfl_engine.checkpoint import checkpoints, load_reward, load_transformer
from prfl_engine.codec import DCTCodec
from prfl_engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    SampleConfig,
    TrainConfig,
)
from prfl_engine.data import Reader, fixed_batches, noise_like, read_lists, read_meta
from prfl_engine.handmade import evaluate_handmade
from prfl_engine.loop import pick_device
from prfl_engine.metrics import progress, read_metrics
from prfl_engine.objectives import bind
from prfl_engine.train import train
from prfl_engine.train_reward import train_reward

SEEDS = 64  # held-out seeds on which before, control and PRFL are compared


@dataclass(frozen=True)
class Settings:
    """Lengths of the demo's stages, in optimizer steps."""

    pretrain: int = 1500
    reward: int = 700
    prfl: int = 60


def demo(out: str | Path, settings: Settings | None = None) -> dict:
    """Run what is not yet done of the demo in the folder `out`; returns the report's numbers."""
    out, s = Path(out), settings or Settings()
    begun = time.perf_counter()
    seconds: dict[str, float] = {}

    def stage(name: str, run, *args):
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = run(*args)
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
        return result

    data = stage("data", demo_data.build, out / "data", 0)
    base = base_config(data)
    pretrain = replace(
        base,
        model=replace(base.model, preset="tiny-t2v"),
        loss=LossConfig(weight=0),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=50),
        data=replace(base.data, batch_size=16),
        train=replace(base.train, out=str(out / "pretrain"), steps=s.pretrain, ema=0.995),
    )
    stage("pre-training", train, pretrain)
    generator = _last(pretrain) / "ema"

    reward = replace(
        base,
        model=replace(base.model, path=str(generator)),
        reward=replace(base.reward, path=None),
        data=replace(
            base.data, batch_size=32, train=(str(data.reward_train),), val=(str(data.reward_val),)
        ),
        optim=OptimConfig(lr=5e-4, lr_head=5e-4, schedule="cosine", warmup=50, weight_decay=0.1),
        train=replace(base.train, out=str(out / "reward"), steps=s.reward),
        eval=replace(base.eval, every=max(1, s.reward // 5), batch_size=64),
    )
    stage("reward model", train_reward, reward)

    prfl = replace(
        base,
        model=replace(base.model, path=str(generator)),
        reward=replace(base.reward, path=str(out / "reward" / "best")),
        loss=LossConfig(weight=1.0),
        optim=OptimConfig(lr=1e-4, warmup=5),
        data=replace(base.data, batch_size=8),
        train=replace(base.train, out=str(out / "prfl"), steps=s.prfl),
    )
    control = replace(
        prfl,
        loss=replace(prfl.loss, weight=0),
        train=replace(prfl.train, out=str(out / "control")),
    )
    stage("PRFL", train, prfl)
    stage("control (flow matching only)", train, control)

    models = {"before": generator, "control": _last(control), "PRFL": _last(prfl)}
    numbers = stage("comparison", compare, prfl, data, models)
    numbers["reward_accuracy"] = stage("hand-made features", accuracies, reward, data)
    numbers["seconds"] = seconds | {"all": time.perf_counter() - begun}
    numbers["settings"] = asdict(s)
    return numbers


def base_config(data: demo_data.DemoData) -> Config:
    """What all stages share."""
    return Config(
        model=ModelConfig(compute_dtype="float32"),
        reward=RewardConfig(blocks=3, feature_layer=3, num_heads=4),
        data=DataConfig(
            train=(str(data.sft_train),),
            val=(str(data.clean_val),),
            null_text=str(data.null_text),
            num_workers=0,
        ),
        rollout=RolloutConfig(steps=20),
        train=TrainConfig(resume=True, save_every=10**6, keep=1, log_every=5),
        eval=EvalConfig(),
        sample=SampleConfig(codec=str(data.codec)),
    )


def _last(config: Config) -> Path:
    return checkpoints(Path(config.train.out))[-1]
