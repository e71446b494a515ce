"""Dry runs: the bytes of a training step and of a validation at full size, from tensors on the meta device.
They need no GPU and compute nothing.

The real losses, denoising chain and reward model run on a model's first blocks, and the counter of live bytes
is read before every block and after the last. Integer tensors are real in a dry run, because they decide
which steps a chain makes. The kernels allocate what the compiled CPU kernels do. The Triton kernels allocate
the same, except for partial sums; and a weight gradient in 16 bits is rounded in an extra step on the CPU, so
CUDA uses up to six bytes a value of one weight less. What attention libraries allocate inside is not counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from prfl_engine import chain
from prfl_engine.config_method import scales
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.memory.recompute import run_under
from prfl_engine.model import lora
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.start import Start
from prfl_engine.model.wan import RunBlocks, WanTransformer
from prfl_engine.objectives import (
    Grader,
    Grading,
    anchored_sft_loss,
    bind,
    chain_velocity,
    index_range,
    noisy_reward,
)
from prfl_engine.optim.optimizer import set_grad_dtype
from prfl_engine.planner import fsdp
from prfl_engine.planner.chain_bytes import FULL_HISTORY, chains, farthest, held, longest, schedule
from prfl_engine.planner.halves import OTHER, apart, both
from prfl_engine.planner.meta import meta_tensors
from prfl_engine.planner.models import (
    batch_of,
    counter,
    generator,
    guidance_of,
    inputs,
    reward_model,
    start_of,
    trained,
)
from prfl_engine.planner.numbers import BLOCKS, Laps, Numbers, numbers_of
from prfl_engine.planner.repeated import Repeated, ballast
from prfl_engine.planner.setup import ROUND, Setup, Sharding
from prfl_engine.planner.updates import arrival_bytes
from prfl_engine.rollout.choice import judged_step, ranks
from prfl_kernels.sublayers.products import LowRank

SCALARS = 32 * ROUND  # losses, metrics and tables of angles
REWARD_TRAINING = "reward training"


@contextmanager
def _passes(
    pool: int, names: list[str], *models: torch.nn.Module | None
) -> Iterator[tuple[dict[str, Laps], Callable]]:
    """({name: its laps}, the watch of `run_under`) for the passes of the generator with gradient in this
    block, in their order. Counted is what comes in addition to the parameters of models, their gradients and
    `pool` bytes."""
    live = counter(*models)
    found, ahead, base = {}, iter(names), live.now - SCALARS - pool

    def begin() -> Callable[[Tensor], None]:
        laps = found[next(ahead)] = Laps(live, base, partial(fsdp.gathered, *models))
        return laps.border

    with live:
        yield found, begin
    # Around the second of two halves there is what blocks of the first have saved.
    around = [laps for name, laps in found.items() if OTHER.get(name) not in found]
    before = max(laps.forward[0] for laps in around) - base
    # The embedding of time has its backward before the first block's input has its gradient, if it has one.
    whole = (laps for laps in around if len(laps.backward) == len(laps.forward))
    after = max([live.lap(), *(laps.backward[-1] for laps in whole)]) - base
    for laps in found.values():
        laps.before, laps.after, laps.peak = before, after, live.peak - base


def counted(setup: Setup, policy: BlockPolicy) -> dict[str, Numbers]:
    """What blocks under a policy have in every pass, from a dry run that is made once for all setups with the
    same. The result is kept: it must not be changed."""
    return _counted(replace(setup, validation=None, drawn=0, pool_host=0), policy)


@cache
def _counted(setup: Setup, policy: BlockPolicy) -> dict[str, Numbers]:
    laps = dry_run(setup, [policy] * BLOCKS, policy)
    made = both({phase: numbers_of(found, policy) for phase, found in laps.items()}, setup)
    return made | {phase: _with_a_frame(made[phase], setup) for phase in setup.beside if phase in made}


def _with_a_frame(n: Numbers, setup: Setup) -> Numbers:
    """The numbers of a block where the other expert's saves the same of one frame of a sample."""
    frames = setup.latent[0] * setup.latent[2]
    return n._replace(
        saved=n.saved + n.saved // frames, saved_last=n.saved_last + n.saved_last // frames,
        host=n.host + n.host // frames,
    )  # fmt: skip


