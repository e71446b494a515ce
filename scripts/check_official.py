"""Runs the training steps of a checkout of HY-Video-PRFL and ours, and compares losses and weights.

    .venv/bin/python scripts/check_official.py --checkout DIR [--cycles 2] [--seeds 11 0 1 2]
        [--precision fp32 bf16]

A small random generator and reward model are trained for some cycles of five micro-batches on a CPU: by the
checkout's own train_step, train_step_refl, models, samplers and moving average, and by `prfl train` with a
YAML file in the checkout's form and train.compat=official. Both get the same samples, noise, noise levels and
graded steps. Compared are the mean losses of every cycle, the change of the weights after the last one, and
that of the average. Then the reward model is trained for as many micro-batches, each of which is an update:
by the checkout's train_step of train_pavrm.py, and by `prfl train-reward`. In fp32 everything has to agree.
In bf16, where both round everywhere, ours must be no further from the checkout than FACTOR times as far as
the checkout is from its own fp32, as root mean squares over the seeds: how a run rounds is a draw. In fp32
the median of the seeds counts: in one of five a unit of the head is so near its ReLU's edge that rounding
decides whether it has a gradient, and AdamW makes a whole step of it.

What is replaced in the checkout, since it runs on several GPUs alone: torch.distributed and FSDP (one
process), CUDA autocast (the CPU's), flash attention (torch's); see prfl_bench.peer. Its packages that are not
installed (omegaconf, einops, ...) are stand-ins; nothing of them is used. Its steps are counted from 0 here,
so that cycles are whole; its main() counts from 1, and its first cycle has one micro-batch less. Exit code 1
if a comparison fails.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import os
import sys
import tempfile
import types
from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from prfl_bench.peer import PACKAGE, Peer, load_module
from prfl_bench.stand_ins import Dict, StandIns, Torch, attributes
from prfl_engine import flow
from prfl_engine.config import Config, load_config
from prfl_engine.data import Reader, read_lists
from prfl_engine.flow import latent_dtype
from prfl_engine.metrics import read_metrics
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.model.checkpoint import (
    load_reward,
    load_transformer,
    new_reward,
    save_reward,
    save_transformer,
)
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.objectives import schedule_of
from prfl_engine.paths import a_path
from prfl_engine.rollout.fresh import Fresh
from prfl_engine.seeds import Purpose, integers, noise_like
from prfl_engine.train import train
from prfl_engine.train_reward import train_reward

CYCLE, SAMPLES, LATENT, TEXT = 5, 6, (16, 2, 8, 8), 7
LOSSES, WEIGHTS = 1e-5, 1e-4
"""Limits in fp32: relative of a loss; relative L2 of the change of the weights, which AdamW makes by the sign
of the smallest gradients too."""
FACTOR = 1.5
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Outcome(NamedTuple):
    """What a run leaves: losses of every cycle or step, and weights and their average by name."""

    losses: list[tuple[float, ...]]
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None = None


def official_config(folder: Path, cycles: int, precision: str, seed: int = 11) -> dict:
    """A configuration in the checkout's form."""
    return {
        "train_id": f"{precision}-{seed}",
        "task": "t2v-14b",
        "model": {
            "base_path": str(folder / "policy"),
            "init_transformer_path": None,
            "resume_transformer_path": None,
            "lrm_transformer_path": str(folder / "reward"),
            "lrm_query_attention_path": str(folder / "heads/query_attention_step_3.ckpt"),
            "lrm_mlp_path": str(folder / "heads/mlp_step_3.ckpt"),
            "patch_size": [1, 2, 2],
            "lora": {"use_lora": False},
            "ema": {"use_ema": True, "ema_decay": 0.9},
            "fsdp": {"fsdp_sharding_startegy": "full", "use_cpu_offload": False},
            "gradient_checkpointing": False,
        },
        "extra_model": {
            "scheduler": {
                "flow_shift": 5.0, "num_train_timesteps": 1000, "weighting_scheme": "uniform",
                "logit_mean": 0, "logit_std": 1,
            },
        },
        "dataset": {
            "meta_file_list": [str(folder / "data/all.list")], "crop_ratio": [1, 1, 1],
            "crop_type": "center", "uncond_prob": [0.0, 0.0], "sp_size": 1, "batch_size": 1, "num_workers": 0,
        },
        "optimizer": {
            "learning_rate": "1e-3", "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.01,
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": CYCLE * cycles,
        },
        "train": {
            "seed": seed, "precision": precision, "save_interval": CYCLE * cycles,
            "sanity_check_interval": -1, "gradient_accumulation_steps": float(CYCLE),
        },
        "save": {"output_dir": str(folder / "out")},
        "lrm": {
            "query_attention": {"num_queries": 1, "num_heads": 2, "dropout": 0.0, "return_type": "query"},
            "feature_layer": [2], "pool": "q_attn", "mlp_dim": 64, "task": "motion_quality",
            "trainable_blocks": [0, 1],
        },
    }  # fmt: skip


