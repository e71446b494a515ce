"""How far apart the latents of chains are that a training takes for each other.

    python benchmarks/chain_distances.py CONFIG [SECTION.FIELD=VALUE ...] [--count 32] [--scales 2 4]

CONFIG is one of `prfl train` with a generator, or both experts, for the whole chain. Its prompts and latents
are those of data.val. Before some steps of the chain three kinds of latents are compared with those of the
plain chain from the same noise:

    data       the real latent with that noise: where the low-noise expert of Wan2.2 A14B starts without the
               high-noise one (rollout.start=data), at the boundary
    other      the same with the latent of another prompt: how far apart two contents are
    guided S   the chain with guidance of scale S against data.negative_text: where an unguided graded step
               starts after a guided rollout

`latent` is the relative L2 distance. `clean` is that of the x_0 predictions there, x - sigma v, in which no
noise hides the difference. `spread` is the ratio of the predictions' standard deviations over all values: it
is 1 where only the content differs. With reward.path `reward` is the mean reward of the latents there, and
`plain` that of the plain chain's. Means over --count samples.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.build import load_generator, make_frozen_reward, pick_device
from prfl_engine.config import Config, load_config
from prfl_engine.data import Reader, counted, fixed_batches, read_lists
from prfl_engine.guidance import guidance_of
from prfl_engine.objectives import chain_velocity, fixed, whole_schedule
from prfl_engine.seeds import Purpose, noise_like


class Distance(NamedTuple):
    """Of one kind of latents from the plain chain's before one step, for one batch; all [B]."""

    latent: Tensor
    clean: Tensor
    spread: Tensor
    reward: Tensor | None
    plain: Tensor | None


def steps_of(schedule: flow.Schedule, boundary: float | None) -> list[int]:
    """Steps a quarter of the chain apart, and the first below a boundary."""
    n = len(schedule)
    found = {n // 4, n // 2, 3 * n // 4}
    if boundary is not None:
        found.add(int((schedule.timesteps >= flow.TRAIN_STEPS * boundary).sum()))
    return sorted(i for i in found if 0 < i < n)


def relative(a: Tensor, b: Tensor) -> Tensor:
    """Relative L2 distance [B] of a from b."""
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


@torch.no_grad()
def distances(
    config: Config, count: int, guidance: Sequence[float]
) -> Iterator[tuple[int, float, str, Distance]]:
    """(step, timestep, kind, distance) of every batch."""
    device, e, r = pick_device(config), config.eval, config.rollout
    model = load_generator(config, device)
    reward = None if config.reward.path is None else make_frozen_reward(config, model, device)
    schedule = whole_schedule(r)
    guides = {f"guided {s:g}": guidance_of(config, s, s, model, "--scales") for s in guidance}
    paths = read_lists(config.data.val, "data.val")
    paths = [paths[i * len(paths) // count] for i in range(count)]
    reader = Reader(model.config, first_frame=config.data.first_frame)
    for first, batch in counted(fixed_batches(reader, paths, e.batch_size, device)):
        noise = fixed(model, batch, noise_like(batch.latent, Purpose.VALIDATION_SAMPLE, e.seed, first))
        plain = chain_velocity(model, batch, None)
        ways = {name: chain_velocity(model, batch, guide) for name, guide in guides.items()}
        states = {name: flow.init_state(noise) for name in ("plain", *ways)}
        ahead = 0
        for step in steps_of(schedule, config.model.boundary):
            for i in range(ahead, step):
                index, everyone = torch.full((len(noise),), i), torch.arange(len(noise))
                for name, state in states.items():
                    velocity = ways.get(name, plain)
                    states[name] = chain.advance(velocity, schedule, state, index, everyone)
            ahead, at = step, {name: state.x for name, state in states.items()}
            sigma = schedule.sigmas[step].expand(len(noise))
            at["data"] = flow.add_noise(batch.latent, noise, sigma)
            at["other"] = flow.add_noise(batch.latent.roll(1, 0), noise, sigma)
            t = schedule.timesteps[step]
            yield from ((step, t.item(), *found) for found in _compared(at, plain, reward, batch, sigma, t))


def _compared(at, plain, reward, batch: Batch, sigma: Tensor, t: Tensor) -> Iterator[tuple[str, Distance]]:
    everyone, times = torch.arange(len(sigma)), t.expand(len(sigma))
    level = sigma.view(-1, 1, 1, 1, 1).to(batch.latent)
    clean = {k: x - level * plain(x, times, everyone) for k, x in at.items()}
    rewards = dict.fromkeys(at)
    if reward is not None:
        context = reward.embed_context(batch.text, batch.clip)
        on = times.to(level.device)
        rewards = {k: reward.score(x, on, context, batch.condition).sigmoid() for k, x in at.items()}
    spread = clean["plain"].std().expand(len(sigma))
    for name, x in at.items():
        if name != "plain":
            yield name, Distance(
                relative(x, at["plain"]), relative(clean[name], clean["plain"]),
                clean[name].std() / spread, rewards[name], rewards["plain"],
            )  # fmt: skip


def table(found: Iterator[tuple[int, float, str, Distance]]) -> list[str]:
    """A line for every step and kind."""
    kept: dict[tuple[int, float, str], list[Distance]] = {}
    for step, t, kind, distance in found:
        kept.setdefault((step, t, kind), []).append(distance)
    lines = ["step     t  kind" + " " * 8 + " ".join(f"{name:>7}" for name in Distance._fields)]
    for (step, t, kind), parts in sorted(kept.items()):
        columns = [None if c[0] is None else torch.cat(c).mean().item() for c in zip(*parts, strict=True)]
        numbers = " ".join(f"{'-' if c is None else f'{c:.3f}':>7}" for c in columns)
        lines.append(f"{step:4} {t:5.0f}  {kind:12} {numbers}")
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--scales", type=float, nargs="*", default=[])
    args, rest = parser.parse_known_args()
    config = load_config(args.config, [*args.overrides, *rest])
    print("\n".join(table(distances(config, args.count, args.scales))))


if __name__ == "__main__":
    main()
