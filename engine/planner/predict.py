"""Every byte of a PRFL run on one GPU, by phase and by category, predicted from its configuration alone.

Three kinds of numbers: *counted* ones come from the code that runs (shapes of parameters, dry runs of the
real losses on tensors without values, a real update on the CPU); *predicted* ones follow from an assumption
that is named; *estimated* ones are what no count reaches (work space of attention libraries, CUDA's memory).
tests/test_predict.py compares the counted ones with real runs.
"""

import math
from dataclasses import dataclass, replace

import torch

from prfl_engine.config import Config, RolloutConfig
from prfl_engine.memory.policy import of_config
from prfl_engine.objectives import index_range
from prfl_engine.planner import between
from prfl_engine.planner.chain_bytes import longest
from prfl_engine.planner.dry_run import (
    REWARD_TRAINING,
    accelerated_bytes,
    pair_bytes,
    rollout_bytes,
    validation_bytes,
)
from prfl_engine.planner.entries import COUNTED, ESTIMATED, PREDICTED, Entry, Phase, entries
from prfl_engine.planner.fit_memory import planned
from prfl_engine.planner.halves import OTHER
from prfl_engine.planner.machine import Machine
from prfl_engine.planner.models import batch_bytes
from prfl_engine.planner.plan import Kind, Peak, Plan, make_kind, peaks
from prfl_engine.planner.seconds import Rates
from prfl_engine.planner.setup import ROUND, Setup, rounded
from prfl_engine.planner.sharded import Gathered, Shards, gathered_bytes
from prfl_engine.planner.standing import (
    Models,
    fp8_bytes,
    generator_here,
    gradient_bytes,
    idle_bytes,
    lent_bytes,
    models_of,
    reward_here,
    segments,
    start_bytes,
    state_bytes,
    update_bytes,
    waiting_bytes,
)
from prfl_engine.rollout.choice import judged_step

BUFFERS = "dry run: whole blocks as FSDP2 gathers and frees them"
PARTS = ("blocks", "head"), ("blocks",)  # of another half, and of what scores it, which is a phase of its own


@dataclass(frozen=True)
class Memory:
    """The phases of a run, and host memory; every entry is of one process."""

    phases: tuple[Phase, ...]
    host: Phase
    disk: int  # bytes of a checkpoint, of all processes together
    kinds: tuple[Kind, ...]  # of the blocks of the generator
    reward: Kind
    plan: Plan | None  # of auto:GB

    @property
    def peak(self) -> Phase:
        """The phase with most bytes."""
        return max(self.phases, key=lambda phase: phase.bytes)


def memory(
    config: Config,
    setup: Setup,
    gpu: Machine | None,
    shards: Shards = Shards(),  # noqa: B008 - never changed
    kind: Kind | None = None,
    like: Setup | None = None,
) -> Memory:
    """The memory of a run; gpu None: of a CPU, without estimates. kind: of all blocks, if it is known; like:
    whose rollout has been counted already and stands for this one's, apart from states of the chain.
    UserError where auto:GB fits nothing."""
    made, kinds, reward = None, [kind] * setup.count, kind
    if kind is None:
        setup = replace(setup, **_backward(config, setup, shards))
        made, kinds, reward = _kinds(config, setup, gpu, shards)
    models, c = models_of(setup, shards.shards), config
    idle = idle_bytes(setup, models)
    stands = _standing(c, setup, models, gpu, shards, idle.either)
    gradients = entries(
        (("gradients", gradient_bytes(models, c.optim), COUNTED, "parameters that an optimizer updates"),)
    )
    phases = [
        Phase("load", between.load(c, setup, models, gpu, shards)),
        Phase("resume", (*stands, *between.resume(c, setup, models, shards))),
    ]
    for name, own in _step(c, setup, kinds, reward, models, gpu, shards, like).items():
        away = idle.rollout if name.startswith("rollout") else idle.trained
        there = _standing(c, setup, models, gpu, shards, away)
        phases.append(Phase(name, (*there, *(() if setup.alone else gradients), *own)))
    there = _standing(c, setup, models, gpu, shards, idle.trained)
    phases.append(Phase("optimizer", (*there, *gradients, *_optimizer(c, setup, models, gradients, shards))))
    if setup.validation is not None:
        phases.append(Phase("validation", (*stands, *_validation(c, setup, models, shards))))
    pool = entries((("chains that persist", setup.pool - setup.drawn, COUNTED, "states, prompts"),))
    phases.append(Phase("checkpoint", (*stands, *pool, *between.checkpoint(c, setup, models, shards))))
    host = Phase("host", _host(c, setup, kinds, reward, models, gpu, shards))
    disk = between.on_disk(c, setup, models, shards)
    return Memory(tuple(phases), host, disk, tuple(kinds), reward, made)


