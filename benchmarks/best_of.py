"""Best of N with an early exit on the demo: what it gains and costs, against finishing all N.

    python benchmarks/best_of.py runs/demo [--counts 1 4 8] [--judge-at 2 4 6 10 14 18] [--prompts 64]
        [--model DIR] [--out FILE]

DIR is a finished folder of `prfl demo`, as it was named there. The generator is that before PRFL, or --model.
The largest N chains of every held-out prompt are finished once, and judged on the way; every row of the table
picks from these. A smaller N has as many disjoint groups of chains as there are, whose mean is shown.

A chain is judged at a step as `prfl sample --best-of` does it: by the reward of its state. Of finished chains
the one with the highest mean reward over eval.timesteps is kept, under other noise than that of the column
`reward`. That is the demo's measure, by the model that chooses. `distance` is the demo's untrained measure:
how far the unsteadiness of the decoded video is from that of clean video. p is of a paired permutation test
against N = 1.

The gate comes first: best_of finishes the chains that the table picks, equal to the bit on the CPU.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prfl_bench.samples_quality import settings
from prfl_engine import best_of, chain, flow
from prfl_engine.batch import Batch
from prfl_engine.build import pick_device
from prfl_engine.data import Reader, counted, fixed_batches, read_lists, read_meta
from prfl_engine.demo.compare import paired_p, spread, unsteadiness
from prfl_engine.files import write_whole
from prfl_engine.media.codec import FrameCodec
from prfl_engine.metrics import progress
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import bind, fixed, noisy_rewards, whole_schedule
from prfl_engine.paths import a_path
from prfl_engine.seeds import Purpose, noise_like
from prfl_engine.validation import finite

ALL = "all finished"
BATCH = 16


class Subject(NamedTuple):
    """What is sampled and judged."""

    model: WanTransformer
    reward: RewardModel
    schedule: flow.Schedule
    timesteps: tuple[float, ...]  # at which finished samples are scored
    seed: int  # of the noise under which they are scored

    def noise(self, batch: Batch, first: int, n: int) -> Tensor:
        """What chain n of every sample of a batch starts from."""
        return fixed(self.model, batch, noise_like(batch.latent, Purpose.SAMPLE, n, first))

    def finished_reward(self, batch: Batch, latent: Tensor, purpose: Purpose, first: int) -> Tensor:
        """Mean reward [B] of finished latents, noised."""
        noise = noise_like(latent, purpose, self.seed, first)
        batch = batch._replace(latent=latent)
        return noisy_rewards(self.reward, batch, noise, self.timesteps).double().sigmoid().mean(1)


class Chains(NamedTuple):
    """All chains of some samples."""

    latent: Tensor  # [N, P, C, T, H, W]
    reward: Tensor  # [N, P]
    judged: dict[int | str, Tensor]  # by step, and by ALL: [N, P], what the choice is by


@torch.no_grad()
def explore(subject: Subject, batch: Batch, first: int, count: int, steps: Sequence[int]) -> Chains:
    """`count` chains of every sample of a batch, judged after every one of `steps`."""
    latents, rewards = [], []
    judged: dict[int | str, list[Tensor]] = {step: [] for step in sorted(steps)}
    looks = {step: best_of.judge(subject.reward, subject.schedule, batch, step) for step in judged}
    judged[ALL] = []
    rows = torch.arange(len(batch.latent))
    for n in range(count):
        way = chain.Chain(bind(subject.model, batch), subject.schedule, subject.noise(batch, first, n))
        for step, look in looks.items():
            index = torch.full_like(rows, step)
            way.advance_to(index, index)
            judged[step].append(look(way.at(index, rows).x))
        end = torch.full_like(rows, len(subject.schedule))
        way.advance_to(end, end)
        latents.append(way.at(end, rows).x)
        judged[ALL].append(subject.finished_reward(batch, latents[-1], Purpose.VALIDATION_SCORE, first))
        rewards.append(subject.finished_reward(batch, latents[-1], Purpose.DEMO_SCORE, first))
    stacked = {step: torch.stack(of).cpu() for step, of in judged.items()}
    return Chains(torch.stack(latents).cpu(), torch.stack(rewards).cpu(), stacked)


def gate(subject: Subject, batch: Batch, chains: Chains, step: int) -> None:
    """SystemExit unless best_of of the batch at `step` ends with the chains that the table picks."""
    count = len(chains.latent)
    noises = (subject.noise(batch, 0, n) for n in range(count))
    look = best_of.judge(subject.reward, subject.schedule, batch, step)
    got = best_of.best_of(bind(subject.model, batch), subject.schedule, noises, step, look)
    kept = chains.judged[step].argmax(0)
    want = chains.latent[kept, torch.arange(len(kept))]
    error = ((got.latent[0].cpu() - want).norm() / want.norm()).item()
    print(f"gate: best of {count} at step {step} keeps the same chains, error {error:.1e}", flush=True)
    limit = 0 if batch.latent.device.type == "cpu" else 1e-5
    if not torch.equal(got.kept[0].cpu(), kept) or not error <= limit:
        raise SystemExit(f"gate failed: kept {got.kept[0].tolist()}, want {kept.tolist()}, error {limit}")


def pick(values: Tensor, judged: Tensor, count: int) -> Tensor:
    """Values [P] of the best by `judged` of `count` chains, the mean over the N // count groups of the N that
    there are. values, judged: [N, P]."""
    groups = len(values) // count
    values, judged = (a[: groups * count].unflatten(0, (groups, count)) for a in (values, judged))
    return values.gather(1, judged.argmax(1, keepdim=True)).squeeze(1).mean(0)


def rows(
    judged: dict[int | str, Tensor], reward: Tensor, distance: Tensor, counts: Iterable[int], steps: int
) -> list[dict]:
    """A row of the table for N = 1, and one for every other N and place where it is judged."""
    plain = {"reward": reward.mean(0), "distance": distance.mean(0)}
    found = []
    for count in sorted({1, *counts}):
        for at, by in judged.items():
            if count == 1 and at != ALL:
                continue
            made = {"reward": pick(reward, by, count), "distance": pick(distance, by, count)}
            ours, whole = best_of.forwards(count, steps if at == ALL else at, steps)
            row = {"N": count, "judged": at, "forwards": whole if at == ALL else ours, "of_all": whole}
            for name, values in made.items():
                row[name] = values.mean().item()
                row[f"{name}_p"] = paired_p((values - plain[name]).numpy()) if count > 1 else None
            found.append(row)
    return found


def table(found: Iterable[dict]) -> Iterable[str]:
    """The lines of the rows."""
    head = "N", "judged after", "forwards", "share", "reward", "p", "distance", "p"
    widths = 3, 14, 10, 7, 8, 9, 10, 9
    yield "".join(f"{word:>{width}}" for word, width in zip(head, widths, strict=True))
    for row in found:
        p = ["-" if row[f"{k}_p"] is None else f"{row[f'{k}_p']:.1e}" for k in ("reward", "distance")]
        share = f"{row['forwards'] / row['of_all']:.2f}"
        cells = row["N"], row["judged"], row["forwards"], share, f"{row['reward']:.3f}", p[0]
        cells += f"{row['distance']:.3f}", p[1]
        yield "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def distances(folder: Path, paths: Sequence[Path]) -> Callable[[Tensor], Tensor]:
    """The distance [N, P] of the latents [N, P, C, T, H, W] of these held-out samples, as the demo has it."""
    codec = FrameCodec.load(folder / "codec.safetensors")
    metas = [(path, read_meta(path)["vae_latent_path"]) for path in paths]
    real = torch.cat([torch.from_numpy(np.load(path.parent / latent)) for path, latent in metas])
    clean = unsteadiness(codec.decode(real))

    def distance(latents: Tensor) -> Tensor:
        unsteady = torch.stack([unsteadiness(codec.decode(latent)) for latent in latents])
        return (unsteady.log() - clean.log()).abs()

    return distance


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 8], metavar="N")
    parser.add_argument("--judge-at", nargs="+", type=int, default=[2, 4, 6, 10, 14, 18], metavar="STEP")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--model", type=a_path, metavar="DIR", help="another generator, such as a checkpoint")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    config = settings(args.folder)
    r, device = config.rollout, pick_device(config)
    count = max(args.counts)
    if min(args.counts) < 1 or count < 2:
        raise SystemExit(f"--counts: got {args.counts}, want numbers from 1 on, one of them above 1")
    for step in args.judge_at:
        best_of.check_choice(count, step, r.steps)
    subject = Subject(
        load_transformer(args.model or config.model.path, torch.float32, device).eval(),
        load_reward(config.reward.path, **config.reward.pooling, dtype=torch.float32, device=device).freeze(),
        whole_schedule(r), config.eval.scored, config.eval.seed,
    )  # fmt: skip
    data = args.folder / "data"
    paths = spread(read_lists([str(data / "val_win.list")], "val_win.list"), args.prompts)
    parts: list[Chains] = []
    reader = Reader(subject.model.config, first_frame=config.data.first_frame)
    batches = counted(fixed_batches(reader, paths, BATCH, device))
    for first, batch in progress(batches, "sampling", -(-len(paths) // BATCH)):
        parts.append(explore(subject, batch, first, count, args.judge_at))
        if first == 0:
            gate(subject, batch, parts[0], args.judge_at[0])
    judged = {at: torch.cat([part.judged[at] for part in parts], 1) for at in parts[0].judged}
    reward = torch.cat([part.reward for part in parts], 1)
    for at, values in {"reward": reward, **judged}.items():
        finite(f"best of N, {at}", values.T, paths)
    distance = distances(data, paths)(torch.cat([part.latent for part in parts], 1))
    found = rows(judged, reward, distance, args.counts, r.steps)
    print("", *table(found), sep="\n")
    if args.out is not None:
        model = str(args.model or config.model.path)
        write_whole(args.out, json.dumps({"model": model, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
