"""Bytes that stand from step to step: weights, gradients, optimizer states, averaged and e4m3 weights.

Counted from the shapes of the models' parameters, made on the meta device, by the rules of those who allocate
them. Of a block one is made and counted as often as there are blocks. Of sharded parameters (FSDP2) a rank
holds ceil(rows / ranks) rows of each: FSDP2 pads the first dimension to a multiple of the ranks.
"""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import nn

from prfl_engine.config import OptimConfig
from prfl_engine.config_models import Storage
from prfl_engine.errors import check
from prfl_engine.model.layers import Linear
from prfl_engine.model.wan import WanConfig
from prfl_engine.optim.block_adamw import BLOCK, state_layout
from prfl_engine.optim.optimizer import in_blocks
from prfl_engine.planner.meta import meta_tensors
from prfl_engine.planner.models import generator, reward_model, trained
from prfl_engine.planner.setup import ROUND, Setup, rounded
from prfl_engine.planner.stored import pieces, stored, used
from prfl_engine.planner.updates import Piece, Update, updated

PINNED = 4096  # a page: the least that pinned memory takes


class Parameter(NamedTuple):
    """A parameter as one rank holds it, and how many such there are."""

    name: str
    shape: tuple[int, ...]  # of the whole
    rows: int  # of the first dimension that are here
    dtype: torch.dtype
    trained: bool
    count: int

    @property
    def values(self) -> int:
        """Values that are here, of one."""
        return self.rows * math.prod(self.shape[1:])

    def bytes(self, itemsize: int | None = None) -> int:
        """Bytes that are here of all of them, each rounded up as the allocator does."""
        return self.count * rounded(self.values * (itemsize or self.dtype.itemsize))


def pinned(size: int) -> int:
    """Bytes that torch's pinned allocator takes for a buffer: the next power of two."""
    return max(PINNED, 1 << (size - 1).bit_length()) if size else 0


