"""Fresh rollouts, several samples of a rollout and chains that persist, compared at equal seconds.

    python benchmarks/samples_quality.py runs/demo [--modes fresh samples:4 persistent:1 persistent:4
        persistent:16 persistent:1:4] [--lr 1e-4 2e-4 4e-4] [--seeds 0 1 2] [--steps 120] [--count 64]
        [--max-drift X] [--clock cpu] [--out FILE]

DIR is a finished folder of `prfl demo`, as it was named there. Its PRFL stage is trained again, from the same
generator against the same reward model, for every mode, learning rate and seed. samples:K has K graded
samples of a rollout, persistent:N a pool of N batches, persistent:N:S also flow matching in one step of S,
persistent:N:S:T also a stride of T.

`fresh` takes --steps steps, the others as many as fit into its seconds. First a pilot times some steps of
every mode, all modes in turn, several times; the median of the ratios to fresh decides. In their first round
persistent chains are fresh rollouts and are counted as such. `--clock cpu` counts the process's CPU seconds
on one thread, which other processes disturb little; `wall` counts seconds on torch's threads and needs an
idle machine. A run of a given number of steps is the same to the bit every time.

Samples of the weights at half of the steps and at the end are measured as in the demo: their reward, and the
distance of their unsteadiness from that of clean video, on which nothing was trained. Drift and age are means
of what a run has measured (`chain_drift`, `chain_age`). Without --max-drift no chain is renewed. Every pilot
and every finished run is a line of FILE, with the samples' jerk, too; another call goes on from there. All
modes have their first seed before the second. The gate comes first: the losses' gradient of K samples is the
mean of those of K = 1 at the same indices.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise, product
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from prfl_bench.timing import machine
from prfl_engine.config import ChainConfig, Config, load_config
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.demo.compare import measure
from prfl_engine.files import checkpoints, write_whole
from prfl_engine.metrics import MetricsWriter, read_metrics
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.objectives import fixed, graded_windows, schedule_of
from prfl_engine.paths import a_path
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.train import train

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
MEASURES = "reward", "distance", "jerk"
PILOT, ROUNDS = 8, 3  # timed steps of a mode in one round of the pilot, a multiple of the usual S; rounds
MODES = ("fresh", "samples:4", "persistent:1", "persistent:4", "persistent:16", "persistent:1:4")


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
    reader = Reader(policy.config, first_frame=config.data.first_frame)
    batch = next(fixed_batches(reader, paths, 1, torch.device("cpu")))
    noise = fixed(policy, batch, noise_like(batch.latent, Purpose.DEMO_SAMPLE, 0, 0))
    schedule = schedule_of(config.rollout)

    def gradient(*indices: int) -> Tensor:
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
    stride: int = 1

    @classmethod
    def of(cls, text: str) -> "Mode":
        name, *numbers = text.split(":")
        known = {"fresh": (0,), "samples": (1,), "persistent": (1, 2, 3)}
        if len(numbers) not in known.get(name, ()) or not all(n.isdigit() and int(n) for n in numbers):
            want = "fresh, samples:K, persistent:N, persistent:N:S or persistent:N:S:T"
            raise SystemExit(f"--modes: got {text!r}, want {want}")
        values = [int(n) for n in numbers]
        if name == "samples":
            return cls(text, samples=values[0])
        return cls(text, 1, *values)

    def overrides(self, folder: Path) -> list[str]:
        c = settings(folder)
        batch = c.data.batch_size * c.train.accumulate
        found = [f"rollout.samples={self.samples}", f"loss.sft_every={self.sft_every}"]
        if not self.pool:
            return [*found, "rollout.mode=fresh", "rollout.pool=null"]
        found += ["rollout.mode=persistent", f"rollout.pool={self.pool * batch}"]
        return [*found, "rollout.probe_every=20", f"rollout.stride={self.stride}"]

    def steps(self, fresh: int, ratio: float) -> int:
        """Steps that take as long as `fresh` steps of fresh rollouts; ratio: a step's seconds over one of
        those, after the first round."""
        return self.pool + max(1, round((fresh - self.pool) / ratio))


def config_of(folder: Path, out: str, mode: Mode, steps: int, *more: str) -> Config:
    """The configuration of a run of a mode, with checkpoints at half of its steps and at the end."""
    return settings(
        folder, f"train.out={out}", f"train.steps={steps}", "eval.every=0", "train.log_every=1",
        "train.tensorboard=false", "train.resume=false", f"train.save_every={-(-steps // 2)}", "train.keep=2",
        *mode.overrides(folder), *more,
    )  # fmt: skip


def step_seconds(folder: Path, mode: Mode, clock: Callable[[], float]) -> float:
    """Seconds of a step of a mode after its first round: the mean of PILOT."""
    marks: list[float] = []
    log = MetricsWriter.log

    def marked(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        marks.append(clock())
        log(self, step, values, prefix)

    # A step is logged after the next one's first loss, the last step after its own end.
    with tempfile.TemporaryDirectory() as out, patch.object(MetricsWriter, "log", marked):
        train(config_of(folder, out, mode, mode.pool + PILOT + 2, "rollout.max_drift=1e9"))
    return statistics.mean(b - a for a, b in list(pairwise(marks))[-PILOT - 1 : -1])


def pilot(folder: Path, modes: Iterable[Mode], clock: Callable[[], float]) -> dict[str, list[float]]:
    """{mode: seconds of a step in every round}, and those of `fresh`."""
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for mode in dict.fromkeys([Mode("fresh"), *modes]):
            found.setdefault(mode.name, []).append(step_seconds(folder, mode, clock))
    return found


def trained(
    folder: Path,
    mode: Mode,
    steps: int,
    count: int,
    clock: Callable[[], float],
    *more: str,
    looks: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> dict:
    """What a training run of so many steps, with these overrides, has measured; sample.guidance is that of
    the samples. looks: what else is measured on the samples' frames [B, 3, F, H, W], a number each."""
    with tempfile.TemporaryDirectory() as out:
        begun = clock()
        train(config_of(folder, out, mode, steps, *more))
        seconds = clock() - begun
        values = [r["values"] for r in read_metrics(out)]
        models = dict(zip(("half", "end"), checkpoints(Path(out)), strict=True))
        data = folder / "data"
        c = settings(folder, *mode.overrides(folder), *more)
        samples, _ = measure(c, data / "codec.safetensors", data / "val_win.list", models, count)
    drifts = {v["train/chain_drift"] for v in values if "train/chain_drift" in v}
    ages = [v["train/chain_age"] for v in values if "train/chain_age" in v]
    found = {name: means_of(s, looks) for name, s in samples.items()}
    means = {k: statistics.mean(of) if of else None for k, of in (("drift", drifts), ("age", ages))}
    return {"steps": steps, "seconds": seconds} | found | means


