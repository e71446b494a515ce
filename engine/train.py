"""PRFL training: flow matching, and the reward of a graded denoising step (a step that carries gradient)."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.build import (
    latent_dtype,
    make_frozen_reward,
    make_policy,
    pick_device,
    read_generator,
    save_generator,
)
from prfl_engine.checks import check_prfl
from prfl_engine.config import Config, LossConfig
from prfl_engine.data import Reader, read_lists
from prfl_engine.errors import UserError
from prfl_engine.guidance import guidance_of, training_guidance
from prfl_engine.loop import fit
from prfl_engine.memory.policy import of_config
from prfl_engine.memory.recompute import run_under
from prfl_engine.metrics import decimal
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.model import flops
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import plain_blocks
from prfl_engine.objectives import (
    Generator,
    Grader,
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
from prfl_engine.phases import count, mark
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
    reward: RewardModel | None,
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
            made.append(fit_memory(config, policy, reward, *given, shards))
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
    dtype = latent_dtype(c)
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
    world.stop_if_asked()
    reward = make_frozen_reward(c, policy, device, world.shard) if use_reward or c.reward.path else None
    reward = reward and world.place(reward)
    world.stop_if_asked()
    reader = Reader(
        policy.config,
        null_text=c.data.null_text,
        text_dropout=text_dropout,
        long_caption=c.data.long_caption,
        dtype=dtype,
        first_frame=c.data.first_frame,
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
        made = plan_memory(c, world, policy, reward, stream, held_out)
        run_blocks, score_blocks = run_under(made.policies), run_under(made.reward.policy)
    else:
        run_blocks = score_blocks = run_under(of_config(c.model))
    graded, meter = None, None
    if c.eval.every:
        guidance_of(c, c.eval.guidance, c.eval.guidance, policy, "eval.guidance")
    if use_reward:
        guidance = training_guidance(c, policy)
        together = world.together(policy, keep=c.rollout.cuda_graph)
        rollout = make_rollout(policy, c.rollout, schedule, device, together, guidance)
        if rollout is not None and rollout.approximate:
            sample = Batch(*(None if a is None else a[:1] for a in stream[0]))
            meter = DriftMeter(rollout, sample, steps[1], c.train.seed, c.train.save_every)
        stretches = rollout and rollout.stretches
        grader = Grader(
            policy, reward, schedule, c.chain, stretches, run_blocks, score_blocks, together, guidance
        )
        if persists:
            graded = Persistent(grader, c, meter, stream.picked, world)
        else:
            graded = Fresh(grader, c, meter, world.readers)

    def backpropagate(batch: Batch, key: int, share: float):
        at, n = (c.train.seed, key * c.data.batch_size), len(batch.latent)
        sft_due, reward_due = due(c.loss, key // c.train.accumulate)
        last, each = world.last(key, c.train.accumulate), c.optim.clip_each
        if sft_due:
            mark("flow_matching")
            count("flow_matching", batch.latent)
            sigma = levels.sigmas[integers(len(levels.sigmas), Purpose.SFT_LEVEL, *at, n)]
            noise = flow.rounded(noise_like(batch.latent, Purpose.SFT_NOISE, *at), dtype)
            loss = sft_loss(policy, batch, noise, sigma, run_blocks, levels.timestep(sigma)).mean()
            world.add_up_copies(policy, each or (last and (c.loss.split or not reward_due)))
            (share * c.loss.sft_weight * loss).backward()
            values = {"sft_loss": loss.detach()}
            del loss, noise, sigma  # they and the loss's graph would live as long as the graded steps
            yield values
        if reward_due:
            mark("rollout")
            part = 1 / c.rollout.samples
            for number, (window, extra) in enumerate(graded.windows(batch, key), 1):
                world.add_up_copies(policy, each or (last and number == c.rollout.samples))
                loss = part * reward_loss(window.logit, c.loss).mean()
                window.backward(share * loss)
                reward_now = part * torch.sigmoid(window.logit).mean()
                values = {"reward_loss": loss.detach(), "reward": reward_now} | extra
                del loss, window  # their graph holds the state before a window
                yield values

    def validate(step: int) -> dict[str, float]:
        return evaluate_policy(c, policy, reward, schedule, held_out, step, world)

    def save(folder: Path, step: int, values: dict[str, Tensor] | None = None) -> None:
        save_generator(policy, c, folder, values)

    def load(folder: Path) -> dict[str, Tensor]:
        return read_generator(policy, c, folder, device)

    scored = None if reward is None else (reward.transformer.config, reward.feature_layer)
    costs = partial(flops.costs, policy.config, rank=c.lora.rank, reward=scored)
    fit(
        c, begin, policy, [(policy, c.optim.lr)], stream, backpropagate,
        validate if c.eval.every else None, save, load, costs, graded if persists else None, world,
        c.loss.split,
    )  # fmt: skip


@torch.no_grad()
def evaluate_policy(
    config: Config,
    policy: Generator,
    reward: RewardModel | None,
    schedule: flow.Schedule,
    paths: list[Path],
    step: int,
    world: World = World(),  # noqa: B008 - frozen
) -> dict[str, float]:
    """Rewards of samples at held-out prompts and the flow-matching loss on held-out latents.

    Sample i of n has its own noise, fixed by eval.seed, and the flow-matching level (i + 0.5) / n of those
    in rollout.sigma_range, before the shift. It is noised to every one of eval.timesteps and scored there; a
    chain that ends above noise level 0 is scored where it ends instead, and its prediction of the latent is
    what is written. "score" is the mean reward over eval.scored, or where the chain ends, or minus the
    flow-matching loss where no reward is trained. Every group of processes evaluates a part of the samples;
    all get the same result. TrainingError for a number that is not finite.
    """
    e, device, dtype = config.eval, next(policy.parameters()).device, latent_dtype(config)
    levels = train_levels(config.rollout, dtype)
    paths = [paths[i % len(paths)] for i in range(e.samples)]
    samples, kept = HeldOut([paths], world), []
    guidance = guidance_of(config, e.guidance, e.guidance, policy, "eval.guidance")
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
        samples.put("sft_loss", sft_loss(policy, batch, noise, sigma, plain_blocks, t))
        noise = noise_like(batch.latent, Purpose.VALIDATION_SAMPLE, e.seed, first)
        start = fixed(policy, batch, start_of(r, schedule, batch.latent, noise))
        state = chain.rollout(chain_velocity(policy, batch, guidance), schedule, start, torch.full((n,), end))
        latent, last = (state.x, None) if ends is None else (state.m0, state.x)
        latent = fixed(policy, batch, latent)
        del state, start
        samples.put("sample", torch.linalg.vector_norm(latent.flatten(1), math.inf, 1))
        kept.extend(latent[: max(0, e.videos - len(kept))].cpu())
        if reward is None:
            continue
        if ends is not None:
            context = reward.embed_context(batch.text, batch.clip)
            t = torch.full((n,), ends, device=device)
            samples.put(f"reward_t{decimal(ends)}", reward.score(last, t, context, batch.condition))
            continue
        noise = flow.rounded(noise_like(batch.latent, Purpose.VALIDATION_SCORE, e.seed, first), dtype)
        for t in e.timesteps:
            sigma = torch.full((n,), levels.at(t, "eval.timesteps"), device=device)
            at = torch.full((n,), float(t), device=device)
            logit = noisy_reward(reward, batch._replace(latent=latent), noise, sigma, t=at)
            samples.put(f"reward_t{decimal(t)}", logit)
    found = samples.all()
    kept = samples.first(kept, e.videos)
    with world.agreed():
        if kept:
            write_samples(Path(config.train.out) / "samples" / f"step-{step}", kept, config.sample)
    values = {"sft_loss": found["sft_loss", 0].mean().item()}
    if reward is not None:
        names = [f"reward_t{decimal(t)}" for t in (e.timesteps if ends is None else scored)]
        values |= {name: found[name, 0].sigmoid().mean().item() for name in names}
    trained = reward is not None and config.loss.weight > 0
    scored = [values[f"reward_t{decimal(t)}"] for t in scored] if trained else [-values["sft_loss"]]
    return values | {"score": sum(scored) / len(scored)}