def reward_config(folder: Path, cycles: int, precision: str, seed: int = 11) -> dict:
    """A configuration of reward training in the checkout's form, which goes on from the three files."""
    values = official_config(folder, cycles, precision, seed)
    model = values["model"]
    for name in ("transformer", "query_attention", "mlp"):
        model[f"resume_{name}_path"] = model.pop(f"lrm_{name}_path")
    model["ema"]["use_ema"] = False
    values["train_id"] = f"reward-{precision}-{seed}"
    values["optimizer"] |= {"learning_rate": "1e-4", "learning_rate_mlp": "2e-4"}
    values["optimizer"]["max_train_steps"] += 3  # those are in the names of the files
    values["lrm"]["loss"] = "ce"
    return values


def write(folder: Path) -> None:
    """A random generator, a reward model with its files in two folders, and data."""
    torch.manual_seed(0)
    config = WanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=3, text_dim=24, text_len=16, freq_dim=32)
    policy = WanTransformer(config).init_weights()
    for p in policy.parameters():
        p.data += 0.05 * torch.randn_like(p)
    reward = new_reward(copy.deepcopy(policy), 2, num_heads=2)
    reward.transformer.blocks[0].ffn[0].weight.data += 0.1 * torch.randn(128, 64)
    torch.nn.init.normal_(reward.mlp.fc3.weight)
    save_transformer(policy, folder / "policy")
    save_reward(reward, folder / "reward", 3)
    (folder / "reward/reward.json").unlink()  # an official one has none
    (folder / "heads").mkdir()
    for name in ("query_attention", "mlp"):
        (folder / f"reward/{name}_step_3.ckpt").rename(folder / f"heads/{name}_step_3.ckpt")
    data, rng = folder / "data", np.random.default_rng(0)
    data.mkdir()
    metas = []
    for i in range(SAMPLES):
        shapes = {"vae_latent_path": LATENT, "textshort_path": (TEXT, 24), "textlong_path": (TEXT + 2, 24)}
        meta = {key: str(data / f"{key}-{i}.npy") for key in shapes}
        for key, shape in shapes.items():
            np.save(meta[key], rng.standard_normal((1, *shape)).astype(np.float32))
        meta |= {"physics_quality": 1, "human_quality": i % 2}
        path = data / f"{i}.json"
        path.write_text(json.dumps(meta))
        metas.append(str(path))
    (data / "all.list").write_text("\n".join(metas))


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """The values of all parameters."""
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def run_ours(config: Config, reward: bool) -> Outcome:
    """`prfl train`, or `prfl train-reward`."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        (train_reward if reward else train)(config)
    out = Path(config.train.out)
    names = ("train/loss",) if reward else ("train/sft_loss", "train/reward_loss")
    records = [r["values"] for r in read_metrics(out) if names[0] in r["values"]]
    saved = out / f"checkpoint-{config.train.steps}"
    losses = [tuple(values[name] for name in names) for values in records]
    if reward:
        return Outcome(losses, trained(load_reward(saved, **config.reward.pooling)))
    return Outcome(losses, load_file(saved / WEIGHTS_FILE), load_file(saved / "ema" / WEIGHTS_FILE))


class Checkout:
    """The checkout's step of PRFL on the models and data of ours."""

    SCRIPT = "scripts.prfl.train_prfl"

    def __init__(self, folder: Path, config: Config, values: dict):
        self.config, self.values = config, attributes(copy.deepcopy(values))
        policy = load_transformer(config.model.path, torch.float32)
        r = config.reward
        reward = load_reward(r.path, **r.heads, **r.pooling).freeze()
        schedule = schedule_of(config.rollout, latent_dtype(config))
        self.peer = Peer(folder, policy, reward, schedule, config.rollout.shift)
        self.code = load_module(folder, self.SCRIPT)
        self.levels = load_module(folder, f"{PACKAGE}.schedulers.scheduling_flow_match_discrete")
        self.average = copy.deepcopy(self.peer.policy)
        self.dtype = torch.float32 if config.model.compute_dtype == "float32" else torch.bfloat16
        self.drawn: deque[Tensor] = deque()  # noise, in the order in which the step asks for it
        self.level = self.index = 0
        label = None if self.SCRIPT == Checkout.SCRIPT else config.data.label
        reader = Reader(policy.config, label, long_caption=config.data.long_caption)
        paths = read_lists(config.data.train, "data.train")
        self.batches = MicroBatches(reader, paths, 1, config.train.seed)
        self._replace()

    def _replace(self) -> None:
        """What runs on several GPUs alone, and what is drawn."""
        code, nothing = self.code, lambda *_, **__: None
        for model in (self.peer.policy, self.peer.trunk):
            clip = partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()))
            model.clip_grad_norm_ = clip  # as FSDP's
        code.dist = types.SimpleNamespace(
            get_rank=lambda: 0, broadcast=nothing, all_reduce=nothing, barrier=nothing,
            ReduceOp=types.SimpleNamespace(AVG=None),
        )  # fmt: skip
        for name in ("log_memory_usage", "free_memory", "broadcast"):
            setattr(code, name, nothing)
        code.gc = types.SimpleNamespace(collect=nothing)
        code.random = types.SimpleNamespace(randint=lambda low, high: self.index)
        code.torch = Torch(
            randn_like=lambda a: self.drawn.popleft().to(a.dtype),
            autocast=lambda kind, dtype, enabled=True: torch.autocast(
                "cpu", torch.bfloat16, dtype != torch.float32
            ),
        )

        def rand(size: tuple[int], generator: None = None) -> Tensor:
            return torch.full(size, (self.level + 0.5) / flow.TRAIN_STEPS)

        self.levels.torch = Torch(rand=rand)

    def _given(self) -> tuple[Dict, Dict]:
        """What its functions take in addition to models and data."""
        c = self.values
        scheduler = c.extra_model.scheduler
        levels = self.levels.FlowMatchDiscreteScheduler(shift=scheduler.flow_shift)
        levels.set_timesteps(scheduler.num_train_timesteps, dtype=torch.int64)
        extra = Dict(noise_scheduler=levels, noise_scheduler_refl=self.peer.sampler, vae=None)
        extra |= dict(text_encoder=None, image_encoder=None)
        for name in ("learning_rate", "learning_rate_mlp"):
            if name in c.optimizer:
                c.optimizer[name] = float(c.optimizer[name])
        c.optimizer |= dict(lr_num_cycles=1, lr_power=1.0)
        return Dict(device=torch.device("cpu"), dtype=self.dtype, rank=0, local_rank=0), extra

    def run(self) -> Outcome:
        """All micro-batches."""
        code, c, peer = self.code, self.values, self.peer
        basic, extra = self._given()
        models = Dict(
            transformer=peer.policy.train(), lrm_transformer=peer.trunk, query_attention=peer.pool.eval(),
            mlp=peer.mlp.eval(), ema_transformer=self.average,
        )  # fmt: skip
        optimizers = code.optimizer_init(c, basic, models)
        losses = []
        for step in range(c.optimizer.max_train_steps):
            data = code.before_train_step(c, iter([self._sample(step)]), basic, Dict(extra))
            found = []
            for function in (code.train_step, code.train_step_refl):
                made = function(c, step, basic, models, Dict(extra), optimizers, data)
                found.append(float(made.loss) * CYCLE)  # it is divided for the accumulation
            losses.append(found)
            code.update_ema_model(peer.policy, self.average, c.model.ema.ema_decay)
        means = torch.tensor(losses, dtype=torch.float64).unflatten(0, (-1, CYCLE)).mean(1)
        return Outcome([tuple(row) for row in means.tolist()], trained(peer.policy), trained(self.average))

    def _sample(self, key: int) -> tuple:
        """What its loader gives for a micro-batch; also draws for it."""
        batch, seed = self.batches[key], self.config.train.seed
        self.level = integers(flow.TRAIN_STEPS, Purpose.SFT_LEVEL, seed, key, 1).item()
        self.index = Fresh(None, self.config).indices(key, 1).item()
        self.drawn.extend(
            noise_like(batch.latent, purpose, seed, key)
            for purpose in (Purpose.SFT_NOISE, Purpose.ROLLOUT_NOISE)
        )
        return batch.latent, batch.text, batch.text, None, None, ""


