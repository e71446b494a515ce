"""What a training step of the demo costs in float32 and in bfloat16, and with pairs in one pass or two.

    python benchmarks/steps_on_demo.py runs/demo [--steps 60] [--rounds 5] [--threads 2] [--out FILE]

DIR is a finished folder of `prfl demo`, as it was named there. Its pre-training and its reward training are
begun again from its generator in every way, in turn, one round after the other; the first steps of every run,
which read their samples from files, do not count. The gate: all ways of a stage have the same loss in their
first step, but for the rounding of their dtype.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from prfl_bench.timing import machine
from prfl_engine.config import Config, load_config
from prfl_engine.files import checkpoints, write_whole
from prfl_engine.metrics import read_metrics
from prfl_engine.paths import a_path
from prfl_engine.train import train
from prfl_engine.train_reward import train_reward

F32, BF16 = "model.compute_dtype=float32", "model.compute_dtype=bfloat16"
ONE, TWO = "reward.pairs_at_once=true", "reward.pairs_at_once=false"
STAGES = {
    "pretrain": (train, {"float32": (F32,), "bfloat16": (BF16,)}),
    "reward": (
        train_reward,
        {
            "float32, two passes": (F32, TWO), "float32, one pass": (F32, ONE),
            "bfloat16, two passes": (BF16, TWO), "bfloat16, one pass": (BF16, ONE),
        },
    ),
}  # fmt: skip
WARM_UP = 20  # steps of a run that do not count
GATE = {"float32": 1e-5, "bfloat16": 0.02}  # relative difference of the first loss from the stage's first way


def settings(folder: Path, stage: str, way: str, *overrides: str) -> Config:
    """The configuration of a stage of the demo in this way."""
    generator = checkpoints(folder / "pretrain")[-1] / "ema"
    more = "eval.every=0", "train.resume=false", "train.log_every=1", "train.tensorboard=false"
    more += "model.preset=null", f"model.path={generator}"
    return load_config(folder / stage / "config.yaml", (*more, *STAGES[stage][1][way], *overrides))


def ran(folder: Path, stage: str, way: str, steps: int) -> tuple[float, float]:
    """(the loss of the first step, median seconds of those after the warm-up)."""
    with tempfile.TemporaryDirectory() as out:
        STAGES[stage][0](settings(folder, stage, way, f"train.steps={steps}", f"train.out={out}/run"))
        lines = [line["values"] for line in read_metrics(Path(out, "run"))]
    loss = next(line[name] for line in lines for name in ("train/loss", "train/sft_loss") if name in line)
    seconds = [line["perf/step_s"] for line in lines if "perf/step_s" in line]
    return loss, statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :])


def table(found: dict) -> Iterable[str]:
    """A line for each way: the median of its rounds, the least and the most."""
    yield f"{'ms a step':32}  median  least   most"
    for name, seconds in found["seconds"].items():
        cells = (f"{1e3 * f(seconds):7.1f}" for f in (statistics.median, min, max))
        yield f"{name:32}{''.join(cells)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = {"machine": machine("cpu"), "steps": args.steps, "seconds": {}}
    for stage, (_, ways) in STAGES.items():
        first = None
        for number in range(args.rounds):
            for way in ways:
                loss, seconds = ran(args.folder, stage, way, args.steps)
                found["seconds"].setdefault(f"{stage}, {way}", []).append(seconds)
                first = loss if first is None else first
                off = abs(loss / first - 1)
                if number == 0:
                    print(f"gate: {stage}, {way}: first loss {loss:.6f}, off by {off:.1e}", flush=True)
                if not off <= GATE[way.split(",")[0]]:
                    raise SystemExit("gate failed: nothing is measured")
    print("", found["machine"], *table(found), sep="\n")
    if args.out is not None:
        write_whole(args.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
