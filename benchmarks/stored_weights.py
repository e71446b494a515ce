"""How far frozen weights in e4m3 (lora.base, reward.weights) take a trained generator and reward model.

    python benchmarks/stored_weights.py CONFIG [SECTION.FIELD=VALUE ...] [--count 32] [--batch 8]

CONFIG is one of `prfl train`. The matrices of the blocks of both are stored in e4m3, and for comparison
rounded to bfloat16; all else, products included, is as CONFIG says. Chains are plain ones, with one reward at
one noise level: other settings are refused. Held-out samples of data.val, all in the same noise:

    velocity    of the noised latents at eval.timesteps: relative L2 distance from that by the weights as they
                are
    reward      of the noised latents there, in [0, 1]: absolute difference
    turned      share of all pairs of samples that the rewards order otherwise
    rollout     latents of the chain from noise, before some steps and at its end: relative L2 distance
    its reward  mean over eval.timesteps below 1000 of the reward of the end, by the reward model as it is
    gradient    of the reward loss, of graded steps all over rollout.range, in new low-rank updates (B of rank
                8): relative L2 distance and cosine

Means over samples, and the largest. The gate comes first: what stored models compute is what models compute
that have the values of the formula on paper, and no value is further from its own than half a step of e4m3.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prfl_bench.chain_distances import relative, steps_of
from prfl_bench.timing import machine
from prfl_engine import chain, flow
from prfl_engine.build import load_generator, make_frozen_reward, pick_device
from prfl_engine.config import Config, LoraConfig, load_config
from prfl_engine.config_method import scales
from prfl_engine.data import Reader, counted, fixed_batches, read_lists
from prfl_engine.errors import UserError, check
from prfl_engine.model import lora
from prfl_engine.model.layers import Linear
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import (
    bind,
    fixed,
    graded_windows,
    index_range,
    noisy_rewards,
    reward_loss,
    whole_schedule,
)
from prfl_engine.seeds import Purpose, noise_like

LIMIT = 1e-6  # of the gate
Models = tuple[WanTransformer, RewardModel]
Rounding = Callable[[Tensor], Tensor]


def check_plain(config: Config) -> None:
    """UserError for settings of chains and rewards that are not read here."""
    r, want = config.rollout, "in stored_weights"
    config.reward.check_one(want)
    check(config.model.boundary is None, "model.boundary", config.model.boundary, f"null {want}")
    check(r.lora is None, "rollout.lora", r.lora, f"null {want}")
    check(r.precision == "same", "rollout.precision", r.precision, f"same {want}")
    check(r.cache == 0, "rollout.cache", r.cache, f"0 {want}")
    for name in ("rollout", "chain", "eval"):
        scale = getattr(config, name).guidance
        check(scales(scale) == (1, 1), f"{name}.guidance", scale, f"1 {want}")


def on_paper(weight: Tensor) -> Tensor:
    """A weight [N, K] with every row over its largest value / 448 to the nearest e4m3, and back."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).double()
    return ((weight / scale).float().to(torch.float8_e4m3fn).double() * scale).to(weight.dtype)


def in_bfloat16(weight: Tensor) -> Tensor:
    """A weight rounded to bfloat16."""
    return weight.bfloat16().to(weight.dtype)


def matrices(model: WanTransformer) -> list[Tensor]:
    """The matrices that are stored apart."""
    return [m.weight for block in model.blocks for m in block.modules() if isinstance(m, Linear)]


def models(config: Config, stored: bool = False, rounding: Rounding | None = None) -> Models:
    """Generator and reward model with their matrices in e4m3, or rounded in place, or as they are."""
    how, device = "e4m3" if stored else "same", pick_device(config)
    c = replace(config, lora=replace(config.lora, base=how), reward=replace(config.reward, weights=how))
    generator = load_generator(c, device)
    found = generator, make_frozen_reward(c, generator, device)
    if rounding is not None:
        for p in matrices(found[0]) + matrices(found[1].transformer):
            p.data = rounding(p.data)
    return found


@torch.no_grad()
def made(config: Config, given: Models, paths: list, size: int, plain: RewardModel) -> dict[str, Tensor]:
    """What the models make of samples [n, ...]; plain: the reward model that scores the ends of chains."""
    (generator, reward), e, found = given, config.eval, {}
    schedule, device = whole_schedule(config.rollout), pick_device(config)

    def put(name: str, values: Tensor) -> None:
        found.setdefault(name, []).append(values.cpu())

    reader = Reader(generator.config, first_frame=config.data.first_frame)
    for first, batch in counted(fixed_batches(reader, paths, size, device)):
        noise = noise_like(batch.latent, Purpose.VALIDATION_SCORE, e.seed, first)
        velocity, rows = bind(generator, batch), torch.arange(len(noise))
        for t in e.timesteps:
            at = torch.full((len(noise),), float(t))
            x = flow.add_noise(batch.latent, noise, at / flow.TRAIN_STEPS)
            put(f"velocity, t = {t:g}", velocity(x, at.to(device), rows))
        for t, logit in zip(e.timesteps, noisy_rewards(reward, batch, noise, e.timesteps).T, strict=True):
            put(f"reward, t = {t:g}", logit.sigmoid())
        way = chain.Chain(velocity, schedule, fixed(generator, batch, noise))
        for step in (*steps_of(schedule, None), len(schedule)):
            index = torch.full((len(noise),), step)
            way.advance_to(index, index)
            x = way.at(index, rows).x
            put("rollout, end" if step == len(schedule) else f"rollout, before step {step}", x)
        ends = noisy_rewards(plain, batch._replace(latent=x), noise, e.scored).sigmoid().mean(1)
        put("its reward", ends)
    return {name: torch.cat(parts) for name, parts in found.items()}


