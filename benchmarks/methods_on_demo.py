"""What guidance, a leash and several seeds do to the demo's samples.

    python benchmarks/methods_on_demo.py runs/demo [--only NAME ...] [--steps 100] [--seeds 0 1] [--count 64]
        [--out FILE]

DIR is a finished folder of `prfl demo`, as it was named there. Its PRFL stage is trained again with fresh
rollouts and flow matching in every step, from the same generator against the same reward model, once in
every way: as it is; with a leash (loss.anchor); with guided rollouts and graded steps, whose samples are
guided, too; with several seeds of a sample, judged early. All take --steps optimizer steps; the CPU seconds
on one thread say what these cost.

Samples of the weights at half of the steps and at the end are measured as in the demo at held-out prompts.
Nothing was trained on `distance`, that of the samples' unsteadiness from clean video, nor on `jerk`, which
rises where a reward is exploited. The gate is that of samples_quality.py.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from prfl_bench.samples_quality import MEASURES, Mode, gate, means_of, settings, trained
from prfl_bench.timing import machine
from prfl_engine.demo.compare import measure
from prfl_engine.files import write_whole
from prfl_engine.paths import a_path

EARLY = "rollout.seeds_step=6"  # of 20; the first that is graded
GUIDED = "chain.guidance=2", "rollout.guidance=2", "sample.guidance=2"
WAYS = {
    "plain": (),
    "leash 0.1": ("loss.anchor=0.1",),
    "leash 1": ("loss.anchor=1",),
    "guided 2": GUIDED,
    "4 seeds, steepest": ("rollout.seeds=4", EARLY),
    "4 seeds, highest": ("rollout.seeds=4", EARLY, "rollout.seeds_keep=highest"),
    "4 seeds, lowest": ("rollout.seeds=4", EARLY, "rollout.seeds_keep=lowest"),
}


def overrides(folder: Path, way: str) -> list[str]:
    """The settings of a way."""
    return [f"data.negative_text={folder / 'data/text/negative.npy'}", "loss.anchor=0", *WAYS[way]]


def before(folder: Path, way: str, count: int) -> dict:
    """The means of samples of the generator that all begin with."""
    c, data = settings(folder, *overrides(folder, way)), folder / "data"
    start = {"before": Path(c.model.path)}
    samples, _ = measure(c, data / "codec.safetensors", data / "val_win.list", start, count)
    return means_of(samples["before"], {})


def table(found: dict) -> Iterable[str]:
    """A line for each way: means over the seeds."""
    yield f"{'at equal steps':20}{'steps':>6}{'CPU s':>7}" + "".join(f"{name:>16}" for name in MEASURES)
    for name, start in found["before"].items():
        yield f"{'before, ' + name:33}" + "".join(f"{start[k]:16.3f}" for k in MEASURES)
    for way, runs in found["runs"].items():
        half, end = ({k: statistics.mean(r[at][k] for r in runs) for k in MEASURES} for at in ("half", "end"))
        cells = "".join(f"{half[k]:9.3f}, {end[k]:.3f}" for k in MEASURES)
        seconds = statistics.mean(run["seconds"] for run in runs)
        yield f"{way:20}{runs[0]['steps']:6}{seconds:7.1f}{cells}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=WAYS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--count", type=int, default=64, help="samples of the weights")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    gate(args.folder)
    found = {"machine": machine("cpu"), "before": {}, "runs": {}}
    for name, way in {"not guided": "plain", "guided": "guided 2"}.items():
        if name == "not guided" or way in args.only:
            found["before"][name] = before(args.folder, way, args.count)
    for way in dict.fromkeys(args.only):
        more = overrides(args.folder, way)
        found["runs"][way] = [
            trained(
                args.folder, Mode.of("fresh"), args.steps, args.count, time.process_time,
                f"train.seed={seed}", *more,
            )
            for seed in args.seeds
        ]  # fmt: skip
        print(*list(table(found))[-1:], sep="\n", flush=True)
    print("", found["machine"], *table(found), sep="\n")
    if args.out is not None:
        write_whole(args.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
