"""Sharded training: bytes that FSDP2 and a cut sequence gather, reduce and exchange, for one rank."""

from collections.abc import Sequence
from typing import NamedTuple

from prfl_engine.planner.machine import Machine
from prfl_engine.planner.plan import Kind
from prfl_engine.planner.setup import Setup


class Shards(NamedTuple):
    """How processes share the work: all of them, copies of the weights, ranks of a sample."""

    size: int = 1
    replicate: int = 1
    sequence: int = 1
    resident: bool = False

    @property
    def many(self) -> bool:
        """Whether there are several processes."""
        return self.size > 1

    @property
    def shards(self) -> int:
        """Ranks over which weights are sharded."""
        return self.size // self.replicate


class Gathered(NamedTuple):
    """Bytes of whole weights and buffers that a rank holds in addition to its shards."""

    forward: int = 0
    backward: int = 0
    resident: int = 0


def gathered_bytes(setup: Setup, shards: Shards) -> Gathered:
    """Most in a forward without gradient, in a step with gradient, and what resident weights take."""
    return Gathered()


class Links(NamedTuple):
    """Seconds of the collectives of a pass; those that overlap with it, and exchanges, which do not."""

    forward: float = 0.0
    graded: float = 0.0
    reward: float = 0.0
    exchange_forward: float = 0.0
    exchange_graded: float = 0.0
    exchange_reward: float = 0.0


class Exchanged(NamedTuple):
    """Bytes that a rank receives in the collectives of a pass."""

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
        reduce = self.reduce / inner + self.replicas / (gpu.slow if shards.size > gpu.per_node else gpu.fast)
        return Links(
            self.gather / inner, 2 * self.gather / inner + reduce, 2 * self.gather_reward / inner,
            self.forward / cut, self.graded / cut, self.reward / cut,
        )  # fmt: skip


def exchanged_bytes(setup: Setup, shards: Shards, kinds: Sequence[Kind], reward: Kind) -> Exchanged:
    """The bytes of all collectives of a pass."""
    return Exchanged()