def gradient(config: Config, given: Models, paths: list) -> Tensor:
    """That of the reward loss in all B of new updates, of one batch of rollouts, flat, on the CPU."""
    (generator, reward), r, device = given, config.rollout, pick_device(config)
    lora.attach(generator, LoraConfig(rank=8))
    reader = Reader(generator.config, first_frame=config.data.first_frame)
    batch = next(fixed_batches(reader, paths, len(paths), device))
    noise = noise_like(batch.latent, Purpose.ROLLOUT_NOISE, config.eval.seed, 0)
    noise = fixed(generator, batch, noise)
    index = torch.linspace(*index_range(r), len(paths)).round().long()[None]
    for window in graded_windows(generator, reward, whole_schedule(r), batch, noise, index, config.chain):
        window.backward(reward_loss(window.logit, config.loss).mean())
    found = lora.parameters(generator).items()
    return torch.cat([p.grad.flatten().cpu() for name, p in found if name.endswith("lora_B")])


def gate(config: Config, paths: list, size: int) -> None:
    """Stop unless stored weights are what the formula on paper says."""
    own, paper = models(config), models(config, rounding=on_paper)
    for a, b in zip(*(matrices(g) + matrices(r.transformer) for g, r in (own, paper)), strict=True):
        step = (a.abs() * 2.0**-4).maximum(a.abs().amax(1, keepdim=True) / 448 * 2.0**-10)
        if not ((a - b).abs() <= step * 1.0001).all():
            raise SystemExit("gate failed: a value is further away than half a step of e4m3")
    stored = models(config, stored=True)
    want, got = (made(config, some, paths[:size], size, own[1]) for some in (paper, stored))
    error = max(((got[k] - a).norm() / a.norm()).item() for k, a in want.items())
    print(f"gate: stored weights are those of the formula within {error:.1e}", flush=True)
    if not error <= LIMIT:
        raise SystemExit(f"gate failed, want {LIMIT}")


def turned(a: Tensor, b: Tensor) -> float:
    """The share of pairs that scores a [n] and b [n] order otherwise."""
    first, second = torch.triu_indices(len(a), len(a), 1)
    return ((a[first] - a[second]) * (b[first] - b[second]) < 0).double().mean().item()


def table(want: dict[str, Tensor], kinds: dict[str, dict[str, Tensor]]) -> Iterator[str]:
    """A line for each quantity: of every kind the mean and the largest."""
    yield f"{'':26}" + "".join(f"{name + ', mean':>18}{'largest':>10}" for name in kinds)
    for name, plain in want.items():
        cells = ""
        for found in kinds.values():
            apart = (found[name] - plain).abs() if plain.dim() == 1 else relative(found[name], plain)
            cells += f"{apart.mean().item():18.5f}{apart.max().item():10.5f}"
        yield f"{name:26}{cells}"
        if name.startswith("reward"):
            shares = "".join(f"{turned(found[name], plain):18.5f}{'':10}" for found in kinds.values())
            yield f"{'  turned, of spread ' + f'{plain.std().item():.3f}':26}{shares}"
    means = ", ".join(f"{k} {v['its reward'].mean():.4f}" for k, v in {"as it is": want, **kinds}.items())
    yield f"mean of its reward: {means}"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        check_plain(config)
        paths = read_lists(config.data.val, "data.val")
        want = f"2 to {len(paths)}, the number of samples in data.val"
        check(2 <= args.count <= len(paths), "--count", args.count, want)
        check(args.batch >= 1, "--batch", args.batch, "a whole number from 1 on")
    except UserError as error:
        parser.error(str(error))
    paths = [paths[i * len(paths) // args.count] for i in range(args.count)]
    gate(config, paths, args.batch)
    own = models(config)
    want = made(config, own, paths, args.batch, own[1])
    kinds = {"bfloat16": models(config, rounding=in_bfloat16), "e4m3": models(config, stored=True)}
    found = {name: made(config, some, paths, args.batch, own[1]) for name, some in kinds.items()}
    print(machine(pick_device(config).type), *table(want, found), sep="\n")
    plain = gradient(config, own, paths[: args.batch])
    for name, some in kinds.items():
        got = gradient(config, some, paths[: args.batch])
        far, cosine = (got - plain).norm() / plain.norm(), got @ plain / got.norm() / plain.norm()
        print(f"gradient, {name}: {far:.4f}, cosine {cosine:.5f}")


if __name__ == "__main__":
    main()