class RewardCheckout(Checkout):
    """The checkout's step of reward training."""

    SCRIPT = "scripts.pavrm.train_pavrm"

    def run(self) -> Outcome:
        """All micro-batches."""
        code, c, peer = self.code, self.values, self.peer
        c.dataset.sp_size = 2  # with 1 it pools nothing and fails; what it would broadcast is here
        basic, extra = self._given()
        models = Dict(
            transformer=peer.trunk, query_attention=peer.pool, mlp=peer.mlp.requires_grad_(True),
            feature_layer=c.lrm.feature_layer, criterion=torch.nn.BCELoss(),
        )  # fmt: skip
        optimizers, losses = code.optimizer_init(c, basic, models), []
        for step in range(self.config.train.steps):
            data = code.before_train_step(c, iter([self._sample(step)]), basic, extra)
            made = code.train_step(c, step, basic, models, extra, optimizers, data)
            losses.append((float(made.loss),))
        parts = ("transformer", peer.trunk), ("pool", peer.pool), ("mlp", peer.mlp)
        return Outcome(losses, {f"{n}.{k}": a for n, part in parts for k, a in trained(part).items()})

    def _sample(self, key: int) -> tuple:
        batch, seed = self.batches[key], self.config.train.seed
        self.level = integers(flow.TRAIN_STEPS, Purpose.REWARD_LEVEL, seed, key, 1).item()
        self.drawn.append(noise_like(batch.latent, Purpose.REWARD_NOISE, seed, key))
        nothing = torch.zeros(1)
        labels = nothing, nothing, torch.ones(1), batch.label
        return batch.latent, batch.text, batch.text, None, None, nothing, *labels


