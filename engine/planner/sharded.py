"""Sharded training: bytes that FSDP2 and a cut sequence gather, reduce and exchange, for one rank."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from prfl_engine.config import ChainConfig, RolloutConfig
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.memory.recompute import run_under
from prfl_engine.objectives import noisy_reward, sft_loss
from prfl_engine.planner.machine import Machine
from prfl_engine.planner.meta import meta_tensors, traffic
from prfl_engine.planner.models import inputs, reward_model, trained
from prfl_engine.planner.plan import Kind
from prfl_engine.planner.setup import Setup, Sharding
from prfl_engine.planner.standing import Models, Parameter, rounded


class Shards(NamedTuple):
    """How processes share the work: all of them, copies of the weights, ranks of a sample."""

    size: int = 1
    replicate: int = 1
    sequence: int = 1
    resident: bool = False
    reduce: int | None = None  # bytes of a gradient's value on its way; None: of its weight

    @property
    def many(self) -> bool:
        """Whether there are several processes."""
        return self.size > 1

    @property
    def shards(self) -> int:
        """Ranks over which weights are sharded."""
        return self.size // self.replicate

    def sharding(self, alone: bool = False, once: bool = False) -> Sharding:
        """As dry runs take it. alone: a backward is the only one of an optimizer step; once: of a
        micro-batch."""
        if not self.many:
            return Sharding()
        reduce = None if self.reduce is None else torch.float32
        held = self.replicate > 1 and (reduce is not None or not once)
        return Sharding(self.shards, reduce, alone, self.resident, held)


def units_of(parameters: Sequence[Parameter], shards: int) -> dict[str, int]:
    """What FSDP2 gathers at a time: "block", "root", and of a reward model "pool" and "mlp", and their bytes
    when they are whole, padded to a multiple of the shards."""
    found: dict[str, int] = {}
    for p in parameters:
        first = p.name.removeprefix("transformer.").split(".")[0]
        name = {"blocks": "block"}.get(first, first if first in ("pool", "mlp") else "root")
        found[name] = found.get(name, 0) + p.values * shards * p.dtype.itemsize
    return found


class Gathered(NamedTuple):
    """What a rank has of whole weights while a block computes, in their storage and in buffers. Dry runs
    count them where they are (fsdp.py); here they are told apart from what else is there."""

    forward: int = 0
    backward: int = 0  # and of gradients that are being reduced
    reward: int = 0
    resident: int = 0  # all weights of the generator, as products read them


def gathered_bytes(models: Models, shards: Shards, compute: torch.dtype | None = None) -> Gathered:
    """In a forward the root, a block and the buffer of its gather, in a backward the buffer of the block
    before it and that of the last reduce-scatter. Resident weights stay for a rollout, of two experts for
    the steps of each, in `compute`, the dtype of products (None: that of weights)."""
    if not shards.many:
        return Gathered()

    def around(parameters: Sequence[Parameter]) -> int:
        units = units_of(parameters, shards.shards)
        return units["root"] + 2 * units["block"]

    forward = around(models.one)
    trained = sum(p.values for p in models.one if p.trained and "blocks.0." in p.name) * shards.shards
    first = next(p for p in models.one if p.trained and "blocks.0." in p.name) if trained else None
    reduced = trained * (shards.reduce or first.dtype.itemsize) if first else 0
    return Gathered(
        forward, forward + reduced, max(map(around, models.rewards), default=0),
        _resident(models.one, compute) if shards.resident else 0,
    )  # fmt: skip


def _resident(parameters: Sequence[Parameter], compute: torch.dtype | None) -> int:
    """Bytes of whole weights in the dtypes of memory.resident."""
    total = 0
    for p in parameters:
        size, matrix = p.dtype.itemsize, len(p.shape) == 2 and p.name.endswith(".weight")
        if compute and matrix and p.name.startswith(("blocks.", "text_embedding.", "img_emb.")):
            size = min(size, compute.itemsize)
        total += p.count * rounded(math.prod(p.shape) * size)
    return total


def wider(trained: Sequence[Parameter], shards: Shards) -> float:
    """How many times the bytes of their weights gradients take on their way."""
    return 1.0 if shards.reduce is None else shards.reduce / trained[0].dtype.itemsize


class Links(NamedTuple):
    """Seconds of the collectives of a pass; those that overlap with it, and exchanges, which do not."""

    forward: float = 0.0
    graded: float = 0.0
    reward: float = 0.0
    replicas: float = 0.0  # once an optimizer step, in its last backward; of an expert in every one
    exchange_forward: float = 0.0
    exchange_graded: float = 0.0
    exchange_reward: float = 0.0


class Exchanged(NamedTuple):
    """Bytes that a rank receives in the collectives of a pass, of two experts where it asks one."""

    gather: int = 0  # weights of the generator, in a forward; in a backward as often again
    reduce: int = 0  # its gradients, in a backward
    replicas: int = 0  # shards of them, over copies
    gather_reward: int = 0
    forward: int = 0  # exchanges of a cut sequence in a forward without gradient
    graded: int = 0  # in a forward with gradient and its backward
    reward: int = 0

    def seconds(self, gpu: Machine, shards: Shards) -> Links:
        """By the rates of the links: inside a node where the shards and the ranks of a sample are."""
        inner = gpu.fast if shards.shards <= gpu.per_node else gpu.slow
        cut = gpu.fast if shards.sequence <= gpu.per_node else gpu.slow
        between = gpu.slow if shards.size > gpu.per_node else gpu.fast
        return Links(
            self.gather / inner, (2 * self.gather + self.reduce) / inner, 2 * self.gather_reward / inner,
            self.replicas / between,
            self.forward / cut, self.graded / cut, self.reward / cut,
        )  # fmt: skip


def exchanged_bytes(setup: Setup, models: Models, shards: Shards, reward: Kind) -> Exchanged:
    """The bytes of all collectives of a pass. What FSDP2 gathers and reduces follows from the units; what a
    cut sequence exchanges is counted in dry runs of one block and of two. All blocks have the policy of
    `reward`."""
    if not shards.many:
        return Exchanged()
    n = shards.shards

    def received(parameters: list[Parameter]) -> int:
        blocks = max(p.count for p in parameters)
        units = units_of(parameters, n)
        return round(sum(u * (blocks if k == "block" else 1) for k, u in units.items()) * (n - 1) / n)

    factor = wider(models.trained, shards)
    own = [p for p in models.one if p.trained]
    trained = round(factor * received(own))
    copies = 2 * (shards.replicate - 1) / shards.replicate
    replicas = factor * copies * sum(p.bytes() for p in own)
    found = Exchanged(
        received(models.one), trained, round(replicas), setup.draws * sum(map(received, models.rewards))
    )
    if shards.sequence == 1:
        return found
    passes = [("forward", setup), ("graded", setup)]
    passes += [("reward", replace(setup, reward=r, blocks=r.blocks)) for r in setup.scored]
    sums = Counter()
    for what, own in passes:
        sums[what] += _exchange(own, what, reward.policy, own.count) * (1 - 1 / shards.sequence)
    return found._replace(**{what: round(size) for what, size in sums.items()})


def _exchange(setup: Setup, what: str, policy: BlockPolicy, blocks: int) -> int:
    """The larger sides of the exchanges of a pass, from those of one block and of two. Neither the dtype of
    weights nor adapters nor chunks change what tokens exchange."""
    plain = replace(
        setup, weight_dtype=setup.compute_dtype, lora=None, chunk=None, validation=None, pool=0, pool_host=0,
        blocks=None, more=(), draws=1, rollout=RolloutConfig(), chain=ChainConfig(), sharding=Sharding(),
    )  # fmt: skip
    return _exchange_of_many(plain, what, policy, blocks)


@cache
def _exchange_of_many(setup: Setup, what: str, policy: BlockPolicy, blocks: int) -> int:
    one, two = (exchange_of(setup, what, policy, count) for count in (1, 2))
    return one + (blocks - 1) * (two - one)


def exchange_of(setup: Setup, what: str, policy: BlockPolicy, blocks: int) -> int:
    """The same of so many blocks: "forward" without gradient, "graded" with its backward, or "reward"."""
    run, before = run_under(policy), traffic[0]
    with meta_tensors(), LiveBytes():  # which looks into operations
        batch, noise, sigma = inputs(setup, setup.latent)
        if what == "reward":
            model = reward_model(setup, blocks)
            batch = batch._replace(latent=batch.latent.requires_grad_())
            noisy_reward(model, batch, noise, sigma, run).sum().backward()
        else:
            model = trained(setup, blocks)
            losses = sft_loss if setup.trains is None else noisy_reward
            with torch.set_grad_enabled(what == "graded"):
                loss = losses(model, batch, noise, sigma, run).mean()
            if what == "graded":
                loss.backward()
    return traffic[0] - before
