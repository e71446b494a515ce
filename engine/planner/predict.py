"""Every byte of a PRFL run on one GPU, by phase and by category, predicted from its configuration alone.

Three kinds of numbers: *counted* ones come from the code that runs (shapes of parameters, dry runs of the
real losses on tensors without values, a real update on the CPU); *predicted* ones follow from an assumption
that is named; *estimated* ones are what no count reaches (work space of attention libraries, CUDA's memory).
tests/test_predict.py compares the counted ones with real runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from prfl_engine.config import Config
from prfl_engine.memory.policy import of_config
from prfl_engine.objectives import index_range
from prfl_engine.planner.chain_bytes import longest
from prfl_engine.planner.dry_run import (
    accelerated_bytes,
    batch_bytes,
    rollout_bytes,
    validation_bytes,
)
from prfl_engine.planner.fit_memory import planned
from prfl_engine.planner.machine import CONTEXT, Machine
from prfl_engine.planner.plan import Kind, Peak, Plan, make_kind, peaks
from prfl_engine.planner.seconds import Rates
from prfl_engine.planner.setup import ROUND, Setup
from prfl_engine.planner.sharded import Gathered, Shards, gathered_bytes
from prfl_engine.planner.standing import (
    Models,
    fp8_bytes,
    gradient_bytes,
    idle_bytes,
    models_of,
    segments,
    start_bytes,
    state_bytes,
    update_bytes,
)

COUNTED, PREDICTED, ESTIMATED = "counted", "predicted", "estimated"
BUFFERS = "whole blocks by the order in which FSDP2 gathers and frees"


class Entry(NamedTuple):
    """Bytes of one category in a phase, how they are known, and from what."""

    category: str
    bytes: int
    how: str
    basis: str


class Phase(NamedTuple):
    """A part of a run with all bytes that are on the device in its peak, or on the host."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(e.bytes for e in self.entries)

    def of(self, *how: str) -> int:
        """Bytes that are known in one of these ways."""
        return sum(e.bytes for e in self.entries if e.how in how)


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
) -> Memory:
    """The memory of a run; gpu None: of a CPU, without estimates. kind: of all blocks, if it is known.
    UserError where auto:GB fits nothing."""
    made, kinds, reward = None, [kind] * setup.count, kind
    if kind is None:
        made, kinds, reward = _kinds(config, setup, gpu, shards)
    models, c = models_of(setup, shards.shards), config
    stands = _standing(c, setup, models, gpu, shards)
    gradients = _entries(
        (("gradients", gradient_bytes(models, c.optim), COUNTED, "parameters that an optimizer updates"),)
    )
    phases = [Phase("load", _load(c, setup, models, gpu, shards))]
    training = (*stands, *gradients)
    for name, own in _step(c, setup, kinds, reward, models, gpu, shards).items():
        phases.append(Phase(name, (*training, *own)))
    phases.append(Phase("optimizer", (*training, *_optimizer(c, setup, models, gradients, shards))))
    if setup.validation is not None:
        phases.append(Phase("validation", (*stands, *_validation(c, setup, models, shards))))
    phases.append(Phase("checkpoint", stands))
    host = Phase("host", _host(c, setup, kinds, reward, models, shards))
    saved = state_bytes(models, c.optim, shards.many).saved * shards.shards
    weights = sum(p.count * torch.Size(p.shape).numel() * p.dtype.itemsize for p in models.trained)
    average = sum(p.count * torch.Size(p.shape).numel() * 4 for p in models.trained)
    disk = weights + saved + (average if c.train.ema > 0 else 0)
    return Memory(tuple(phases), host, disk, tuple(kinds), reward, made)


def _entries(found: Sequence[tuple[str, int, str, str]]) -> tuple[Entry, ...]:
    """Those that are not nothing."""
    return tuple(Entry(*entry) for entry in found if entry[1])


def _kinds(
    config: Config, setup: Setup, gpu: Machine | None, shards: Shards
) -> tuple[Plan | None, list[Kind], Kind]:
    rates = Rates() if gpu is None else gpu.rates
    if config.model.budget is not None:
        made = planned(config, setup, shards, rates)
        own = {kind.name: kind for kind in (*made.blocks, made.reward)}
        if shards.many:  # without the gathered blocks, which the plan has counted
            own = {name: make_kind(name, kind.policy, setup, rates) for name, kind in own.items()}
        return made, [own[kind.name] for kind in made.blocks], own[made.reward.name]
    mode = config.model.recompute if isinstance(config.model.recompute, str) else "as configured"
    kind = make_kind(mode, of_config(config.model), setup, rates)
    return None, [kind] * setup.count, kind


def _narrow_average(config: Config) -> bool:
    """Whether the average is kept in another dtype than the weights."""
    return config.train.ema > 0 and config.model.weights_dtype != "float32"


