"""Seconds of an optimizer step by phase, predicted: FLOPs, bytes and links over the rates of a machine.

Compute and copies overlap where the code overlaps them: FSDP gathers the next block while one computes, and
blocks compute while copies to the host run. What exceeds that is waited for. Exchanges of a cut sequence are
inside an operation, so all of them are waited for. Not included: launches, waits for data, checkpoints.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prfl_engine.config import Config
from prfl_engine.model.flops import block_work, end_work, forward_work
from prfl_engine.objectives import index_range
from prfl_engine.planner.dry_run import REWARD_TRAINING
from prfl_engine.planner.flops import (
    expert_switches,
    graded_passes,
    probe_forwards,
    rollout_forwards,
    start_forwards,
    step_flops,
    validation_forwards,
)
from prfl_engine.planner.machine import Machine
from prfl_engine.planner.plan import Kind
from prfl_engine.planner.seconds import Rates, block_seconds, chunked
from prfl_engine.planner.setup import RewardSetup, Setup
from prfl_engine.planner.sharded import Exchanged, Shards
from prfl_engine.planner.standing import Models, gradient_bytes, idle_bytes, start_bytes, state_bytes
from prfl_engine.planner.stored import coming, unpacked
from prfl_engine.together import Asked, asked

BACKWARDS = ("graded step", "flow matching", REWARD_TRAINING)  # phases with gradients of weights


class Row(NamedTuple):
    """A phase in an optimizer step of one rank."""

    phase: str
    seconds: float
    flops: float  # model FLOPs of this rank
    waits: float = 0.0  # seconds of these in which collectives or copies are waited for


@dataclass(frozen=True)
class Times:
    """An optimizer step of one rank, what does not come in every step amortised."""

    rows: tuple[Row, ...]
    graded: float  # samples that all ranks grade in a step
    gpus: int
    peak: float  # FLOP/s of the data sheet
    trained: float = 0.0  # samples that a reward model is trained on in a step, of all ranks

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return sum(row.seconds for row in self.rows)

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the data sheet promises in that time."""
        return sum(row.flops for row in self.rows) / self.seconds / self.peak

    @property
    def per_sample(self) -> float:
        """Seconds a graded sample, of all GPUs together, or a sample that a reward model is trained on; where
        there is neither infinite."""
        count = self.graded or self.trained
        return self.seconds / count if count else float("inf")


def moved(setup: Setup, frozen: bool = False) -> tuple[float, float]:
    """Bytes that the memory-bound operations of a block read and write, on all ranks of a sample together:
    (forward, backward). Norms, gates, rotation and GELU; a backward reads a gradient in addition."""
    c, r, b = setup.config, setup.residual_dtype.itemsize, setup.compute_dtype.itemsize
    values, hidden = setup.tokens * c.dim, setup.tokens * c.ffn_dim
    forward = values * ((r + b) + 4 * b + 2 * (2 * r + 2 * b) + 2 * b + (2 * r + b)) + 2 * b * hidden
    return forward, 1.5 * forward


def forward_seconds(setup: Setup, rates: Rates, fp8: bool = False) -> float:
    """A sample's part of a forward of a micro-batch without gradient, if all of it were on one GPU."""
    one = replace(setup, latent=(1, *setup.latent[1:]))
    c, block = setup.config, block_work(setup.config, one.tokens)
    products, attention = rates.products, rates.attention
    if fp8:
        products, attention = rates.products_fp8 or products, rates.attention_fp8
    bytes_moved = moved(one)[0] + unpacked(c, setup.weight_dtype, setup.storage) / setup.latent[0]
    seconds = block.products / products + block.attention / attention + bytes_moved / rates.memory
    seconds += setup.sequence * chunked(None, setup, rates).forward / setup.latent[0]
    return setup.count * seconds + end_work(c, one.tokens).products / rates.products