def means_of(samples: dict, looks: Mapping[str, Callable[[Tensor], Tensor]]) -> dict:
    """Means over the samples of one model, as demo.compare.measure gives them: of MEASURES and of `looks`."""
    looked = {name: look(samples["video"]) for name, look in looks.items()}
    values = {name: samples[name] for name in MEASURES} | looked
    return {k: v.mean().item() for k, v in values.items()}


class Record:
    """The lines of FILE: the settings, pilots, finished runs."""

    def __init__(self, path: Path, settings: dict):
        """SystemExit where the file was made with other settings."""
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed call may have left part of a line
        if whole != text:
            write_whole(path, whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0] != (want := {"settings": settings}):
            raise SystemExit(f"{path}: got {lines[0]}, want {want}, or another --out")
        self.seconds: dict[str, tuple[float, float]] = {}
        self.runs: dict[tuple[str, float, int], dict] = {}
        if not lines:
            self._append({"settings": settings})
        for line in lines[1:]:
            self._take(line)

    def add(self, line: dict) -> None:
        """Append a line: {"pilot": {mode: [seconds]}} or {"run": {...}}."""
        self._append(line)
        self._take(line)

    def _append(self, line: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _take(self, line: dict) -> None:
        if "pilot" in line:
            fresh = line["pilot"]["fresh"]
            for name, found in line["pilot"].items():
                ratio = statistics.median(a / b for a, b in zip(found, fresh, strict=True))
                self.seconds.setdefault(name, (statistics.median(found), ratio))
        else:
            run = line["run"]
            self.runs[run["mode"], run["lr"], run["seed"]] = run


def table(record: Record) -> Iterable[str]:
    """The lines of what has been measured: means over seeds, and every seed's value at the end."""
    what = "reward at half, end (seeds); distance at half, end (seeds); drift; age"
    yield f"{'at equal seconds':18}{'lr':>7}{'ratio':>7}{'steps':>7}{'seconds':>9}   {what}"
    cells: dict[tuple[str, float], list[dict]] = {}
    for (name, lr, _), run in sorted(record.runs.items(), key=lambda item: item[0][1:]):
        cells.setdefault((name, lr), []).append(run)
    for name, lr in sorted(cells, key=lambda cell: (list(record.seconds).index(cell[0]), cell[1])):
        runs, parts = cells[name, lr], []
        for key in ("reward", "distance"):
            half, end = ([run[at][key] for run in runs] for at in ("half", "end"))
            each = ", ".join(f"{value:.3f}" for value in end)
            parts.append(f"{statistics.mean(half):.3f}, {statistics.mean(end):.3f} ({each})")
        for key, digits in (("drift", 3), ("age", 0)):
            known = [run[key] for run in runs if run[key] is not None]
            parts.append(f"{statistics.mean(known):.{digits}f}" if known else "-")
        seconds = statistics.mean(run["seconds"] for run in runs)
        steps, ratio = runs[0]["steps"], record.seconds[name][1]
        yield f"{name:18}{lr:7g}{ratio:7.3f}{steps:7}{seconds:9.1f}   {'; '.join(parts)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="of fresh rollouts")
    parser.add_argument("--count", type=int, default=64, help="samples of the weights")
    parser.add_argument("--max-drift", type=float, default=1e9, metavar="X", help="rollout.max_drift")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="default: DIR/samples_quality.jsonl")
    args = parser.parse_args(argv)
    modes = [Mode.of(text) for text in args.modes]
    for mode in modes:
        if args.steps <= mode.pool + 1:
            raise SystemExit(f"--steps: got {args.steps}, want more than {mode.pool + 1} with {mode.name}")
    if args.clock == "cpu":
        torch.set_num_threads(1)
    clock = CLOCKS[args.clock]
    same = {k: getattr(args, k) for k in ("steps", "count", "max_drift", "clock")}
    path = args.out or args.folder / "samples_quality.jsonl"
    record = Record(path, {"folder": str(args.folder), "machine": machine("cpu")} | same)
    gate(args.folder)
    if new := [mode for mode in modes if mode.name not in record.seconds]:
        record.add({"pilot": pilot(args.folder, new, clock)})
    for seed, lr, mode in product(args.seeds, args.lr, modes):
        if (mode.name, lr, seed) in record.runs:
            continue
        steps = mode.steps(args.steps, record.seconds[mode.name][1])
        more = f"train.seed={seed}", f"optim.lr={lr}", f"rollout.max_drift={args.max_drift}"
        found = trained(args.folder, mode, steps, args.count, clock, *more)
        record.add({"run": {"mode": mode.name, "lr": lr, "seed": seed} | found})
        end = found["end"]
        print(
            f"{mode.name}, lr {lr:g}, seed {seed}: {steps} steps, {found['seconds']:.1f} s, "
            f"reward {end['reward']:.3f}, distance {end['distance']:.3f}", flush=True,
        )  # fmt: skip
    print("", *table(record), sep="\n")


if __name__ == "__main__":
    main()