def _standing(
    c: Config, setup: Setup, models: Models, gpu: Machine | None, shards: Shards
) -> tuple[Entry, ...]:
    """What is there in every phase once training has begun."""
    states = state_bytes(models, c.optim, shards.many)
    low = [p for p in models.generator if ".lora_" in p.name]
    whole = [p for p in models.generator if ".lora_" not in p.name]
    head = [p for p in models.reward if not p.name.startswith("transformer.")]
    trunk = [p for p in models.reward if p.name.startswith("transformer.")]
    ema = sum(p.bytes(4) for p in models.trained) if c.train.ema > 0 else 0
    slots = update_bytes(models, c.optim, shards.many).slots
    graph = rollout_bytes(setup) if c.rollout.cuda_graph and setup.reward_blocks else 0
    stays = gathered_bytes(models, shards, setup.compute_dtype).resident if graph else 0
    of_shapes = "shapes of the parameters"
    found = [
        ("weights", sum(p.bytes() for p in whole) - idle_bytes(setup, models)[0], COUNTED, of_shapes),
        ("frozen start", start_bytes(setup, models)[0], COUNTED, of_shapes),
        ("LoRA", sum(p.bytes() for p in low), COUNTED, "A and B in float32"),
        ("reward model", sum(p.bytes() for p in trunk), COUNTED, of_shapes),
        ("reward head", sum(p.bytes() for p in head), COUNTED, "pooling and MLP in float32"),
        ("optimizer states", states.device, COUNTED, f"{c.optim.name}, {c.optim.rounding}"),
        ("optimizer slots", slots, COUNTED, "two blocks in transit from and to the host"),
        ("averaged weights", ema, COUNTED, "float32"),
        ("e4m3 weights", fp8_bytes(models) if c.rollout.precision == "fp8" else 0, COUNTED, of_shapes),
        ("CUDA graph", graph, ESTIMATED, "as many bytes as a rollout needs stay reserved"),
        ("resident weights", stays, COUNTED, "all weights, which a graph needs at one place"),
    ]
    if gpu is not None:
        every = [*models.generator, *models.reward]
        every += models.generator if setup.anchor == "device" and setup.lora is None else []
        found += [
            ("allocator", segments(every), PREDICTED, "weights above 10 MiB rounded up to 2 MiB"),
            ("CUDA context", CONTEXT, ESTIMATED, "assumed 0.6 GB: context, kernels, cuBLAS work space"),
        ]
    return _entries(found)


def _load(
    c: Config, setup: Setup, models: Models, gpu: Machine | None, shards: Shards
) -> tuple[Entry, ...]:
    """Files are read tensor by tensor; random weights are made whole in float32, then converted or
    sharded."""
    weights = sum(p.bytes() for p in models.generator) - idle_bytes(setup, models)[0]
    if c.model.path is None and shards.many:
        weights = sum(4 * p.count * math.prod(p.shape) for p in models.generator)
    reward = sum(p.bytes() for p in models.reward)
    found = [("weights", weights, COUNTED, "shapes of the parameters"), ("reward model", reward, COUNTED, "")]
    found.append(("frozen start", start_bytes(setup, models)[0], COUNTED, ""))
    if c.model.path is None and c.model.weights_dtype != "float32" and not shards.many:
        found.append(("temporaries", max(0, weights - reward), COUNTED, "random weights in float32 first"))
    if gpu is not None:
        found.append(("CUDA context", CONTEXT, ESTIMATED, "assumed 0.6 GB"))
    return _entries(found)


def _step(
    c: Config,
    setup: Setup,
    kinds: list[Kind],
    reward: Kind,
    models: Models,
    gpu: Machine | None,
    shards: Shards,
) -> dict[str, tuple[Entry, ...]]:
    """What the phases of a step hold in addition to what stands, where each has most."""
    found, extra = peaks(kinds, reward), []
    if gpu is not None:
        work = setup.tokens * setup.config.dim * 4 // setup.sequence
        extra.append(("attention", work, ESTIMATED, "float32 dQ of a FlashAttention backward"))
    arriving = 0  # the update of a gradient that a block's backward has made, when that is over
    if c.optim.in_backward:
        arriving = update_bytes(models, c.optim, shards.many).temporaries
    gathered = gathered_bytes(models, shards, setup.compute_dtype)

    def own(phase: str, peak: Peak, around: bool = False, scored: bool = False) -> tuple[Entry, ...]:
        start = 0 if around else reward.numbers[phase].start
        states = 0 if phase == "flow matching" or around else longest(setup)
        pool = 0 if around else setup.pool
        left = peak.bytes - max(start, states + pool) - peak.saved
        update = max(0, arriving - left)
        whole = gathered.graded(left, min(k.numbers[phase].saved for k in kinds)) if shards.many else 0
        return _entries((
            ("saved activations", peak.saved, COUNTED, "dry run: what the blocks save"),
            ("sampler states", states, COUNTED, "states of the chain that a window needs"),
            ("chains that persist", pool, COUNTED, "states and prompts of the pool"),
            ("inputs, embeddings", max(0, start - states - pool), COUNTED, "dry run: before the blocks"),
            ("temporaries", left, COUNTED, "dry run"),
            ("optimizer in backward", update, COUNTED, "a real update of one block"),
            ("gathered blocks", gathered.reward if scored else whole, PREDICTED, BUFFERS), *extra,
        ))  # fmt: skip

    made = {}
    if setup.reward_blocks:
        first, last = index_range(setup.rollout)
        middle = (first + last + 1) // 2
        whole = {"sigma_range": (0.0, 1.0), "start": "noise"}  # an index counts from where chains begin
        mean = replace(setup, rollout=replace(setup.rollout, range=(middle, middle), **whole))
        made[f"rollout, mean index {middle}"] = _rollout(mean, gathered)
        made[f"rollout, worst index {last}"] = _rollout(setup, gathered)
        parts = [(name, found[name]["blocks"], False) for name in ("graded step", "window") if name in found]
        rest = found["graded step"]["rest"]
        if rest.bytes > rollout_bytes(setup):
            parts.append(("graded step", rest, True))
        made["graded step"] = own(*max(parts, key=lambda part: part[1]))
        made["reward"] = own("graded step", found["graded step"]["head"], scored=True)
    if "flow matching" in found:
        parts = found["flow matching"]
        place = max(parts, key=lambda p: parts[p].bytes)
        made["flow matching"] = own("flow matching", parts[place], place == "rest")
    return made