def dry_run(setup: Setup, policies: list[BlockPolicy], reward_policy: BlockPolicy) -> dict[str, Laps]:
    """The bytes of every pass with gradient through a generator of len(policies) blocks, by its name, in
    addition to weights and gradients. Of a window two steps are made and of several graded steps two; what
    longer ones hold of the chain is allocated in addition."""
    found: dict[str, Laps] = {}
    if setup.trains is not None:
        return _reward_training(setup, policies)
    with meta_tensors():
        model, scored = generator(setup, len(policies)), setup.rewards if setup.reward_blocks else ()
        rewards = [reward_model(setup, r.blocks, r) for r in scored]
        start = start_of(setup, model, len(policies))
        there = model, start and start.model, *rewards
    begin_gradients(setup, model)
    with meta_tensors():
        if setup.sft:
            with _passes(setup.pool, ["flow matching"], *there) as (laps, watch):
                given = inputs(setup, setup.latent)
                losses = anchored_sft_loss(model, start, *given, run_under(policies, watch))
                sum(loss.mean() for loss in losses if loss is not None).backward()
                del given, losses
            found |= laps
        for p in model.parameters() if setup.alone else ():
            p.grad = None
        fsdp.drop_gradients(model)
        if rewards:
            found |= _graded(setup, model, rewards, start, policies, run_under(reward_policy))
    return found


def _reward_training(setup: Setup, policies: list[BlockPolicy]) -> dict[str, Laps]:
    """The pass of reward training, of one sample or of one of a pair."""
    with meta_tensors():
        model = trained(setup, len(policies))
    begin_gradients(setup, model)
    with meta_tensors(), _passes(0, [REWARD_TRAINING], model) as (laps, watch):
        batch, noise, sigma = inputs(setup, setup.latent)
        extra = [batch_of(setup, setup.latent) for _ in range(setup.sides - 1)]
        noisy_reward(model, batch, noise, sigma, run_under(policies, watch)).sum().backward()
        del extra
    return laps


def pair_bytes(setup: Setup, policies: list[BlockPolicy]) -> tuple[int, int]:
    """(most bytes of the pass of a pair, what the winner's forward has saved of them). The loser's backward
    comes first; autograd holds its gradients until it has added the winner's to them."""
    with meta_tensors():
        model, run = trained(setup, len(policies)), run_under(policies)
    begin_gradients(setup, model)
    with meta_tensors():
        live = counter(model)
        base = live.now - SCALARS
        with live:
            winner, noise, sigma = inputs(setup, setup.latent)
            loser, before = batch_of(setup, setup.latent), live.now
            logit = noisy_reward(model, winner, noise, sigma, run)
            saved = live.now - before
            (logit - noisy_reward(model, loser, noise, sigma, run)).sum().backward()
    return live.peak - base, saved


