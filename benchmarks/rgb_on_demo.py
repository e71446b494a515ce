"""What RGB ReFL and PRFL do to the demo's samples at equal time.

    python benchmarks/rgb_on_demo.py runs/demo [--modes PRFL all:last all:random first:last] [--steps 100]
        [--seed 0] [--count 64] [--out FILE]

DIR is a finished folder of `prfl demo`, as it was named there. First networks over frames learn what the
demo's reward model has learned: clean windows from those with broken motion, by the same training latents,
decoded. One sees all frames, one the first frame alone, in which a corruption of motion hardly shows; their
accuracy on held-out latents is printed. The decoder is the demo's codec, which is linear.

Then the demo's PRFL stage is trained again with fresh rollouts and flow matching in every step, from the same
generator: by PRFL's reward of the noisy latent after a graded step, and by RGB ReFL (rgb.py) with the first
frame or all, graded at one of the last three steps or at any step. PRFL takes --steps optimizer steps, the
others as many as fit into the same CPU seconds, on one thread, by a pilot that times steps of all in turn.

Samples of the weights at half of the steps and at the end are measured as in the demo at held-out prompts:
`reward` is PRFL's own, `pixels` that of the network over all frames, each of which one of them trains on;
nothing was trained on `distance`, that of the samples' unsteadiness from clean video. The gate: gradients of
RGB ReFL in float64 against a central difference, and that of samples_quality.py.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from prfl_bench import rgb, samples_quality
from prfl_bench.rgb import FRAMES, FrameReward, PixelJudge, graded_pixels, predicted
from prfl_bench.samples_quality import ROUNDS, Mode, means_of, settings, step_seconds, trained
from prfl_bench.timing import machine
from prfl_engine import chain
from prfl_engine.batch import Batch
from prfl_engine.config import Config
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.demo.compare import measure
from prfl_engine.files import write_whole
from prfl_engine.media.codec import FrameCodec
from prfl_engine.metrics import progress
from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.model.sources import read_config
from prfl_engine.objectives import Grader, bind, fixed, schedule_of
from prfl_engine.paths import a_path
from prfl_engine.rollout.fresh import Fresh
from prfl_engine.seeds import Purpose, noise_like

PRFL = "PRFL"
LAST = 3  # steps of a chain that count as its last
MODES = (PRFL, "all:last", "all:random", "first:last")
KNOWN = (PRFL, *(f"{frames}:{place}" for frames in FRAMES for place in ("last", "random")))
BATCH = 64  # of the networks' training


class PixelWindow:
    """A graded step that pixels judge; objectives.GradedWindow to the training loop."""

    distance = None  # of a leash, which there is none

    def __init__(self, logit: Tensor):
        self.logits = [logit]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss of the one logit [B] to the parameters."""
        loss.backward()
        self.logits = [logit.detach() for logit in self.logits]


class PixelRollouts(Fresh):
    """Fresh rollouts whose graded steps pixels judge."""

    def __init__(self, judge: PixelJudge, place: str, grader: Grader, config: Config, *rest: Any):
        super().__init__(grader, config, *rest)
        self.judge, last = judge, config.rollout.steps - 1
        self.range = (max(0, last + 1 - LAST) if place == "last" else 0), last

    def windows(self, batch: Batch, key: int) -> Iterator[tuple[PixelWindow, dict[str, Tensor]]]:
        """The graded steps of micro-batch `key`, each by a rollout of its own from the same noise."""
        c, g = self.config, self.grader
        noise = noise_like(batch.latent, Purpose.ROLLOUT_NOISE, c.train.seed, key * c.data.batch_size)
        for index in self.indices(key, len(batch.latent)):
            given = g.model, self.judge, g.schedule, batch, noise, index, g.run_blocks
            yield PixelWindow(graded_pixels(*given)), {}


@contextmanager
def judged_by(judge: PixelJudge, place: str) -> Iterator[None]:
    """Training runs with fresh rollouts are RGB ReFL in this block."""
    with patch("prfl_engine.train.Fresh", partial(PixelRollouts, judge, place)):
        yield


def judge_of(codec: FrameCodec, network: FrameReward, frames: str) -> PixelJudge:
    """That of the demo's latents, whose first frame is given; without clamping, so that it is smooth."""
    return PixelJudge(partial(codec.decode, clamp=False), network, frames, given=1)


def labelled(folder: Path, name: str) -> Batch:
    """The latents and labels of the winners and losers of one of the demo's lists."""
    c = settings(folder)
    reader = Reader(read_config(c.model.path), c.data.label, first_frame=c.data.first_frame)
    paths = read_lists([str(folder / "data" / f"{name}_{side}.list") for side in ("win", "lose")], name)
    return next(fixed_batches(reader, paths, len(paths), torch.device("cpu")))