def change(after: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    """The change of all weights as one vector, without the key bias of the pooling: its gradient is zero, and
    what rounding leaves of it AdamW scales up."""
    found = []
    for k, a in before.items():
        whole = after[k].double() - a.double()
        q, _, v = whole.chunk(3) if k.endswith("in_proj_bias") else (whole, None, whole[:0])
        found += [q.flatten(), v.flatten()]
    return torch.cat(found)


def distances(got: Outcome, want: Outcome, before: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative distance of a loss; relative L2 of the changes of weights and average."""
    a, b = (torch.tensor(outcome.losses, dtype=torch.float64) for outcome in (got, want))
    found = {"losses": (a / b - 1).abs().max().item()}
    for name in ("weights",) if want.average is None else ("weights", "average"):
        a, b = (change(getattr(outcome, name), before) for outcome in (got, want))
        found[name] = ((a - b).norm() / b.norm()).item()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each comparison; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkout", required=True, type=a_path, metavar="DIR")
    parser.add_argument("--cycles", type=int, default=2, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 0, 1, 2], metavar="N")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    args = parser.parse_args(arguments)
    for kind in (Checkout, RewardCheckout):
        file = args.checkout.joinpath(*kind.SCRIPT.split(".")).with_suffix(".py")
        if not file.is_file():
            raise SystemExit(f"{file}: no such file, want a checkout of HY-Video-PRFL")
    for name in ("peft", "diffusers.optimization", "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)  # with stand-ins these would believe in packages that are not there
    sys.meta_path.append(StandIns())
    encoders = (f"{PACKAGE}.wan.modules.{part}" for part in ("t5", "vae", "clip"))
    sys.modules |= {name: StandIns().create_module(ModuleSpec(name, None)) for name in encoders}
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        for reward in (False, True):
            for line, good in checks(folder, args, reward):
                failed |= not good
                print(f"{'pass' if good else 'FAIL'}  {line}", flush=True)
    return int(failed)


def checks(folder: Path, args: argparse.Namespace, reward: bool) -> Iterator[tuple[str, bool]]:
    """(what and how far, whether it is within its limit) of one of both trainings."""
    what, found, own = "reward training" if reward else "PRFL", defaultdict(list), defaultdict(list)
    for seed in args.seeds:
        official = {}
        for precision in dict.fromkeys(["fp32", *args.precision]):
            config, before, official[precision] = theirs(folder, args, reward, precision, seed)
            if precision in args.precision:
                far = distances(official[precision], official["fp32"], before)
                for name, d in distances(run_ours(config, reward), official[precision], before).items():
                    found[precision, name].append(d)
                    own[precision, name].append(far[name])
    fixed = {"losses": LOSSES, "weights": WEIGHTS, "average": WEIGHTS}
    for (precision, name), each in found.items():
        d, limit = median(each), fixed[name]
        if precision == "bf16":
            d, limit = root_mean_square(each), FACTOR * root_mean_square(own[precision, name])
        yield f"{what}, {precision}, {name}: {d:.1e} (limit {limit:.2e})", d <= limit


def theirs(
    folder: Path, args: argparse.Namespace, reward: bool, precision: str, seed: int
) -> tuple[Config, dict[str, Tensor], Outcome]:
    """(our configuration, weights before, what the checkout makes of them)."""
    values = (reward_config if reward else official_config)(folder, args.cycles, precision, seed)
    (file := folder / f"{values['train_id']}.yaml").write_text(yaml.safe_dump(values))
    given = ["train.compat=official", "train.device=cpu", "train.tensorboard=false"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        config = load_config(file, given, "train-reward" if reward else "train")
        made = (RewardCheckout if reward else Checkout)(args.checkout.resolve(), config, values)
        before = load_file(folder / "policy" / WEIGHTS_FILE)
        if reward:
            r = config.reward
            before = trained(load_reward(r.path, **r.heads, **r.pooling))
        return config, before, made.run()


def root_mean_square(values: list[float]) -> float:
    """Of distances of several seeds."""
    return math.sqrt(sum(v * v for v in values) / len(values))


if __name__ == "__main__":
    sys.exit(main())
