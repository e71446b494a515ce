"""What a dry run reads of blocks of one policy, and the numbers that it makes of it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import BlockPolicy

BLOCKS = 6  # of a dry run: from the fourth on what is on its way to the host is the same everywhere


class Numbers(NamedTuple):
    """Bytes of one kind of block in one phase, each in addition to what has been saved by then."""

    saved: int
    saved_last: int
    forward: int  # most in the forward of a block, what a block of its kind before it offloads included
    forward_last: int  # without that
    backward: int  # and in its backward, without what the block before brings back
    backward_last: int
    head: int  # after the last block: head, loss, reward model
    host: int  # on the host
    leaving: int  # still on the device of what a block has offloaded, until the next block's forward is over
    start: int  # before the blocks, in addition to weights and gradients
    before: int  # most before all blocks
    after: int  # and after all of them

    @property
    def rest(self) -> int:
        """Most before and after all blocks."""
        return max(self.before, self.after)


class Laps:
    """The bytes at the borders of blocks without those that are gathered, and the peaks between them, of one
    pass with gradient through the generator. peak, before and after (all blocks) are those of all passes of
    one loss."""

    def __init__(self, live: LiveBytes, base: int, gathered: Callable[[], int]):
        self.live, self.base, self.before, self.after, self.peak = live, base, 0, 0, 0
        self.gathered = gathered
        self.now, self.host, self.forward, self.backward = [], [], [], []

    def border(self, x: Tensor) -> None:
        """Read the counter at the tokens x before a block or after the last, and again when their gradient
        is there."""
        self.forward.append(self.live.lap())
        self.now.append(self.live.now - self.gathered())
        self.host.append(self.live.host_now)
        if x.requires_grad:
            x.register_hook(lambda _: self.backward.append(self.live.lap()))


def numbers_of(laps: Laps, policy: BlockPolicy) -> Numbers:
    """The numbers of a policy from a dry run of BLOCKS blocks that have it."""
    now, n = laps.now, BLOCKS - 1
    saved, host = now[n] - now[n - 1], laps.host[n] - laps.host[n - 1]
    ahead = 0 if policy.plain else host
    saved_last, leaving = now[n + 1] - now[0] - n * saved, now[n] - now[0] - n * saved
    return Numbers(
        saved, saved_last,
        laps.forward[n] - now[0] - (n - 1) * saved, laps.forward[n + 1] - now[0] - n * saved - leaving,
        laps.backward[2] - now[0] - (n - 1) * saved - ahead,
        laps.backward[1] - now[0] - n * saved - (0 if policy.staying().plain else host),
        laps.backward[0] - now[0] - n * saved - saved_last, host, leaving,
        now[0] - laps.base, laps.before, laps.after,
    )  # fmt: skip