def learn(train: Batch, val: Batch, codec: FrameCodec, frames: str, steps: int) -> tuple[FrameReward, float]:
    """(a network over frames that tells clean from broken motion, its held-out accuracy)."""
    torch.manual_seed(0)
    network = FrameReward()
    judge = judge_of(codec, network, frames)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), f"network, {frames}", steps):
        rows = torch.randint(len(train.latent), (BATCH,))
        loss = binary_cross_entropy_with_logits(judge(train.latent[rows]), train.label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    network.eval().requires_grad_(False)
    logits = torch.cat([judge(latent) for latent in val.latent.split(BATCH)])
    return network, ((logits > 0) == (val.label > 0.5)).double().mean().item()


def gate(folder: Path, codec: FrameCodec, network: FrameReward) -> None:
    """Stop unless the gradient of RGB ReFL agrees with a central difference."""
    c = settings(folder)
    policy = load_transformer(c.model.path, torch.float64, "cpu").set_precision(torch.float64)
    paths = read_lists(c.data.val, "data.val")[:1]
    reader = Reader(policy.config, first_frame=c.data.first_frame)
    batch = next(fixed_batches(reader, paths, 1, torch.device("cpu")))
    batch = Batch(*(None if value is None else value.double() for value in batch))
    schedule = schedule_of(c.rollout)
    judge = judge_of(codec, network.double(), "all")
    noise = fixed(policy, batch, noise_like(batch.latent, Purpose.DEMO_SAMPLE, 0, 0).double())
    index = torch.tensor([c.rollout.steps // 2])
    state = chain.rollout(bind(policy, batch), schedule, noise, index)

    def loss() -> Tensor:
        return torch.sigmoid(judge(predicted(bind(policy, batch), schedule, state, index))).sum()

    rgb.gate(loss, list(policy.parameters()), "RGB ReFL, all frames, float64")
    network.float()


def table(found: dict) -> Iterable[str]:
    """The lines of the runs."""
    names = ("reward", "pixels", "distance", "jerk")
    yield f"{'at equal CPU seconds':22}{'steps':>6}{'seconds':>9}" + "".join(f"{n:>17}" for n in names)
    before = "".join(f"{found['before'][n]:17.3f}" for n in names)
    yield f"{'before':37}{before}"
    for mode, run in found["runs"].items():
        cells = "".join(f"{run['half'][n]:9.3f}, {run['end'][n]:.3f} "[:17].rjust(17) for n in names)
        yield f"{mode:22}{run['steps']:6}{run['seconds']:9.1f}{cells}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=KNOWN, metavar="MODE")
    parser.add_argument("--steps", type=int, default=100, help="of PRFL")
    parser.add_argument("--learn", type=int, default=400, metavar="N", help="steps of a network over frames")
    parser.add_argument("--lr", type=float, help="default: the demo's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=64, help="samples of the weights")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder, clock, mode = args.folder, time.process_time, Mode.of("fresh")
    codec = FrameCodec.load(folder / "data" / "codec.safetensors")
    train, val = (labelled(folder, name) for name in ("reward", "val"))
    networks, accuracy = {}, {}
    for frames in {"all": 0} | {name.split(":")[0]: 0 for name in args.modes if name != PRFL}:
        networks[frames], accuracy[frames] = learn(train, val, codec, frames, args.learn)
        print(f"network over frames ({frames}): held-out accuracy {accuracy[frames]:.3f}", flush=True)
    samples_quality.gate(folder)
    gate(folder, codec, networks["all"])

    def route(name: str):
        if name == PRFL:
            return nullcontext()
        frames, place = name.split(":")
        return judged_by(judge_of(codec, networks[frames], frames), place)

    times: dict[str, list[float]] = {}
    for name in [*dict.fromkeys([PRFL, *args.modes])] * ROUNDS:
        with route(name):
            times.setdefault(name, []).append(step_seconds(folder, mode, clock))
    looks = {"pixels": lambda video: torch.sigmoid(networks["all"](video))}
    c, data = settings(folder), folder / "data"
    start = {"before": Path(c.model.path)}
    samples, _ = measure(c, data / "codec.safetensors", data / "val_win.list", start, args.count)
    found = {"machine": machine("cpu"), "accuracy": accuracy, "step_seconds": times}
    found |= {"before": means_of(samples["before"], looks), "runs": {}}
    more = [f"train.seed={args.seed}"] + ([] if args.lr is None else [f"optim.lr={args.lr}"])
    for name in dict.fromkeys(args.modes):
        ratio = statistics.median(a / b for a, b in zip(times[name], times[PRFL], strict=True))
        steps = max(2, round(args.steps / ratio))
        with route(name):
            run = trained(folder, mode, steps, args.count, clock, *more, looks=looks)
        found["runs"][name] = run
        end = f"{run['seconds']:.1f} s, distance {run['end']['distance']:.3f}"
        print(f"{name}: {steps} steps, {end}", flush=True)
    print("", found["machine"], *table(found), sep="\n")
    if args.out is not None:
        write_whole(args.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
