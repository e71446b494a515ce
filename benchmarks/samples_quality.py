"""Fresh rollouts, several samples of a rollout and chains that persist, compared at equal seconds.

    python benchmarks/samples_quality.py runs/demo [--modes fresh samples:4 persistent:1 persistent:4
        persistent:16] [--lr 2e-4 4e-4] [--seeds 0 1 2] [--steps 120] [--every 20] [--count 64]
        [--max-drift 0.05]

DIR is a finished folder of `prfl demo`, as it was named there. Its PRFL stage is trained again, from the same
generator against the same reward model, for every mode, learning rate and seed. samples:K has K graded
samples of a rollout, persistent:N a pool of N batches, persistent:N:S also flow matching in one step of S.
`fresh` takes --steps steps. The others take as many as fit into the seconds of those: a short run of every
mode is timed first. In their first round persistent chains are fresh rollouts and are counted as such.
Seconds are those of training steps, not of validation.

Every few steps the mean reward of samples at held-out prompts is taken, from noise that is always the same.
At the end samples of the final weights are measured as in the demo: their reward, and the distance of their
unsteadiness from that of clean video, on which nothing was trained. Drift is the mean of what a run has
measured (`chain_drift`). Without --max-drift no chain is renewed. The gate comes first: the losses' gradient
of K samples is the mean of those of K = 1 at the same indices.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from prfl_bench.timing import machine
from prfl_engine import flow
from prfl_engine.config import ChainConfig, Config, load_config
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.demo.run import measure
from prfl_engine.files import checkpoints
from prfl_engine.metrics import read_metrics
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.objectives import graded_windows
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.train import train

PILOT = 8  # timed steps of a short run, a multiple of the usual S


def settings(folder: Path, *overrides: str) -> Config:
    """The configuration of the demo's PRFL stage. Its paths are relative to where the demo ran."""
    return load_config(folder / "prfl" / "config.yaml", overrides)


def gate(folder: Path, limit: float = 1e-4) -> None:
    """Stop unless the gradient of two samples of one rollout is the mean of those of two rollouts."""
    config = settings(folder)
    policy = load_transformer(config.model.path, torch.float32, "cpu")
    r = config.reward
    reward = load_reward(r.path, **r.pooling, dtype=torch.float32, device="cpu").freeze()
    paths = read_lists(config.data.val, "data.val")[:1]
    batch = next(fixed_batches(Reader(policy.config), paths, 1, torch.device("cpu")))
    noise = noise_like(batch.latent, Purpose.DEMO_SAMPLE, 0, 0)
    schedule = flow.make_schedule(config.rollout.solver, config.rollout.steps, config.rollout.shift)

    def gradient(*indices: int) -> torch.Tensor:
        policy.zero_grad()
        rows = torch.tensor(indices)[:, None]
        for window in graded_windows(policy, reward, schedule, batch, noise, rows, ChainConfig()):
            window.backward(torch.sigmoid(window.logit).sum() / len(indices))
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    want = (gradient(7) + gradient(12)) / 2
    error = ((gradient(7, 12) - want).norm() / want.norm()).item()
    print(f"gate: gradients of two samples within {error:.1e}", flush=True)
    if not error < limit:
        raise SystemExit(f"gate failed, want {limit}")


class Mode(NamedTuple):
    """What --modes names."""

    name: str
    samples: int = 1
    pool: int = 0  # batches; 0: fresh rollouts
    sft_every: int = 1

    @classmethod
    def of(cls, text: str) -> "Mode":
        name, *numbers = text.split(":")
        known = {"fresh": (0,), "samples": (1,), "persistent": (1, 2)}
        if len(numbers) not in known.get(name, ()) or not all(n.isdigit() and int(n) for n in numbers):
            raise SystemExit(f"--modes: got {text!r}, want fresh, samples:K, persistent:N or persistent:N:S")
        values = [int(n) for n in numbers]
        if name == "samples":
            return cls(text, samples=values[0])
        return cls(text, 1, *values)

    def overrides(self, folder: Path) -> list[str]:
        c = settings(folder)
        batch = c.data.batch_size * c.train.accumulate
        found = [f"rollout.samples={self.samples}", f"loss.sft_every={self.sft_every}"]
        if self.pool:
            found += ["rollout.mode=persistent", f"rollout.pool={self.pool * batch}"]
            found += ["rollout.probe_every=20"]
        return found