def parameters_of(model: nn.Module, blocks: int, shards: int = 1) -> list[Parameter]:
    """The parameters of a model that has one block in place of `blocks`."""
    found = []
    for name, p in model.named_parameters():
        shape = tuple(p.shape) or (1,)
        inside = "blocks.0." in name
        rows = -(-shape[0] // shards)
        found.append(Parameter(name, shape, rows, p.dtype, p.requires_grad, blocks if inside else 1))
    return found


@dataclass(frozen=True, eq=False)  # one object for every setup, see models_of
class Models:
    """The parameters of the generator and of every frozen reward model. Where a reward model is trained, it
    has the generator's place."""

    generator: list[Parameter]
    rewards: list[list[Parameter]]
    experts: tuple[bool, bool] | None = None  # as Setup.experts; `generator` is of both, high-noise first

    @cached_property
    def one(self) -> list[Parameter]:
        """Those of one model at a time: of two experts of one that is trained."""
        if self.experts is None:
            return self.generator
        return self.halves[0 if self.experts[0] else 1]

    @cached_property
    def halves(self) -> tuple[list[Parameter], list[Parameter]]:
        """Those of each of two experts."""
        names = [p.name for p in self.generator]
        second = names.index(names[0], 1)  # where the low-noise expert begins
        return self.generator[:second], self.generator[second:]

    @cached_property
    def reward(self) -> list[Parameter]:
        """Those of all frozen reward models."""
        return [p for each in self.rewards for p in each]

    @cached_property
    def trained(self) -> list[Parameter]:
        """Those that an optimizer updates."""
        return [p for p in self.generator if p.trained]


def models_of(setup: Setup, shards: int = 1) -> Models:
    """The parameters of a setup's models on one of so many ranks."""
    same = Setup(
        setup.config, (1, 16, 1, 2, 2), weight_dtype=setup.weight_dtype, reward=setup.reward, more=setup.more,
        blocks=setup.blocks, lora=setup.lora, trains=setup.trains, experts=setup.experts,
    )  # fmt: skip
    return _models(same, shards)


def _apart(p: Parameter) -> bool:
    """Whether it is a matrix that memory.frozen stores."""
    return "blocks.0." in p.name and len(p.shape) == 2 and not p.trained


def placed(
    found: list[Parameter], config: WanConfig, dtype: torch.dtype, storage: Storage
) -> list[Parameter]:
    """What there is on the device of these parameters of a model, or of two experts: frozen matrices of
    blocks as they are stored, of one block those in use, and of another those on their way from the host."""
    if not storage.apart:
        return found
    count, parts = _blocks(found), stored(config, dtype, storage)
    ahead = min(1, count - 1) if storage.host else count
    pieces = [(used(config, dtype), 1), *((part, ahead) for part in parts)]
    made = [Parameter("matrices", (n,), n, own, False, times) for (n, own), times in pieces]
    return [p for p in found if not _apart(p)] + made


def _blocks(found: list[Parameter]) -> int:
    return sum(p.count for p in found if _apart(p) and p.name.endswith("self_attn.q.weight"))


def generator_here(setup: Setup, models: Models) -> list[Parameter]:
    """The generator's parameters as `placed`."""
    return placed(models.generator, setup.config, setup.weight_dtype, setup.storage)


def reward_here(setup: Setup, models: Models) -> list[Parameter]:
    """The parameters of all frozen reward models as `placed`."""
    return [
        p for r, own in zip(setup.rewards, models.rewards, strict=False)  # a trained one has none
        for p in placed(own, r.config or setup.config, setup.weight_dtype, r.storage)
    ]  # fmt: skip


class Waiting(NamedTuple):
    """Bytes of frozen matrices on the host: those that stay, and how many more there are while models are
    read, which is there before their matrices are stored."""

    stays: int = 0
    reading: int = 0


def waiting_bytes(setup: Setup, models: Models) -> Waiting:
    """Of generator and reward models, each of which is read when those before have been stored."""
    own = [(models.generator, setup.config, setup.storage)]
    for r, theirs in zip(setup.rewards, models.rewards, strict=False):  # a trained one has none
        own.append((theirs, r.config or setup.config, r.storage))
    stays = most = 0
    for found, config, storage in own:
        if storage.apart:
            most = max(most, stays + sum(p.bytes() for p in found))
        if storage.host:
            parts = stored(config, setup.weight_dtype, storage)
            stays += _blocks(found) * sum(pinned(size) for part in parts for size in pieces(part))
    return Waiting(stays, max(0, most - stays))


class Idle(NamedTuple):
    """Bytes of frozen blocks of two experts: those that are not on the device in a phase, and those that the
    host has a copy of."""

    either: int = 0  # in a phase that may ask either expert
    rollout: int = 0
    trained: int = 0  # in the other phases of a training step: they ask trained experts alone
    coming: int = 0  # what a switch from one to the other brings, at most
    host: int = 0


def idle_bytes(setup: Setup, models: Models) -> Idle:
    """Of a setup; none where all experts stay. A micro-batch of one sample asks one expert at a time."""
    if setup.experts is None or not setup.idle:
        return Idle()
    frozen = [sum(p.bytes() for p in of if "blocks." in p.name and not p.trained) for of in models.halves]
    either = trained = rollout = min(frozen) if setup.latent[0] == 1 else 0
    if not all(setup.experts):
        trained = rollout = frozen[setup.experts.index(False)]
        if setup.through_high:
            rollout = either
    return Idle(either, rollout, trained, max(frozen), sum(frozen))


def start_bytes(setup: Setup, models: Models) -> tuple[int, int]:
    """(bytes of the frozen copy that stay on the device, bytes of its blocks on the host); none with LoRA."""
    if setup.anchor == "none" or setup.lora is not None:
        return 0, 0
    blocks = sum(p.bytes() for p in models.generator if "blocks." in p.name)
    whole = sum(p.bytes() for p in models.generator)
    return (whole, 0) if setup.anchor == "device" else (whole - blocks, blocks)


def lent_bytes(setup: Setup) -> int:
    """Bytes of the adapter of rollouts, whole on every rank. UserError for a layer that there is not."""
    found = 0
    with meta_tensors():
        layers = dict(generator(setup, 1).named_modules()) if setup.lent else {}
    for name, rank in setup.lent:
        m = layers.get(re.sub(r"^blocks\.\d+\.", "blocks.0.", name))
        check(isinstance(m, Linear), "rollout.lora", name, "an adapter of linear layers of the model")
        found += sum(rounded(rank * n * m.dtype.itemsize) for n in m.weight.shape)
    return found


@cache
def _models(setup: Setup, shards: int) -> Models:
    with meta_tensors():
        policy = parameters_of(trained(setup, 1), setup.count, shards)
        if setup.experts is not None:
            frozen = [p._replace(trained=False) for p in policy if ".lora_" not in p.name]
            policy = [p for each in setup.experts for p in (policy if each else frozen)]
        if setup.reward is None or setup.trains is not None:
            return Models(policy, [], setup.experts)
        rewards = [parameters_of(reward_model(setup, 1, r), r.blocks, shards) for r in setup.rewards]
    return Models(policy, rewards, setup.experts)


def is_narrow(models: Models) -> bool:
    """Whether an optimizer updates weights in bfloat16."""
    return any(p.dtype == torch.bfloat16 for p in models.trained)


@cache
def gradient_bytes(models: Models, optim: OptimConfig) -> int:
    """Gradients that stay on the device until the update."""
    if optim.in_backward or optim.offload == "all":
        return 0
    return sum(p.bytes(4 if optim.grad_dtype == "float32" else None) for p in models.trained)


class States(NamedTuple):
    """What an optimizer keeps: bytes on the device and on the host (pinned, rounded by torch)."""

    device: int
    host: int
    host_gradients: int
    saved: int  # in a checkpoint


@cache
def state_bytes(models: Models, optim: OptimConfig, sharded: bool = False) -> States:
    """States of the optimizer that make_optimizer makes of these parameters."""
    narrow = is_narrow(models)
    device = host = gradients = saved = 0
    for p in models.trained:
        device += p.count * ROUND  # the counter of steps
        if not in_blocks(optim, narrow, sharded):
            device, saved = device + 2 * p.bytes(4), saved + 8 * p.count * p.values
            continue
        whole, left = math.prod(p.shape), p.values
        row = math.prod(p.shape[1:])
        while left > 0:
            n, left = min(left, BLOCK), left - BLOCK
            layout = state_layout(optim, p.dtype, whole, row if sharded else n, n)
            sizes = [size * dtype.itemsize for size, dtype in layout.values()]
            saved += p.count * sum(sizes)
            if optim.offload == "none":
                device += p.count * sum(map(rounded, sizes))
            else:
                host += p.count * sum(map(pinned, sizes))
            if optim.offload == "all":
                size = n * (4 if optim.grad_dtype == "float32" else p.dtype.itemsize)
                gradients += p.count * pinned(size)
    return States(device, host, gradients, saved)


@cache
def update_bytes(models: Models, optim: OptimConfig, sharded: bool = False) -> Update:
    """Counted in a real update on the CPU of the two largest blocks that follow each other, of every pair of
    dtypes and of kinds of states: an update goes block by block, and what it makes of one lives until that of
    the next is there."""
    trained = models.trained
    narrow = any(p.dtype == torch.bfloat16 for p in trained)
    if not in_blocks(optim, narrow, sharded) or optim.name == "apex":
        return Update(0, 0)

    def parts(p: Parameter) -> list[Piece]:
        of = p.dtype, math.prod(p.shape), math.prod(p.shape[1:]) if sharded else None
        return [Piece(min(BLOCK, left), *of) for left in range(p.values, 0, -BLOCK)]

    blocks = [parts(p) for p in trained]
    rows = blocks if optim.in_backward else [list(itertools.chain.from_iterable(blocks))]
    pairs = [row[i : i + 2] for row in rows for i in range(max(1, len(row) - 1))]
    largest: dict[tuple, tuple[Piece, ...]] = {}
    for pair in sorted(pairs, key=lambda pair: sum(piece.values for piece in pair)):
        largest[tuple((a.dtype, *a.layout(optim, a.values)) for a in pair)] = tuple(pair)
    return Update(*map(max, zip(*(updated(pair, optim) for pair in largest.values()), strict=True)))


@cache
def fp8_bytes(models: Models) -> int:
    """The e4m3 copy of the blocks' linear layers but the text's keys and values (rollout.fp8.Fp8Blocks)."""
    ends = tuple(f"{x}.weight" for x in (".q", ".o", "self_attn.k", "self_attn.v", "ffn.0", "ffn.2"))
    found = [p for p in models.generator if "blocks.0." in p.name and p.name.endswith(ends)]
    parts = ((p.count, (math.prod(p.shape), 4 * p.shape[0], 2 * p.shape[0])) for p in found)
    return sum(count * sum(map(rounded, sizes)) for count, sizes in parts)


def segments(found: list[Parameter]) -> int:
    """Bytes that torch's CUDA allocator takes for these parameters in addition to their own: it rounds those
    above 10 MiB up to 2 MiB (c10/cuda/CUDACachingAllocator.cpp)."""
    large = [p for p in found if p.bytes() > p.count * 10 * 2**20]
    return sum(p.count * (rounded(p.bytes() // p.count, 2 * 2**20) - p.bytes() // p.count) for p in large)
