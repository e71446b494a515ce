"""The whole job on real video, on this machine: data, generator, reward model, PRFL, report.

Every stage writes to its own folder and is found finished there when the demo is run again.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

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
from prfl_engine.demo.beside import beside
from prfl_engine.demo.compare import accuracies, compare, measure
from prfl_engine.demo.data import DemoData, DemoSpec, build
from prfl_engine.demo.motion import opencv
from prfl_engine.demo.report import write_report
from prfl_engine.errors import check
from prfl_engine.files import checkpoints
from prfl_engine.train import train
from prfl_engine.train_reward import train_reward
from prfl_kernels import processor


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. Stages are counted in optimizer steps."""

    short: int = 450
    """Of pre-training on short videos, before those of full length."""
    pretrain: int = 700
    reward: int = 900
    prfl: int = 250
    seeds: int = 64
    """Held-out seeds on which before, control and PRFL are compared."""
    seed: int = 0
    """Of the data and of every training."""
    data: DemoSpec = field(default_factory=DemoSpec)
    compute_dtype: str = field(default_factory=lambda: fastest_dtype())
    """Of products and attention in training: float32, or bfloat16 where the processor has it."""

    def __post_init__(self):
        for name in "short", "pretrain", "reward", "prfl", "seeds":
            check(getattr(self, name) > 0, name, getattr(self, name), "at least 1")


class Stages:
    """Runs stages, and says how long each took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, run: Callable, *args: Any) -> Any:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = run(*args)
        self.seconds[name] = time.perf_counter() - start
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)
        return result


def demo(out: str | Path, settings: Settings | None = None, command: str = "demo()") -> dict:
    """Run what is not yet done of the demo in the folder `out`; returns the report's numbers.

    `command` is what the report says it was made by. A script that calls this does so below
    `if __name__ == "__main__":`, since processes that are started import the script.
    """
    out, s = Path(out), settings or Settings()
    opencv()  # what is missing is said before the work
    begun = time.perf_counter()
    stage = Stages()
    data = stage("data", build, out / "data", s.seed, s.data)
    base = base_config(data, s.seed, s.compute_dtype)
    short = replace(
        base,
        model=replace(base.model, preset="demo"),
        loss=LossConfig(weight=0),
        optim=OptimConfig(lr=1.2e-2, betas=(0.9, 0.97), warmup=50),
        data=replace(base.data, batch_size=64, train=(str(data.short_train),)),
        train=replace(base.train, out=str(out / "short"), steps=s.short),
    )
    stage("pre-training, short videos", train, short)
    pretrain = replace(
        short,
        model=replace(base.model, path=str(_last(short))),
        optim=replace(short.optim, schedule="cosine"),
        data=replace(short.data, train=base.data.train),
        train=replace(base.train, out=str(out / "pretrain"), steps=s.pretrain, ema=0.99),
    )
    stage("pre-training", train, pretrain)
    generator = _last(pretrain) / "ema"

    reward = replace(
        base,
        model=replace(base.model, path=str(generator)),
        # Both videos of a pair have the first frame, the prompt and the noise in common: see docs/reward.md.
        reward=replace(
            base.reward, path=None, train_embeddings=True, loss="bt", ce_weight=0.05, pairs_at_once=True
        ),
        data=replace(
            base.data,
            batch_size=64,
            paired=True,
            train=(str(data.reward_win),),
            lose=(str(data.reward_lose),),
            val=(str(data.val_win),),
            val_lose=(str(data.val_lose),),
        ),
        optim=OptimConfig(lr=3e-3, lr_head=3e-3, schedule="cosine", warmup=25, weight_decay=0.3),
        # More of the lower noise levels: at the upper ones there is little to see.
        rollout=replace(base.rollout, shift=0.3),
        train=replace(base.train, out=str(out / "reward"), steps=s.reward, ema=0.99),
        eval=replace(base.eval, every=max(1, s.reward // 3), batch_size=64),
    )
    stage("reward model", train_reward, reward)

    prfl = replace(
        base,
        model=replace(base.model, path=str(generator)),
        reward=replace(base.reward, path=str(_last(reward) / "ema")),
        # The log has a gradient where the reward is sure that a sample is broken.
        loss=LossConfig(form="log", weight=1.0, sft_every=4, anchor=0.2),
        # Chains that persist are ahead of fresh rollouts at equal seconds, see docs/persistent.md. t <= 750:
        # before, the reward model knows less and less.
        rollout=replace(base.rollout, range=(5, 18), mode="persistent", pool=128, max_drift=10.0),
        optim=OptimConfig(lr=6e-4, schedule="cosine", warmup=5),
        data=replace(base.data, batch_size=16, train=(str(data.prfl_train),)),
        train=replace(base.train, out=str(out / "prfl"), steps=s.prfl),
    )
    control = replace(
        prfl,
        loss=LossConfig(weight=0),
        train=replace(prfl.train, out=str(out / "control")),
    )
    with beside(_what_needs_no_prfl, generator, control, reward, data, s.seeds) as other:
        stage("PRFL", train, prfl)
        found, drawn, reward_accuracy, seconds = other()
    stage.seconds |= {f"{name}, beside PRFL": s for name, s in seconds.items()}
    models = {"PRFL": _last(prfl)}
    found |= stage("samples of PRFL", measure, prfl, data.codec, data.val_win, models, s.seeds)[0]

    numbers = compare(found, drawn, prfl.eval.timesteps)
    numbers["reward_accuracy"] = reward_accuracy
    numbers["seconds"] = stage.seconds | {"all": time.perf_counter() - begun}
    numbers["settings"] = asdict(s)
    numbers["data"] = data.counts
    numbers["command"] = command
    numbers["machine"] = {"processor": processor.name(), "threads": torch.get_num_threads()}
    page = stage("report", write_report, out, numbers)
    print(f"report: {page}")
    return numbers


def _what_needs_no_prfl(
    generator: Path, control: Config, reward: Config, data: DemoData, seeds: int
) -> tuple[dict[str, dict], dict, dict, dict[str, float]]:
    """Train the control. Returns what was measured of samples of the generator (before) and of the control,
    of steady motion as drawn, and of the reward model, and the seconds of the stages."""
    stage = Stages()
    stage("control (flow matching only)", train, control)
    models = {"before": generator, "control": _last(control)}
    found, drawn = stage("samples", measure, control, data.codec, data.val_win, models, seeds)
    accuracy = stage("accuracies", accuracies, reward, data, _last(reward) / "ema")
    return found, drawn, accuracy, stage.seconds


def fastest_dtype() -> str:
    """The dtype in which this processor makes large products fastest."""
    return "bfloat16" if processor.bfloat16_absence() is None else "float32"


def base_config(data: DemoData, seed: int = 0, compute_dtype: str = "float32") -> Config:
    """What all stages share."""
    return Config(
        model=ModelConfig(compute_dtype=compute_dtype),
        reward=RewardConfig(blocks=3, feature_layer=3, pool="mean"),
        data=DataConfig(
            train=(str(data.sft_train),),
            val=(str(data.val_win),),
            null_text=str(data.null_text),
            first_frame=True,
            num_workers=0,
            keep_gb=0.5,
        ),
        rollout=RolloutConfig(steps=20, shift=1.0),
        train=TrainConfig(resume="auto", save_every=10**6, keep=1, log_every=5, seed=seed),
        eval=EvalConfig(),
        sample=SampleConfig(codec=str(data.codec)),
    )


def _last(config: Config) -> Path:
    return checkpoints(Path(config.train.out))[-1]
