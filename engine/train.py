"""PRFL training: flow matching, and the reward of a graded denoising step (a step that carries gradient)."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.build import (
    make_anchor,
    make_frozen_reward,
    make_more_rewards,
    make_policy,
    pick_device,
    read_generator,
    save_generator,
)
from prfl_engine.checks import check_prfl, unused
from prfl_engine.config import Config, LossConfig
from prfl_engine.data import Kept, Reader, read_lists
from prfl_engine.errors import UserError, check
from prfl_engine.guidance import Guidance, guidance_of, training_guidance
from prfl_engine.loop import fit
from prfl_engine.memory.policy import of_config
from prfl_engine.memory.recompute import run_under
from prfl_engine.metrics import decimal, note
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.model import flops, lora
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.start import Start
from prfl_engine.model.wan import plain_blocks
from prfl_engine.objectives import (
    Generator,
    Grader,
    anchored_sft_loss,
    chain_velocity,
    fixed,
    index_range,
    noisy_reward,
    reward_loss,
    schedule_of,
    sft_loss,
    start_of,
    steps_inside,
    train_levels,
)
from prfl_engine.parallel import World, check_config, started
from prfl_engine.phases import Shape, count, mark
from prfl_engine.planner.fit_memory import fit_memory
from prfl_engine.planner.plan import Plan
from prfl_engine.planner.sharded import Shards
from prfl_engine.resume import prepare_out
from prfl_engine.rollout.accelerated import make_rollout
from prfl_engine.rollout.drift import DriftMeter
from prfl_engine.rollout.fresh import Fresh
from prfl_engine.rollout.persistent import Persistent
from prfl_engine.sample import write_samples
from prfl_engine.seeds import Purpose, integers, noise_like
from prfl_engine.together import asked
from prfl_engine.validation import HeldOut


def due(loss: LossConfig, step: int) -> tuple[bool, bool]:
    """(flow matching?, reward?) in optimizer step `step`, counted from 0."""
    if loss.alternate:
        return step % 2 == 0, step % 2 == 1
    return loss.sft_weight > 0 and step % loss.sft_every == 0, loss.weight > 0


def plan_memory(
    config: Config,
    world: World,
    policy: Generator,
    rewards: Sequence[RewardModel],
    stream: MicroBatches,
    held_out: list[Path],
) -> Plan:
    """The plan of auto:GB, which the first process makes for all and prints."""
    with world.agreed():
        latents, made = stream.latents(), []

    def make() -> None:
        if world.leads:
            shapes = latents, [stream.reader.shape(path) for path in held_out]
            given = ([shape[1:] for shape in some] for some in shapes)
            reduce = world.reduce_dtype and world.reduce_dtype.itemsize
            shards = Shards(world.size, world.copies, world.sequence, world.resident, reduce)
            made.append(fit_memory(config, policy, rewards, *given, shards))
            print(made[0], flush=True)

    world.patiently(make)
    return world.all(made)[0][0]


def train(config: Config) -> None:
    """Run PRFL as the configuration says; results go to config.train.out. Under torchrun on all processes."""
    device = pick_device(config)
    with started(config, device) as world:
        check_config(config, world)
        _train(config, device, world)


def _train(config: Config, device: torch.device, world: World) -> None:
    c = config
    use_reward = c.loss.weight > 0
    persists = use_reward and c.rollout.mode == "persistent"
    text_dropout = c.data.dropout(0.1)
    check_prfl(c)
    dtype = flow.latent_dtype(c)
    schedule, levels = schedule_of(c.rollout, dtype), train_levels(c.rollout, dtype)
    steps = index_range(c.rollout) if use_reward else None
    if c.loss.weight > 0 or c.reward.path is not None:
        for t in c.eval.timesteps if c.eval.every else ():
            levels.at(t, "eval.timesteps")
    paths = read_lists(c.data.train, "data.train")
    held_out = read_lists(c.data.val, "data.val") if c.eval.every else []
    begin = prepare_out(c, {"data.train": paths})
    resume = begin.checkpoint
    world.check_checkpoint(resume)
    world.stop_if_asked()
    policy = world.place(make_policy(c, resume, device, world.shard))
    if c.rollout.lora is not None:
        with world.agreed():
            lora.lend(policy, c.rollout.lora)
    world.stop_if_asked()
    reward = make_frozen_reward(c, policy, device, world.shard) if use_reward or c.reward.path else None
    reward = reward and world.place(reward)
    more = tuple(world.place(other) for other in make_more_rewards(c, policy, device, world.shard))
    anchor = make_anchor(c, policy, device, world)
    world.stop_if_asked()
    reader = Reader(
        policy.config,
        null_text=c.data.null_text,
        text_dropout=text_dropout,
        long_caption=c.data.long_caption,
        dtype=dtype,
        first_frame=c.data.first_frame,
        kept=Kept(1e9 * c.data.keep_gb),
    )
    broken = {"skip": c.data.skip_broken, "agree": world.union}
    with world.agreed():
        stream = MicroBatches(reader, paths, c.data.batch_size, c.train.seed, **broken)
    if persists and len(stream.shapes) > 1:
        want = "one with rollout.mode persistent and data.batch_size > 1"
        raise UserError(f"data.train: got latents of {len(stream.shapes)} shapes, want {want}")
    if persists and world.readers > 1 and not stream.full:
        size = c.data.batch_size
        want = f"a multiple of data.batch_size = {size}, for chains that persist in several processes"
        raise UserError(f"data.train: got {len(paths)} samples, want {want}")
    if c.model.budget is not None:
        made = plan_memory(c, world, policy, [reward, *more] if reward else [], stream, held_out)
        run_blocks, score_blocks = run_under(made.policies), run_under(made.reward.policy)
    else:
        run_blocks = score_blocks = run_under(of_config(c.model))
    graded, meter = None, None
    eval_guidance, origin = None, None
    if c.eval.every:
        if c.loss.start_there(c.lora.rank):
            origin = Start(policy) if anchor is None else anchor.start
        eval_guidance = guidance_of(c, c.eval.guidance, c.eval.guidance, policy, "eval.guidance")
        if c.model.boundary is None:
            given, want = list(c.rollout.sigma_range), "one with a step of the chain, for validation"
            check(steps_inside(c.rollout)[1] > 0, "rollout.sigma_range", given, want)
    if use_reward:
        guidance = training_guidance(c, policy, asked(c, world.readers).apart)
        together = world.together(policy, keep=c.rollout.cuda_graph)
        rollout = make_rollout(policy, c.rollout, schedule, device, together, guidance)
        if rollout is not None and rollout.approximate:
            sample = Batch(*(None if a is None else a[:1] for a in stream[0]))
            meter = DriftMeter(rollout, sample, steps[1], c.train.seed, c.train.save_every)
        stretches = rollout and rollout.stretches
        grader = Grader(
            policy, reward, schedule, c.chain, stretches, run_blocks, score_blocks, together, guidance, more,
            c.reward.draws,
        )  # fmt: skip
        if persists:
            graded = Persistent(grader, c, meter, stream.picked, world, anchor)
        else:
            graded = Fresh(grader, c, meter, world.readers, anchor)

    names = ["", *(f"{other.name}_" for other in c.reward.more)]
    rewards = {} if reward is None else dict(zip(names, (reward, *more), strict=True))

    def of_rewards(logits: list[Tensor], part: float) -> tuple[Tensor | float, dict[str, Tensor]]:
        loss, values = 0.0, {}
        for name, form, own in zip(names, (c.loss, *c.reward.more), logits, strict=True):
            one = part * reward_loss(own, form).mean()
            loss = loss + one
            values[f"{name}reward_loss"] = one.detach()
            values[f"{name}reward"] = part * torch.sigmoid(own.detach()).mean()
        return loss, values

    def leashed(loss: Tensor, apart: Tensor | None, share: float) -> Tensor:
        return loss if apart is None or not c.loss.anchor else loss + share * c.loss.anchor * apart

    def backpropagate(batch: Batch, key: int, share: float):
        at, n = (c.train.seed, key * c.data.batch_size), len(batch.latent)
        sft_due, reward_due = due(c.loss, key // c.train.accumulate)
        last, each = world.last(key, c.train.accumulate), c.optim.clip_each
        if sft_due:
            mark("flow_matching")
            count("flow_matching", batch.latent)
            sigma = levels.sigmas[integers(len(levels.sigmas), Purpose.SFT_LEVEL, *at, n)]
            noise = flow.rounded(noise_like(batch.latent, Purpose.SFT_NOISE, *at), dtype)
            given = batch, noise, sigma, run_blocks, levels.timestep(sigma)
            apart, start = None, anchor and anchor.at(key // c.train.accumulate)
            if start is None:
                loss = sft_loss(policy, *given).mean()
            else:
                count("rollout", batch.latent)
                loss, apart = (a.mean() for a in anchored_sft_loss(policy, start, *given))
            world.add_up_copies(policy, each or (last and (c.loss.split or not reward_due)))
            leashed(share * c.loss.sft_weight * loss, apart, share).backward()
            values = {"sft_loss": loss.detach()} | ({} if apart is None else {"sft_anchor": apart.detach()})
            # They and the loss's graph would live as long as the graded steps.
            del loss, apart, given, noise, sigma
            yield values
        if reward_due:
            mark("rollout")
            part = 1 / c.rollout.samples
            for number, (window, extra) in enumerate(graded.windows(batch, key), 1):
                world.add_up_copies(policy, each or (last and number == c.rollout.samples))
                loss, values = of_rewards(window.logits, part)
                apart = None if window.distance is None else part * window.distance.mean()
                window.backward(leashed(share * loss, apart, share))
                values |= extra | ({} if apart is None else {"anchor": apart.detach()})
                del loss, apart, window  # their graph holds the state before a window
                yield values

    def validate(step: int) -> dict[str, float]:
        return evaluate_policy(c, policy, rewards, schedule, held_out, step, world, eval_guidance, origin)

    def save(folder: Path, step: int, values: dict[str, Tensor] | None = None) -> None:
        save_generator(policy, c, folder, values)

    def load(folder: Path) -> dict[str, Tensor]:
        return read_generator(policy, c, folder, device)

    def costs(shape: Shape) -> flops.Costs:
        scored = [(made.transformer.config, made.feature_layer) for made in rewards.values()] or [None]
        found, *others = (flops.costs(policy.config, shape, c.lora.rank, own) for own in scored)
        if reward is not None:
            for name in ("reward", "judged"):
                found.flops[name] += sum(other.flops[name] for other in others)
            found.flops["reward"] *= c.reward.draws
        return found

    for line in unused(c) if world.leads else []:
        note(line)
    fit(
        c, begin, policy, [(policy, c.optim.lr)], stream, backpropagate,
        validate if c.eval.every else None, save, load, costs, graded if persists else None, world,
        c.loss.split,
    )  # fmt: skip


@torch.no_grad()
def evaluate_policy(
    config: Config,
    policy: Generator,
    rewards: dict[str, RewardModel],
    schedule: flow.Schedule,
    paths: list[Path],
    step: int,
    world: World = World(),  # noqa: B008 - frozen
    guidance: Guidance | None = None,
    origin: Start | None = None,
) -> dict[str, float]:
    """Rewards of samples at held-out prompts and the flow-matching loss on held-out latents, with the
    distance of its velocities to those of `origin`. rewards: by what the names of their metrics begin with.

    Sample i of n has its own noise, fixed by eval.seed, and the flow-matching level (i + 0.5) / n of those
    in rollout.sigma_range, before the shift. It is noised to every one of eval.timesteps and scored there; a
    chain that ends above noise level 0 is scored where it ends instead, and its prediction of the latent is
    what is written. "score" is the mean reward over eval.scored, or where the chain ends (of several rewards
    their mean by their weights), or minus the flow-matching loss where no reward is trained. Every group of
    processes evaluates a part of the samples; all get the same result. TrainingError for a number that is not
    finite.
    """
    e, device, dtype = config.eval, next(policy.parameters()).device, flow.latent_dtype(config)
    levels = train_levels(config.rollout, dtype)
    paths = [paths[i % len(paths)] for i in range(e.samples)]
    samples, kept = HeldOut([paths], world), []
    r, end = config.rollout, steps_inside(config.rollout)[1]
    if config.model.boundary is not None:  # both experts make whole chains, wherever they are trained
        r = replace(r, sigma_range=(0.0, 1.0), start="noise")
        schedule, end = schedule_of(r, dtype), r.steps
    ends = None if end == len(schedule) else schedule.timesteps[end].item()
    scored = e.scored if ends is None else (ends,)
    low, high = (flow.unshift_sigma(s, r.shift) for s in config.rollout.sigma_range)
    reader = Reader(policy.config, dtype=dtype, first_frame=config.data.first_frame)
    for first, (batch,) in samples.batches(reader, e.batch_size, device):
        n = len(batch.latent)
        noise = noise_like(batch.latent, Purpose.VALIDATION_SFT, e.seed, first)
        level = low + (high - low) * (torch.arange(first, first + n) + 0.5) / len(paths)
        sigma = flow.shift_sigma(level, r.shift)
        noise = flow.rounded(noise, dtype)
        t = levels.timestep(sigma)
        if origin is None:
            samples.put("sft_loss", sft_loss(policy, batch, noise, sigma, plain_blocks, t))
        else:
            losses = anchored_sft_loss(policy, origin, batch, noise, sigma, plain_blocks, t)
            for name, values in zip(("sft_loss", "sft_anchor"), losses, strict=True):
                samples.put(name, values)
        noise = noise_like(batch.latent, Purpose.VALIDATION_SAMPLE, e.seed, first)
        start = fixed(policy, batch, start_of(r, schedule, batch.latent, noise))
        with lora.lent(policy) if e.rollout_lora else nullcontext():
            velocity = chain_velocity(policy, batch, guidance)
            state = chain.rollout(velocity, schedule, start, torch.full((n,), end))
        del velocity
        latent, last = (state.x, None) if ends is None else (state.m0, state.x)
        latent = fixed(policy, batch, latent)
        del state, start
        samples.put("sample", torch.linalg.vector_norm(latent.flatten(1), math.inf, 1))
        kept.extend(latent[: max(0, e.videos - len(kept))].cpu())
        if not rewards:
            continue
        if ends is not None:
            t = torch.full((n,), ends, device=device)
            for name, reward in rewards.items():
                logit = reward(last, t, batch.text, batch.clip, batch.condition)
                samples.put(f"{name}reward_t{decimal(ends)}", logit)
            continue
        noise = flow.rounded(noise_like(batch.latent, Purpose.VALIDATION_SCORE, e.seed, first), dtype)
        for t in e.timesteps:
            sigma = torch.full((n,), levels.at(t, "eval.timesteps"), device=device)
            at = torch.full((n,), float(t), device=device)
            for name, reward in rewards.items():
                logit = noisy_reward(reward, batch._replace(latent=latent), noise, sigma, t=at)
                samples.put(f"{name}reward_t{decimal(t)}", logit)
    found = samples.all()
    kept = samples.first(kept, e.videos)
    with world.agreed():
        if kept:
            write_samples(Path(config.train.out) / "samples" / f"step-{step}", kept, config.sample)
    values = {k: found[k, 0].mean().item() for k in ("sft_loss", "sft_anchor") if (k, 0) in found}
    for name in rewards:
        shown = [f"{name}reward_t{decimal(t)}" for t in (e.timesteps if ends is None else scored)]
        values |= {key: found[key, 0].sigmoid().mean().item() for key in shown}
    if not rewards or config.loss.weight == 0:
        return values | {"score": -values["sft_loss"]}
    means = [sum(values[f"{name}reward_t{decimal(t)}"] for t in scored) / len(scored) for name in rewards]
    weights = [config.loss.weight, *(more.weight for more in config.reward.more)]
    mean = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    return values | {"score": mean if len(means) > 1 else means[0]}