def stands(config: Config, setup: Setup, gpu: Machine | None, shards: Shards) -> int:
    """Bytes of weights, gradients and states, at least, in every phase of a step."""
    models = models_of(setup, shards.shards)
    away = idle_bytes(setup, models).trained
    standing = sum(e.bytes for e in _standing(config, setup, models, gpu, shards, away))
    return standing + gradient_bytes(models, config.optim)


def _kinds(
    config: Config, setup: Setup, gpu: Machine | None, shards: Shards
) -> tuple[Plan | None, list[Kind], Kind]:
    rates = Rates() if gpu is None else gpu.rates
    if config.model.budget is not None:
        made = planned(config, setup, shards, rates)
        own = {kind.name: kind for kind in (*made.blocks, made.reward)}
        if shards.many:  # without resident weights, which the plan has counted
            own = {name: make_kind(name, kind.policy, setup, rates) for name, kind in own.items()}
        return made, [own[kind.name] for kind in made.blocks], own[made.reward.name]
    mode = config.model.recompute if isinstance(config.model.recompute, str) else "as configured"
    kind = make_kind(mode, of_config(config.model), setup, rates)
    return None, [kind] * setup.count, kind


def _backward(c: Config, setup: Setup, shards: Shards) -> dict:
    """How gradients arrive in the passes of a step: fields of Setup. Those of sharded weights arrive whole
    and in the dtype of their weights, and their sums over ranks are updated after that."""
    one_loss = c.loss.alternate or 0 in (c.loss.weight, c.loss.sft_weight)
    one_pass = c.loss.weight == 0 or c.rollout.samples == c.chain.window == 1
    once = one_loss and one_pass or setup.trains is not None
    alone = once and c.train.accumulate == shards.size // shards.sequence
    alone = alone and c.optim.offload != "all" and c.model.budget is None
    if not shards.many:
        return {"alone": alone}
    alone = alone and not c.optim.in_backward
    return {
        "alone": alone, "grad_dtype": None, "arriving": None, "sharding": shards.sharding(alone, once)
    }


def _narrow_average(config: Config, models: Models) -> bool:
    """Whether the average is kept in another dtype than the weights."""
    return config.train.ema > 0 and any(p.dtype != torch.float32 for p in models.trained)


def _standing(
    c: Config, setup: Setup, models: Models, gpu: Machine | None, shards: Shards, away: int
) -> tuple[Entry, ...]:
    """What is there in a phase once training has begun; away: bytes of idle experts that are not."""
    states = state_bytes(models, c.optim, shards.many)
    low = [p for p in models.generator if ".lora_" in p.name]
    here, scoring = generator_here(setup, models), reward_here(setup, models)
    whole = [p for p in here if ".lora_" not in p.name]
    head = [p for p in models.reward if not p.name.startswith("transformer.")]
    if setup.trains is not None:
        head = [p for p in whole if not p.name.startswith("transformer.")]
        whole = [p for p in whole if p.name.startswith("transformer.")]
    trunk = [p for p in scoring if p not in head]
    ema = sum(p.bytes(4) for p in models.trained) if c.train.ema > 0 else 0
    slots = update_bytes(models, c.optim, shards.many).slots
    graph = rollout_bytes(setup) if c.rollout.cuda_graph and setup.reward_blocks else 0
    stays = gathered_bytes(models, shards, setup.compute_dtype).resident if graph else 0
    # On a CPU the noise of drift probes is not copied, so it is there from the first of them on.
    r = c.rollout
    approximate = r.cache > 0 or r.precision == "fp8" or r.lora is not None
    probes = gpu is None and setup.reward_blocks and approximate
    noise = rounded(4 * math.prod(setup.latent[1:])) if probes else 0
    of_shapes = "shapes of the parameters"
    found = [
        ("weights", sum(p.bytes() for p in whole) - away, COUNTED, of_shapes),
        ("frozen start", start_bytes(setup, models)[0], COUNTED, of_shapes),
        ("LoRA", sum(p.bytes() for p in low), COUNTED, "A and B in float32"),
        ("reward model", sum(p.bytes() for p in trunk), COUNTED, of_shapes),
        ("reward head", sum(p.bytes() for p in head), COUNTED, "pooling and MLP in float32"),
        ("optimizer states", states.device, COUNTED, f"{c.optim.name}, {c.optim.rounding}"),
        ("optimizer slots", slots, COUNTED, "two blocks in transit from and to the host"),
        ("averaged weights", ema, COUNTED, "float32"),
        ("e4m3 weights", fp8_bytes(models) if c.rollout.precision == "fp8" else 0, COUNTED, of_shapes),
        ("rollout adapter", lent_bytes(setup), COUNTED, "A and B in the dtype of products, whole"),
        ("CUDA graph", graph, ESTIMATED, "as many bytes as a rollout needs stay reserved"),
        ("resident weights", stays, COUNTED, "all weights, which a graph needs at one place"),
        ("drift probes", noise, COUNTED, "noise"),
    ]
    if gpu is not None:
        every = [*here, *scoring]
        every += models.generator if setup.anchor == "device" and setup.lora is None else []
        found.append(("allocator", segments(every), PREDICTED, "weights above 10 MiB rounded up to 2 MiB"))
        found += between.of_libraries(gpu, shards)
    return entries(found)