def _rollout(setup: Setup, gathered: Gathered) -> tuple[Entry, ...]:
    most, cache = rollout_bytes(setup), accelerated_bytes(setup)
    states, buffers = min(longest(setup), most), max(gathered.forward, gathered.begin)
    left = most - states - cache - setup.pool
    if gathered.resident:  # before the rollout, from one whole block and the buffer of its gather at a time
        buffers = max(0, 2 * (gathered.begin - gathered.forward) - left)
    resident = 0 if setup.rollout.cuda_graph else gathered.resident
    return _entries((
        ("sampler states", states, COUNTED, "states of the chain"),
        ("step cache, first tokens", cache, COUNTED, "residual, modulated input, tokens"),
        ("chains that persist", setup.pool, COUNTED, "states and prompts of the pool"),
        ("temporaries", left, COUNTED, "dry run of the rollout's forwards"),
        ("gathered blocks", buffers, PREDICTED, BUFFERS),
        ("resident weights", resident, COUNTED, "all weights gathered for a rollout"),
    ))  # fmt: skip


def _optimizer(
    c: Config, setup: Setup, models: Models, gradients: tuple[Entry, ...], shards: Shards
) -> tuple[Entry, ...]:
    update = update_bytes(models, c.optim, shards.many).temporaries
    if _narrow_average(c):  # a parameter in float32; the gradients are gone by then
        update = max(update, max(4 * p.values for p in models.trained) - sum(e.bytes for e in gradients))
    numbers = 2 * ROUND * sum(p.count for p in models.trained)
    return _entries((
        ("inputs, embeddings", batch_bytes(setup), COUNTED, "the last micro-batch"),
        ("temporaries", update, COUNTED, "a real update of one block of the largest parameter"),
        ("norms and counters", numbers, COUNTED, "two numbers a parameter"),
    ))  # fmt: skip


def _validation(c: Config, setup: Setup, models: Models, shards: Shards) -> tuple[Entry, ...]:
    swapped = sum(p.bytes() for p in models.trained) if _narrow_average(c) or shards.many else 0
    return _entries((
        ("temporaries", validation_bytes(setup), COUNTED, "dry run: samples, rewards, flow matching"),
        ("weights set aside", swapped if c.train.ema > 0 else 0, COUNTED, "the average in their dtype"),
        ("gathered blocks", gathered_bytes(models, shards).begin, PREDICTED, BUFFERS),
    ))  # fmt: skip


def _host(
    c: Config, setup: Setup, kinds: list[Kind], reward: Kind, models: Models, shards: Shards
) -> tuple[Entry, ...]:
    """Pinned memory; not counted are the process, its loaders and the page cache of files."""
    states = state_bytes(models, c.optim, shards.many)
    away = sum(k.host for k in kinds[:-1])
    scored = reward.host * max(0, setup.reward_blocks - 1)
    return _entries((
        ("offloaded activations", away + scored, COUNTED, "dry run: what blocks offload"),
        ("pinned rounding", (away + scored) // 64, PREDICTED, "at most a 64th: torch's powers of two"),
        ("idle experts", idle_bytes(setup, models)[1], COUNTED, "frozen blocks of both experts"),
        ("frozen start", start_bytes(setup, models)[1], COUNTED, "blocks of the copy"),
        ("optimizer states", states.host, COUNTED, "pinned, rounded up to powers of two"),
        ("gradients", states.host_gradients, COUNTED, "pinned, rounded up to powers of two"),
    ))  # fmt: skip