class Run(NamedTuple):
    """What a training run has measured."""

    scores: dict[int, float]  # held-out reward by step
    seconds: list[float]  # of every training step before another one, where no validation is in between
    drift: float  # NaN: none


def trained(folder: Path, out: Path, mode: Mode, steps: int, every: int, *more: str) -> Run:
    """Train into the folder `out`; every: steps from one validation to the next, 0 for none."""
    config = settings(
        folder, f"train.out={out}", f"train.steps={steps}", f"eval.every={every}", "eval.samples=64",
        "eval.batch_size=16", "eval.videos=0", "train.log_every=1", "train.tensorboard=false",
        "train.resume=false", *mode.overrides(folder), *more,
    )  # fmt: skip
    train(config)
    records = [(r["step"], r["time"], r["values"]) for r in read_metrics(out)]
    scores = {step: values["eval/score"] for step, _, values in records if "eval/score" in values}
    times = {step: time for step, time, values in records if "train/lr" in values}
    seconds = [times[s + 1] - times[s] for s in times if s + 1 in times and s not in scores]
    drifts = {values["train/chain_drift"] for _, _, values in records if "train/chain_drift" in values}
    return Run(scores, seconds, statistics.mean(drifts) if drifts else math.nan)


def steps_in(folder: Path, mode: Mode, steps: int, fresh: float) -> tuple[int, float]:
    """(how many steps of a mode take as long as so many of fresh rollouts, its seconds a step after the first
    round); fresh: seconds of one of those."""
    with tempfile.TemporaryDirectory() as out:
        seconds = trained(folder, Path(out), mode, mode.pool + PILOT + 1, 0).seconds
    one = statistics.mean(seconds[-PILOT:])
    return mode.pool + max(1, round((steps - mode.pool) * fresh / one)), one


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    modes = ["fresh", "samples:4", "persistent:1", "persistent:4", "persistent:16"]
    parser.add_argument("--modes", nargs="+", default=modes, metavar="MODE")
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-4, 4e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="of fresh rollouts")
    parser.add_argument("--every", type=int, default=20, help="steps from one validation to the next")
    parser.add_argument("--count", type=int, default=64, help="samples of the final weights")
    parser.add_argument("--max-drift", type=float, default=1e9, metavar="X", help="rollout.max_drift")
    args = parser.parse_args(argv)
    chosen = [Mode.of(text) for text in args.modes]
    gate(args.folder)
    _, fresh = steps_in(args.folder, Mode("fresh"), args.steps, 1.0)
    print(f"{machine('cpu')}; {args.steps} steps of fresh rollouts: {args.steps * fresh:.1f} s")
    data = args.folder / "data"
    codec, clean = data / "codec.json", data / "clean_val.list"
    rows = []
    for mode in chosen:
        steps, one = args.steps, fresh
        if mode.name != "fresh":
            steps, one = steps_in(args.folder, mode, args.steps, fresh)
        for lr in args.lr:
            found = []
            for seed in args.seeds:
                with tempfile.TemporaryDirectory() as out:
                    more = f"train.seed={seed}", f"optim.lr={lr}", f"rollout.max_drift={args.max_drift}"
                    run = trained(args.folder, Path(out), mode, steps, args.every, *more)
                    model = {"final": checkpoints(Path(out))[-1]}
                    samples, _ = measure(settings(args.folder), codec, clean, model, args.count)
                final = {name: samples["final"][name].mean().item() for name in ("reward", "distance")}
                found.append((run, final))
            scores = [run.scores for run, _ in found]
            mean = {step: statistics.mean(s[step] for s in scores) for step in scores[0]}
            print(f"{mode.name}, lr {lr:g}: {one:.3f} s a step, {steps} steps")
            print("    " + "  ".join(f"{step}: {value:.3f}" for step, value in mean.items()), flush=True)
            rows.append((mode, lr, steps, one, found))
    print(f"\n{'at equal seconds':20}{'lr':>8}{'s a step':>10}{'steps':>7}   reward, distance by seed; drift")
    for mode, lr, steps, one, found in rows:
        reward, distance = (", ".join(f"{f[k]:.3f}" for _, f in found) for k in ("reward", "distance"))
        drift = statistics.mean(run.drift for run, _ in found)
        print(f"{mode.name:20}{lr:8g}{one:10.3f}{steps:7}   {reward}; {distance}; {drift:.3f}")


if __name__ == "__main__":
    main()
