"""What a dry run allocates in place of calls that it need not make."""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_engine.chain import Velocity
from prfl_engine.memory.live_bytes import LiveBytes


def ballast(size: int) -> Tensor:
    """A tensor of so many bytes, of none if they are negative."""
    return torch.empty(max(0, size) // 4)


class Repeated:
    """Calls without gradient that a dry run makes several times, of which equal names need equal bytes. The
    first of a name is made; for the others as many bytes as it needed at most are allocated and freed."""

    def __init__(self, live: LiveBytes):
        """live: the counter, whose laps are taken here alone."""
        self._live, self._most = live, {}

    def __call__(self, name: str | int, call: Callable[..., Tensor], *arguments) -> Tensor | None:
        """What the first call(*arguments) of a name returns; None for the others."""
        if name in self._most:
            ballast(self._most[name])
            return None
        self._live.lap()
        before = self._live.now
        made = call(*arguments)
        self._most[name] = self._live.lap() - before
        return made

    def velocity(self, velocity: Velocity) -> Velocity:
        """The same velocity, named by the number of samples."""

        def run(x: Tensor, t: Tensor, active: Tensor) -> Tensor:
            made = self(len(active), velocity, x, t, active)
            return x.clone() if made is None else made

        return run
