"""What a reward model learns from pairs that belong together, and what it learns without them.

    python benchmarks/pairs_on_demo.py runs/demo [--only NAME ...] [--steps 500] [--seeds 0 1] [--out FILE]

DIR is a finished folder of `prfl demo`, as it was named there. The reward model is trained again from the
same generator on the same samples, as many in every step, in four ways: by the labels of single samples
(reward.loss=ce), by Bradley-Terry against random losers as the official script does it, by Bradley-Terry on
pairs of one first frame and one prompt (data.paired), and by cross-entropy besides (reward.ce_weight).

All are measured in the same way: how often the steady one of a held-out pair has the higher score under the
same noise. `labels` is how often the sign of the logit agrees with the label, which is what PRFL needs of a
reward: Bradley-Terry alone leaves open where its zero is. The gate compares pairs with the same pairs turned
round.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from prfl_bench.timing import machine
from prfl_engine.config import Config, load_config
from prfl_engine.data import read_lists
from prfl_engine.demo.compare import HELD_OUT
from prfl_engine.files import checkpoints, write_whole
from prfl_engine.metrics import read_metrics
from prfl_engine.model.checkpoint import load_reward
from prfl_engine.paths import a_path
from prfl_engine.train_reward import evaluate_reward, train_reward

SINGLE = "data.paired=false", "reward.ce_weight=0", "reward.pairs_at_once=false"
WAYS = {
    "labels": ("reward.loss=ce", *SINGLE, "data.lose=[]"),
    "random losers": SINGLE,
    "pairs": ("reward.ce_weight=0",),
    "pairs and labels": ("reward.ce_weight=1",),
}


def settings(folder: Path, way: str, *overrides: str) -> Config:
    """The configuration of the demo's reward stage in this way."""
    both = [str(folder / f"data/reward_{side}.list") for side in ("win", "lose")]
    pairs = load_config(folder / "reward" / "config.yaml").data.batch_size
    singles = f"data.train=[{','.join(both)}]", f"data.batch_size={2 * pairs}"
    lists = singles if way == "labels" else ()
    more = "eval.every=0", "train.resume=false", "train.ema=0.99", "train.log_every=1", *WAYS[way], *lists
    return load_config(folder / "reward" / "config.yaml", (*more, *overrides))


def measured(config: Config, folder: Path, model: Path) -> dict[str, dict[str, float]]:
    """By list of HELD_OUT: the accuracy on pairs, the mean of t <= 600, and on the labels of both."""
    reward = load_reward(model, **config.reward.pooling, dtype=torch.float32, device="cpu").freeze()
    low, found = [t for t in config.eval.timesteps if t <= 600], {}
    for name, key in HELD_OUT.items():
        win, lose = (read_lists([str(folder / f"data/{key}_{side}.list")], key) for side in ("win", "lose"))
        pairs = evaluate_reward(config, reward, win, lose)
        labels = evaluate_reward(config, reward, [*win, *lose])
        found[name] = {
            what: statistics.mean(of[t]["accuracy"] for t in low)
            for what, of in (("pairs", pairs), ("labels", labels))
        }
    return found


def trained(folder: Path, way: str, steps: int, seed: int) -> dict:
    """What a model learned in `steps` steps, and its CPU seconds."""
    with tempfile.TemporaryDirectory() as out:
        c = settings(folder, way, f"train.steps={steps}", f"train.seed={seed}", f"train.out={out}/run")
        begun = time.process_time()
        train_reward(c)
        seconds = time.process_time() - begun
        last = read_metrics(Path(out, "run"))[-1]["values"]["train/loss"]
        found = measured(c, folder, checkpoints(Path(out, "run"))[-1] / "ema")
    return {"seconds": seconds, "loss": last, "held_out": found}


def gate(folder: Path) -> None:
    """SystemExit unless the demo's own reward model is wrong on turned pairs where it is right on them."""
    c, model = settings(folder, "pairs and labels"), checkpoints(folder / "reward")[-1] / "ema"
    reward = load_reward(model, **c.reward.pooling, dtype=torch.float32, device="cpu").freeze()
    win, lose = (read_lists([str(folder / f"data/val_{side}.list")], "val") for side in ("win", "lose"))
    found, turned = evaluate_reward(c, reward, win, lose), evaluate_reward(c, reward, lose, win)
    off = max(abs(found[t]["accuracy"] + turned[t]["accuracy"] - 1) for t in found)
    print(f"gate: pairs and turned pairs add up to 1 within {off:.1e}", flush=True)
    if not off < 1e-9:
        raise SystemExit("gate failed: nothing is measured")


def table(found: dict) -> Iterable[str]:
    """A line for each way: means over the seeds."""
    yield f"{'':18}{'CPU s':>7}" + "".join(f"{name:>28}" for name in HELD_OUT)
    for way, runs in found["runs"].items():
        cells = ""
        for name in HELD_OUT:
            mean = {k: statistics.mean(r["held_out"][name][k] for r in runs) for k in ("pairs", "labels")}
            cells += f"{mean['pairs']:.3f} (labels {mean['labels']:.3f})".rjust(28)
        yield f"{way:18}{statistics.mean(r['seconds'] for r in runs):7.1f}{cells}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=WAYS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    gate(args.folder)
    found = {"machine": machine("cpu"), "steps": args.steps, "runs": {}}
    for way in dict.fromkeys(args.only):
        found["runs"][way] = [trained(args.folder, way, args.steps, seed) for seed in args.seeds]
        print(*list(table(found))[-1:], sep="\n", flush=True)
    print("", found["machine"], f"{args.steps} steps", *table(found), sep="\n")
    if args.out is not None:
        write_whole(args.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