def pass_seconds(setup: Setup, kinds: Sequence[Kind], rates: Rates, frozen: bool, head: bool = True) -> float:
    """Forward and backward of blocks of `kinds` on every rank of a sample, and embeddings and head."""
    p, total = setup.sequence, 0.0
    found = Counter((kind.policy, kind.host * p) for kind in kinds[:-1])
    found.update([(kind.policy, 0) for kind in kinds[-1:]])  # the last block offloads nothing
    for (policy, host), count in found.items():
        total += count * block_seconds(policy, setup, host, rates, frozen) / p
    size = setup.latent[0]
    ends = size * end_work(setup.config, setup.tokens // size, head).products * (2 if frozen else 3)
    return total + (len(kinds) * sum(moved(setup)) / rates.memory + ends / rates.products) / p


def times(
    config: Config,
    setup: Setup,
    kinds: Sequence[Kind],
    reward: Kind,
    models: Models,
    gpu: Machine,
    shards: Shards,
    exchanged: Exchanged,
) -> Times:
    """An optimizer step as configured; `exchanged` are the bytes of its collectives."""
    c, rates, p = config, gpu.rates, shards.sequence
    readers = shards.size // p
    own, samples = c.train.accumulate / readers, setup.latent[0]
    sft = own * (0.5 if c.loss.alternate else 1 / c.loss.sft_every) * setup.sft
    graded = own * (0.5 if c.loss.alternate else 1.0) if setup.reward_blocks else 0.0
    flops, frozen = step_flops(setup), setup.lora is not None
    links = exchanged.seconds(gpu, shards)
    rows: list[Row] = []

    def add(phase: str, count: float, seconds: float, hidden: float, exposed: float, model: float) -> None:
        """hidden: seconds of collectives that overlap with the others."""
        waits = exposed + max(0.0, hidden - seconds)
        if count * seconds > 0:
            rows.append(Row(phase, count * (seconds + waits), count * model / p, count * waits))

    one = pass_seconds(setup, kinds, rates, frozen)
    forward = forward_seconds(setup, rates, c.rollout.precision == "fp8") / p
    plain = forward_seconds(setup, rates) / p
    scored = sum(pass_seconds(*_scoring(setup, reward, r), rates, True, head=False) for r in setup.scored)
    resident = shards.resident
    brought = _brought(setup) / rates.link
    both = asked(c, readers) if shards.many and setup.experts is not None else Asked()
    both_sft, both_graded = both.sft, sum(both.steps) / max(1, len(both.steps))
    frame = one / samples / setup.latent[2]  # of a sample, for the other expert
    if graded:
        # Groups wait for the longest rollout, in it or, with resident weights, after their own.
        alike = readers if c.rollout.one_index == "turn" else c.rollout.one_index
        others = math.ceil(readers / (alike or 1))
        paired = resident and samples % 2 == 0 and not alike
        padded = c.rollout.mode == "fresh" and not paired
        count = rollout_forwards(setup, others, padded) * samples
        useful = rollout_forwards(setup) * samples
        share = useful / count if count else 0.0
        gather = links.forward / samples
        if resident and count:  # of two experts one after the other
            crossing = expert_switches(setup, c.model.boundary) / 2 if setup.experts is not None else 0.0
            gather = links.forward * (1 + min(1.0, crossing)) / count
        gather += brought / samples
        model = share * flops["rollout"] / useful if useful else 0.0
        add("rollout", graded * count, forward, gather, links.exchange_forward / samples, model)
    if graded and c.rollout.seeds > 1:
        judges = [_scoring(setup, reward, r)[0] for r in setup.rewards]
        judged = sum(forward_seconds(own, rates) for own in judges) / p
        count, once = c.rollout.seeds * samples, samples * setup.draws
        waits, gathers = links.exchange_reward / 3 / once, links.reward / 2 / once
        gathers += sum(map(_brought, judges)) / rates.link / samples
        add("seeds", graded * count, judged, gathers, waits, flops["seeds"] / count)
    passes = graded_passes(setup)
    if graded:
        model = flops["graded step"] / passes
        waiting = links.graded * (1 + both_graded)
        add(
            "graded step", graded * passes, one + both_graded * frame * both.differ, waiting,
            links.exchange_graded, model,
        )
        k = c.rollout.samples
        add("reward", k * graded, scored, links.reward, links.exchange_reward, flops["reward"] / k)
    if setup.trains is not None:
        head = pass_seconds(setup, kinds, rates, frozen, head=False)
        add(
            REWARD_TRAINING, own * setup.sides, head, links.graded, links.exchange_graded,
            flops[REWARD_TRAINING] / setup.sides,
        )  # fmt: skip
    add(
        "flow matching", sft, one + both_sft * frame, links.graded * (1 + both_sft), links.exchange_graded,
        flops.get("flow matching", 0.0),
    )  # fmt: skip
    if c.loss.anchored:
        often = 1.0 if c.loss.anchor else 1 / c.loss.anchor_every
        count = often * samples * (sft + graded * (start_forwards(setup) if graded else 0))
        start = start_bytes(setup, models)[1] / rates.link
        model = forward_work(setup.config, setup.count, setup.tokens // samples).forward
        hidden = (links.forward * (1 + max(both_sft, 0.0, *both.steps[:1])) + start + brought) / samples
        add("frozen start", count, plain, hidden, links.exchange_forward / samples, model)
    switch = max(0.0, idle_bytes(setup, models).coming / rates.link - plain)  # beside its first forward
    if switch > 0:
        waits = switch * _switches(c, setup, graded, sft, readers)
        rows.append(Row("idle experts", waits, 0.0, waits))
    backwards = own * setup.sides if setup.trains is not None else sft + graded * passes
    if (waits := links.replicas - one / 2) > 0:  # a backward hides the rest
        waits *= 1 if setup.experts is None else backwards
        rows.append(Row("gradients of copies", waits, 0.0, waits))
    fetched = sum(kind.host for kind in kinds[:-1])
    rows.append(_optimizer(c, models, gpu, shards, rows, backwards, fetched))
    if setup.validation is not None:
        batch = replace(setup, latent=setup.validation.latent)
        one_forward = forward_seconds(batch, rates) / p + links.exchange_forward / samples
        each = max(one_forward, (links.forward + brought) / c.eval.batch_size)
        rows.append(_validation(c, setup, readers, each, p))
    probes = _probes(c, setup)
    if probes:
        alone = forward_seconds(replace(setup, latent=(1, *setup.latent[1:])), rates) / p  # of one sample
        rows.append(Row("drift probes", probes * max(alone, links.forward, brought), 0.0))
    scored_of_all = readers * graded * samples * c.rollout.samples
    trained = 0.0 if setup.trains is None else readers * own * samples / (1 + setup.trains.at_once)
    return Times(tuple(rows), scored_of_all, shards.size, gpu.peak, trained)


def _validation(c: Config, setup: Setup, readers: int, each: float, p: int) -> Row:
    """An optimizer step's part of a validation; each: seconds of a forward of all blocks. Samples are those
    of the group of ranks that has most."""
    e, v, tokens = c.eval, setup.validation, setup.tokens // setup.latent[0]
    mine = math.ceil(v.samples / readers)
    if setup.trains is not None:
        count = mine * len(e.timesteps) * v.sides
        work = forward_work(setup.config, setup.count, tokens, head=False).forward
    else:
        blocks = sum(r.blocks for r in setup.rewards) if v.scored else 0
        trunk = blocks / setup.count * len(e.timesteps)
        flow_matching = 1 + v.compared  # and that of the frozen start
        count = mine * (flow_matching + validation_forwards(c) + trunk)
        work = forward_work(setup.config, setup.count, tokens).forward
    return Row("validation", count * each / e.every, count * work / p / e.every)


def _switches(c: Config, setup: Setup, graded: float, sft: float, readers: int) -> float:
    """Switches between two experts in an optimizer step, at most; flow matching may ask either where both are
    trained, and a validation's chains go there and back."""
    count = graded * setup.latent[0] * expert_switches(setup, c.model.boundary) if graded else 0.0
    count += sft * all(setup.experts)
    if setup.validation is not None:
        count += 2 * setup.validation.batches / readers / c.eval.every
    return count


def _brought(setup: Setup) -> int:
    """Bytes of frozen matrices that are copied from the host for a forward."""
    return setup.count * coming(setup.config, setup.weight_dtype, setup.storage)


def _scoring(setup: Setup, kind: Kind, reward: RewardSetup) -> tuple[Setup, list[Kind]]:
    config = reward.config or setup.config
    other = replace(setup, config=config, blocks=reward.blocks, storage=reward.storage)
    return other, [kind] * reward.blocks


def _probes(c: Config, setup: Setup) -> float:
    """Forwards of drift probes an optimizer step."""
    if not setup.reward_blocks:
        return 0.0
    r, last = c.rollout, index_range(c.rollout)[1]
    approximate = r.precision == "fp8" or r.cache > 0 or r.lora is not None
    forwards = 2 * probe_forwards(setup, last) if approximate else 0
    forwards += probe_forwards(setup, last + 1) if r.mode == "persistent" else 0
    return forwards / r.probe_every


def _optimizer(
    c: Config, models: Models, gpu: Machine, shards: Shards, rows: list[Row], backwards: float, fetched: float
) -> Row:
    """The update reads weights, gradients and states and writes weights and states; what lives on the host
    crosses the link in both directions at once. Gradients on the host are added to in every backward; with
    optim.in_backward states cross then. There they share the link with `fetched` bytes of activations a
    backward."""
    states, link = state_bytes(models, c.optim, shards.many), gpu.rates.link
    weights = sum(p.bytes() for p in models.trained)
    gradients = gradient_bytes(models, c.optim) or weights
    average = 2 * sum(p.bytes(4) for p in models.trained) if c.train.ema > 0 else 0
    seconds = (2 * weights + gradients + 2 * states.saved + average) / gpu.rates.memory
    free = sum(row.seconds for row in rows if row.phase in BACKWARDS) * 2 / 3
    free = max(0.0, free - backwards * fetched / link)
    if c.optim.in_backward:
        waits = max(0.0, states.host / link - free)
        return Row("optimizer", seconds + waits, 0.0, waits)
    added = max(0.0, backwards * states.host_gradients / link - free) if states.host_gradients else 0.0
    exposed = max(0.0, (states.host + states.host_gradients) / link - seconds)
    return Row("optimizer", seconds + exposed + added, 0.0, exposed + added)