def _step(
    c: Config,
    setup: Setup,
    kinds: list[Kind],
    reward: Kind,
    models: Models,
    gpu: Machine | None,
    shards: Shards,
    like: Setup | None,
) -> dict[str, tuple[Entry, ...]]:
    """What the phases of a step hold in addition to what stands, where each has most."""
    block = [p for p in models.trained if "blocks.0." in p.name]
    blocks = setup.count * (1 if setup.experts is None else sum(setup.experts))
    gradient = gradient_bytes(Models(block, []), c.optim) // blocks if setup.alone else 0
    if setup.sharding.held:  # what a block's backward leaves in addition, until that of all is over
        gradient += sum(p.values * (shards.reduce or p.dtype.itemsize) for p in block)
    found, extra = peaks(kinds, reward, gradient), []
    if gpu is not None:
        work = setup.tokens * setup.config.dim * 4 // setup.sequence
        extra.append(("attention", work, ESTIMATED, "float32 dQ of a FlashAttention backward"))
    arriving = 0  # the update of a gradient that a block's backward has made, when that is over
    if c.optim.in_backward and setup.arriving is None:
        arriving = update_bytes(models, c.optim, shards.many).temporaries
    gathered = gathered_bytes(models, shards, setup.compute_dtype)
    if setup.sides > 1:  # all of its blocks in one dry run: reward models are short
        found[REWARD_TRAINING] = {"blocks": Peak(*pair_bytes(setup, [k.policy for k in kinds]))}

    def own(phase: str, peak: Peak, around: bool = False, whole: int = 0) -> tuple[Entry, ...]:
        start = 0 if around else reward.numbers[phase].start
        states = longest(setup) if phase == "graded step" and not around else 0
        pool = 0 if around else setup.pool
        left = peak.bytes - max(start, states + pool) - peak.saved - peak.gradients
        update, whole = max(0, arriving - left), min(left, whole or gathered.backward)
        return entries((
            ("saved activations", peak.saved, COUNTED, "dry run: what the blocks save"),
            ("sampler states", states, COUNTED, "states of the chain that a window needs"),
            ("chains that persist", pool, COUNTED, "states and prompts of the pool"),
            ("inputs, embeddings", max(0, start - states - pool), COUNTED, "dry run: before the blocks"),
            ("gradients", peak.gradients, COUNTED, "those that blocks have made"),
            ("temporaries", left - whole, COUNTED, "dry run"),
            ("optimizer in backward", update, COUNTED, "a real update of one block"),
            ("gathered blocks", whole, COUNTED, BUFFERS), *extra,
        ))  # fmt: skip

    made = {}
    if setup.reward_blocks:
        first, last = index_range(setup.rollout)
        middle = (first + last + 1) // 2
        most = rollout_bytes(setup if like is None else like)
        if like is None:
            whole = {"sigma_range": (0.0, 1.0), "start": "noise"}  # an index counts from where chains begin
            whole |= _mean_seeds(setup.rollout, middle)
            mean = replace(setup, rollout=replace(setup.rollout, range=(middle, middle), **whole))
            made[f"rollout, mean index {middle}"] = _rollout(mean, gathered, rollout_bytes(mean))
        else:
            most += longest(setup) - longest(like) + accelerated_bytes(setup) - accelerated_bytes(like)
            most += setup.pool - like.pool
        made[f"rollout, worst index {last}"] = _rollout(setup, gathered, most)
        names = [name for pair in OTHER.items() for name in pair if name in found]
        parts = [(name, found[name][part], False) for name in names for part in PARTS[name in OTHER]]
        rest = found["graded step"]["rest"]
        if rest.bytes > most:
            parts.append(("graded step", rest, True))
        made["graded step"] = own(*max(parts, key=lambda part: part[1]))
        made["reward"] = own("graded step", found["graded step"]["head"], whole=gathered.reward)
    for name in ("flow matching", REWARD_TRAINING):
        if name in found:
            parts = found[name]
            place = max(parts, key=lambda p: parts[p].bytes)
            made[name] = own(name, parts[place], place == "rest")
    return made