def begin_gradients(setup: Setup, model: torch.nn.Module) -> None:
    """Gradients on the meta device as they are before a pass, and what becomes of those that arrive in it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if setup.grad_dtype is not None:
        set_grad_dtype(trained, setup.grad_dtype)
    for p in trained:
        if not setup.alone and setup.sharding.ranks == 1:
            p.grad = torch.zeros_like(p, dtype=setup.grad_dtype)
        if setup.arriving is not None:
            size = arrival_bytes(p.numel(), p.dtype, setup.arriving)
            p.register_post_accumulate_grad_hook(partial(_update, size))


def _update(size: int, p: Tensor) -> None:
    ballast(size)
    p.grad = None


def _graded(
    setup: Setup,
    model: WanTransformer,
    rewards: list[RewardModel],
    start: Start | None,
    policies: list[BlockPolicy],
    score: RunBlocks,
) -> dict[str, Laps]:
    if setup.rollout.mode == "persistent":  # every window has a chain of its own
        setup = replace(setup, rollout=replace(setup.rollout, samples=1))
    rollout = rollout_bytes(setup)
    steps, last = setup.rollout.steps, index_range(setup.rollout)[1]
    config = replace(setup.chain, window=min(setup.window, 2))
    index = [[min(FULL_HISTORY, last)] * setup.latent[0]]
    longer = longest(setup) - held(setup, index, config.window, seeds=False)
    names = ["graded step", *["window"] * (config.window - 1)]
    names = [half for name in names for half in ([OTHER[name]] if apart(setup) else []) + [name]]
    there = model, start and start.model, *rewards
    with _passes(setup.pool, names, *there) as (found, watch):
        batch, noise, _ = inputs(setup, setup.latent)
        guidance = guidance_of(setup, setup.rollout.guidance_at_once)
        extra = [ballast(longer)]
        if setup.rollout.samples > 1:  # the gradient of the context is there from the first of them on
            given = batch if guidance is None else guidance.both(batch)
            extra.append(torch.empty_like(model.embed_context(given.text, given.clip).detach()))
            del given
        stay, run_blocks = (lambda *_: lambda: lambda x, t, active: x.clone()), run_under(policies, watch)
        grader = Grader(
            model, rewards[0], schedule(steps), config, stay, run_blocks, score, guidance=guidance,
            more=tuple(rewards[1:]), draws=setup.draws,
        )  # fmt: skip
        grading = Grading(grader, batch, start, torch.empty_like)
        for window in grading.windows(noise, torch.tensor(index)):
            loss = sum(torch.sigmoid(logit).mean() for logit in window.logits)
            window.backward(loss if start is None else loss + window.distance.mean())
            del window
        del extra, grading
    for laps in found.values():
        laps.before, laps.peak = max(laps.before, rollout), max(laps.peak, rollout)
    return found


def rollout_bytes(setup: Setup) -> int:
    """Most bytes of the steps without gradient before a graded one, in addition to weights and gradients."""
    return _rollout_bytes(replace(setup, blocks=None, keep="all", sft=True, validation=None))


@cache
def _rollout_bytes(setup: Setup) -> int:
    with meta_tensors():
        model, rewards = generator(setup, 2), [reward_model(setup, 1, r) for r in setup.rewards]
        resident = setup.sharding.resident
        rolled = generator(replace(setup, sharding=Sharding()), 2) if resident else model
        _lend(setup, rolled)
        live = counter(model, rolled, *rewards)
        base = live.now - SCALARS - setup.pool
        with live:
            prompts = batch = batch_of(setup, setup.latent)
            if (guidance := guidance_of(setup, setup.rollout.guidance_at_once)) is not None:
                batch = guidance.both(prompts)
            context = model.embed_context(batch.text, batch.clip)
            scored = [reward.embed_context(prompts.text, prompts.clip) for reward in rewards]
            extra = []
            extra.append(ballast(accelerated_bytes(setup)))
            ballast(fsdp.largest(model) if resident else 0)
            extra += [torch.empty_like(context)] if setup.lent else []
            repeated = Repeated(live)
            bound, given = partial(bind, rolled), (batch, context.detach())
            made = bound(*given) if guidance is None else guidance.velocity(bound, *given)
            forward = repeated.velocity(made)

            def velocity(x: Tensor, t: Tensor, active: Tensor) -> Tensor:
                with lora.lent(rolled):
                    return x.clone() if torch.is_grad_enabled() else forward(x, t, active)

            def judge(x: Tensor) -> None:
                for i, (reward, context) in enumerate(zip(rewards, scored, strict=True)):
                    repeated(f"judge {i}", reward.score, x, torch.empty(len(x)), context, prompts.condition)

            r = setup.rollout
            seeds = judged_step(r), r.seeds, ranks(r), judge
            for drawn in farthest(setup):
                for way, rows in chains(setup.latent, r.steps, drawn, setup.window, velocity, *seeds):
                    for index in rows:
                        window = way.graded(index, setup.window)
                        window.x = window.leaf = None  # without a backward it would live on in a cycle
                    del way
            del extra
    return live.peak - base


def _lend(setup: Setup, model: WanTransformer) -> None:
    """Give the layers of a model what an adapter of rollouts has for them."""
    layers = dict(model.named_modules())
    for name, rank in setup.lent:
        if (m := layers.get(name)) is not None:
            n, k = m.weight.shape
            m.lent = LowRank(*(torch.empty(s, dtype=m.dtype) for s in ((rank, k), (n, rank))), 1.0)


def accelerated_bytes(setup: Setup) -> int:
    """Bytes that a rollout by `rollout.Rollout` holds in addition to a plain one: the first tokens, and with
    step caching what the blocks added and their first input."""
    values, r = -(-setup.tokens // setup.sequence) * setup.config.dim, setup.rollout
    residual, product = setup.residual_dtype.itemsize * values, setup.compute_dtype.itemsize * values
    halves = 1 + (scales(r.guidance) != (1, 1))
    if r.cache > 0:  # of each half
        return halves * (2 * residual + product)
    at_once = halves if r.guidance_at_once else 1
    return at_once * residual if r.precision != "same" or r.cuda_graph else 0


def validation_bytes(setup: Setup) -> int:
    """Most bytes of setup.validation, in addition to the weights; there are no gradients then."""
    if setup.trains is not None:
        return accuracy_bytes(setup)
    v = setup.validation
    with meta_tensors(), torch.no_grad():
        model = generator(setup, 2)
        rewards = [reward_model(setup, 2, r) for r in setup.rewards if v.scored]
        start = None
        if v.compared:
            start = Start(model) if setup.lora is not None else start_of(setup, model, 2)
        copy = None if start is None or start.model is model else start.model
        live = counter(model, copy, *rewards)
        base, repeated = live.now - SCALARS - setup.pool + setup.drawn, Repeated(live)
        with live:
            extra = [batch_of(setup, setup.latent), ballast(ROUND * v.values)]
            extra += [torch.empty(v.latent) for _ in range(v.kept - 1)]
            for left in reversed(range(min(v.batches, 3))):  # what one leaves is there in the next
                read = batch_of(setup, (v.read - (left == 0), *v.latent[1:])) if v.read else None
                batch, noise, sigma = inputs(setup, v.latent)
                repeated("loss", anchored_sft_loss, model, start, batch, noise, sigma)
                guidance = guidance_of(setup, v.at_once, v.guided)
                velocity = repeated.velocity(chain_velocity(model, batch, guidance))
                latent = chain.sample(velocity, schedule(FULL_HISTORY + 1), noise)
                del velocity
                extra += [latent] if v.kept else []
                for number, reward in enumerate(rewards):
                    scored = batch._replace(latent=latent)
                    repeated(f"reward {number}", noisy_reward, reward, scored, noise, sigma)
                    del scored
                del read
            del extra
    return live.peak - base


def accuracy_bytes(setup: Setup) -> int:
    """The same of a validation of reward training."""
    v = setup.validation
    with meta_tensors(), torch.no_grad():
        model = trained(setup, 2).eval()
        live = counter(model)
        base, repeated = live.now - SCALARS, Repeated(live)
        with live:
            extra = [batch_of(setup, setup.latent) for _ in range(setup.sides)]
            extra += [ballast(ROUND * v.values)]
            extra += [batch_of(setup, (v.read, *v.latent[1:]))] if v.read else []
            for _ in range(min(v.batches, 2)):  # what one leaves is there in the next
                sides = [batch_of(setup, v.latent) for _ in range(v.sides)]
                noise, sigma = torch.empty(v.latent), torch.empty(v.latent[0])
                for side in sides:
                    repeated("reward", noisy_reward, model, side, noise, sigma)
            del extra
    return live.peak - base
