"""Blocks of tensors that live in host memory and are streamed through two slots on the device.

While one block is in use, the next is copied to the device and the previous one back to the host, each on a
separate CUDA stream. On the CPU the same copies are made without streams.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

Block = dict[str, Tensor]  # 1-dim tensors by name


def new_block(layout: dict[str, tuple[int, torch.dtype]], device: torch.device, pinned: bool) -> Block:
    """Zeros of the sizes and dtypes of `layout`."""
    return {
        name: torch.zeros(n, dtype=dtype, device=device, pin_memory=pinned)
        for name, (n, dtype) in layout.items()
    }


class HostBlocks:
    """Streams host blocks through two slots on the device."""

    def __init__(self, device: torch.device, blocks: list[Block]):
        """`blocks`: all blocks that will ever be streamed. A slot fits the largest tensor of every name."""
        room: dict[tuple[str, torch.dtype], int] = {}
        for block in blocks:
            for name, a in block.items():
                room[name, a.dtype] = max(len(a), room.get((name, a.dtype), 0))
        self.slots = [
            {key: torch.empty(n, dtype=key[1], device=device) for key, n in room.items()} for _ in range(2)
        ]
        self.freed: list[torch.cuda.Event | None] = [None, None]
        self.up, self.down = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        if self.up is not None:  # queued work may still be reading the memory of the slots
            self.up.wait_stream(torch.cuda.current_stream(device))
        self.device, self.turn = device, 0
        self.last: set[int] = set()  # addresses of the tensors copied to the device last

    def through(self, work: Iterable[tuple[Any, Block]], how: str) -> Iterator[tuple[Any, Block]]:
        """Yield (what, block on the device) for every (what, block), and copy the block back to the host
        afterwards.

        how "write": blocks are only written, so they are not copied to the device. Exhaust the iterator
        before the next call; the last block is copied back when the iterator ends.
        """
        work, ahead = iter(work), []
        while True:
            ahead += [self._raise(*item, how) for item in islice(work, 2 - len(ahead))]
            if not ahead:
                return
            what, block, here, turn, ready = ahead.pop(0)
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
            yield what, here
            done = None if self.down is None else torch.cuda.current_stream(self.device).record_event()
            self.freed[turn] = self._copy(self.down, done, [(block[k], here[k]) for k in block])

    def wait(self) -> None:
        """Wait until the host blocks hold what has been written."""
        if self.down is not None:
            self.down.synchronize()

    def _raise(self, what: Any, block: Block, how: str):
        turn, self.turn = self.turn, 1 - self.turn
        here = {k: self.slots[turn][k, a.dtype][: len(a)] for k, a in block.items()}
        # A slot is free when its block has been copied back. If this block was in the other slot just before,
        # its copy back may not have ended.
        addresses = {a.data_ptr() for a in block.values()}
        if self.up is not None and not addresses.isdisjoint(self.last):
            self.up.wait_stream(self.down)
        self.last = addresses
        pairs = [(here[k], block[k]) for k in block] if how == "both" else []
        return what, block, here, turn, self._copy(self.up, self.freed[turn], pairs)

    def _copy(self, stream, after, pairs: list[tuple[Tensor, Tensor]]):
        """Copy (to, from) on the stream, after the event `after`; returns the event of their end."""
        if stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return stream.record_event()