def _mean_seeds(rollout: RolloutConfig, middle: int) -> dict:
    """How seeds are judged before a graded step at the middle of the range: at their step, or before it."""
    if rollout.seeds == 1:
        return {}
    if middle == 0:
        return {"seeds": 1, "seeds_step": None, "seeds_keep": "steepest"}
    return {"seeds_step": min(middle, judged_step(rollout))}


def _rollout(setup: Setup, gathered: Gathered, most: int) -> tuple[Entry, ...]:
    cache = accelerated_bytes(setup)
    states = min(longest(setup), most)
    left = most - states - cache - setup.pool
    whole = min(left, 0 if gathered.resident else gathered.forward)
    resident = 0 if setup.rollout.cuda_graph else gathered.resident
    return entries((
        ("sampler states", states, COUNTED, "states of the chain"),
        ("step cache, first tokens", cache, COUNTED, "residual, modulated input, tokens"),
        ("chains that persist", setup.pool, COUNTED, "states and prompts of the pool"),
        ("temporaries", left - whole, COUNTED, "dry run of the rollout's forwards"),
        ("gathered blocks", whole, COUNTED, BUFFERS),
        ("resident weights", resident, COUNTED, "all weights gathered for a rollout"),
    ))  # fmt: skip


def _optimizer(
    c: Config, setup: Setup, models: Models, gradients: tuple[Entry, ...], shards: Shards
) -> tuple[Entry, ...]:
    update = 0 if c.optim.in_backward else update_bytes(models, c.optim, shards.many).temporaries
    if _narrow_average(c, models):  # a parameter in float32; the gradients are gone by then
        update = max(update, max(4 * p.values for p in models.trained) - sum(e.bytes for e in gradients))
    numbers = 2 * ROUND * sum(p.count for p in models.trained)
    return entries((
        ("chains that persist", setup.pool - setup.drawn, COUNTED, "states and prompts of the pool"),
        ("inputs, embeddings", batch_bytes(setup), COUNTED, "the last micro-batch"),
        ("temporaries", update, COUNTED, "a real update of one block of the largest parameter"),
        ("norms and counters", numbers, COUNTED, "two numbers a parameter"),
    ))  # fmt: skip


def _validation(c: Config, setup: Setup, models: Models, shards: Shards) -> tuple[Entry, ...]:
    most = validation_bytes(setup)
    whole = min(most, gathered_bytes(models, shards).forward)
    swapped = sum(p.bytes() for p in models.trained) if _narrow_average(c, models) or shards.many else 0
    return entries((
        ("temporaries", most - whole, COUNTED, "dry run: samples, rewards, flow matching"),
        ("weights set aside", swapped if c.train.ema > 0 else 0, COUNTED, "the average in their dtype"),
        ("gathered blocks", whole, COUNTED, BUFFERS),
    ))  # fmt: skip


def _host(
    c: Config,
    setup: Setup,
    kinds: list[Kind],
    reward: Kind,
    models: Models,
    gpu: Machine | None,
    shards: Shards,
) -> tuple[Entry, ...]:
    """Pinned memory, and what processes, loaders and checkpoints take; not the page cache of files."""
    states = state_bytes(models, c.optim, shards.many)
    away = sum(k.host for k in kinds[:-1]) * setup.sides
    scored = reward.host * setup.reward_moving
    waiting = waiting_bytes(setup, models)
    return entries((
        ("offloaded activations", away + scored, COUNTED, "dry run: what blocks offload"),
        ("pinned rounding", (away + scored) // 64, PREDICTED, "at most a 64th: torch's powers of two"),
        ("idle experts", idle_bytes(setup, models).host, COUNTED, "frozen blocks of both experts"),
        ("frozen matrices", waiting.stays, COUNTED, "pinned, rounded up to powers of two"),
        ("weights as they are read", waiting.reading, COUNTED, "in addition, before they are stored"),
        ("frozen start", start_bytes(setup, models)[1], COUNTED, "blocks of the copy"),
        ("optimizer states", states.host, COUNTED, "pinned, rounded up to powers of two"),
        ("gradients", states.host_gradients, COUNTED, "pinned, rounded up to powers of two"),
        ("chains that persist", setup.pool_host, COUNTED, "pinned, rounded up to powers of two"),
        ("noise", between.noise_bytes(setup) if gpu is not None else 0, COUNTED, "pinned, of two samples"),
        *between.of_processes(c, setup, models, gpu, shards),
    ))  # fmt: skip
