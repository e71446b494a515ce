"""Sharded training: bytes that FSDP2 gathers and reduces, for one rank."""

from typing import NamedTuple

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
