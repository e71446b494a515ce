"""What several graded samples of a rollout are worth: held-out reward against seconds, on the demo's model.

    python benchmarks/samples_quality.py runs/demo [--samples 1 4] [--lr 2e-4 4e-4] [--seeds 0 1 2]
        [--steps 120] [--every 10]

DIR is a finished folder of `prfl demo`, as it was named there. Its PRFL stage is trained again, from the
same generator against the same reward model, for every number of samples, learning rate and seed; every few
steps the mean reward of samples at held-out prompts is taken, from noise that is always the same. Seconds
are those of training steps (the median step), not of validation. Every number of samples takes the learning
rate that brings it highest. The gate comes first: the losses' gradient of K samples is the mean of those of
K = 1 at the same indices.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from prfl_bench.timing import machine
from prfl_engine import flow
from prfl_engine.config import ChainConfig, Config, load_config
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.metrics import read_metrics
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.objectives import graded_windows
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.train import train


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


def curve(folder: Path, samples: int, lr: float, seed: int, steps: int, every: int):
    """({step: held-out reward}, seconds of a training step)."""
    out = tempfile.mkdtemp()
    try:
        config = settings(
            folder, f"train.out={out}", f"train.seed={seed}", f"train.steps={steps}", f"optim.lr={lr}",
            f"rollout.samples={samples}", f"eval.every={every}", "eval.samples=64", "eval.batch_size=16",
            "eval.videos=0", "train.log_every=1", "train.tensorboard=false", "train.resume=false",
        )  # fmt: skip
        train(config)
        records = read_metrics(out)
    finally:
        shutil.rmtree(out)
    scores = {r["step"]: r["values"]["eval/score"] for r in records if "eval/score" in r["values"]}
    times = {r["step"]: r["time"] for r in records if "train/lr" in r["values"]}
    taken = [times[s + 1] - times[s] for s in times if s + 1 in times and s not in scores]
    return scores, statistics.median(taken)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 4], metavar="K")
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-4, 4e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10, help="steps from one validation to the next")
    args = parser.parse_args(argv)
    gate(args.folder)
    best: dict[int, tuple[float, dict[int, float], float]] = {}
    for samples in args.samples:
        for lr in args.lr:
            runs = [curve(args.folder, samples, lr, s, args.steps, args.every) for s in args.seeds]
            mean = {step: statistics.mean(scores[step] for scores, _ in runs) for step in runs[0][0]}
            seconds = statistics.median(s for _, s in runs)
            last = mean[args.steps]
            spread = ", ".join(f"{scores[args.steps]:.3f}" for scores, _ in runs)
            print(f"K = {samples}, lr {lr:g}: {seconds:.3f} s a step, reward {last:.3f} ({spread})")
            print("    " + "  ".join(f"{step}: {value:.3f}" for step, value in mean.items()), flush=True)
            if samples not in best or last > best[samples][1][args.steps]:
                best[samples] = lr, mean, seconds
    first = args.samples[0]
    target = best[first][1][args.steps]
    print(f"\n{machine('cpu')}; to the reward {target:.3f}, that of K = {first} after {args.steps} steps:")
    for samples, (lr, mean, seconds) in best.items():
        reached = [step for step, value in mean.items() if value >= target]
        after = f"{reached[0] * seconds:.1f} s, {reached[0]} steps" if reached else "not reached"
        print(f"K = {samples}, lr {lr:g}: {after}")


if __name__ == "__main__":
    main()
