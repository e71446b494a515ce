"""Tensors in host memory and their copies to and from a device: activations and optimizer states.

On CUDA copies are asynchronous: they run on streams of their own, to and from pinned memory, while the
compute stream continues. Every stream, event and copy belongs to the device of the tensors, whatever the
current device is. On the CPU the same code copies at once.

`HostStore` offloads activations until backward needs them. `HostBlocks` streams blocks that live on the host,
such as optimizer states, through two slots on the device.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from prfl_engine.memory.live_bytes import host_memory

SMALL = 1 << 20  # below this many values a tensor is copied in one piece
Block = dict[str, Tensor]  # 1-dim tensors by name


class CopyStream:
    """Copies between host memory and one device, on a CUDA stream of that device or, on the CPU, at once.

    Events are torch.cuda.Event, or None on the CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def queued(self) -> "torch.cuda.Event | None":
        """The event of all work that is queued so far on the compute stream, the device's current one."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def await_copy(self, event: "torch.cuda.Event | None") -> None:
        """Let the compute stream wait for an event; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def copy(
        self, pairs: Iterable[tuple[Tensor, Tensor]], *after: "torch.cuda.Event | None"
    ) -> "torch.cuda.Event | None":
        """Copy every (target, source) after the events `after`; returns the event of the end.

        The pairs are drawn on the stream, so what making them computes belongs to the copy.
        """
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        for event in after:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):  # makes its device the current one, too
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def synchronize(self) -> None:
        """Let the host wait until all copies have ended."""
        if self.stream is not None:
            self.stream.synchronize()


def power_of_two_sizes(n: int) -> list[int]:
    """n as a sum of powers of two, largest first, and a rest of at most a 64th; a small n in one piece.

    torch rounds a pinned buffer up to a power of two bytes: in one piece a tensor would take up to twice its
    size.
    """
    if n < SMALL:
        return [n]
    sizes, rest = [], n
    while rest > n // 64:
        sizes.append(1 << (rest.bit_length() - 1))
        rest -= sizes[-1]
    return [*sizes, rest] if rest else sizes


class HostTensor:
    """A tensor that was offloaded: `fetch` starts the copy back, `get` returns the tensor."""

    def __init__(self, a: Tensor, copies: CopyStream):
        """Room for `a` on the host, which LiveBytes counts as such on the CPU, too; nothing is copied yet."""
        self.copies, self.shape, self.dtype, self.device = copies, a.shape, a.dtype, a.device
        self.back, self.event, pinned = None, None, copies.stream is not None
        host = "cpu" if pinned else a.device
        with host_memory():
            self.host = [
                torch.empty(n, dtype=a.dtype, device=host, pin_memory=pinned)
                for n in power_of_two_sizes(a.numel())
            ]

    def parts(self, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(host buffer, part of `a`) for all parts of a tensor of this shape, which may have any strides."""
        yield from zip(self.host, a.reshape(-1).split([len(host) for host in self.host]), strict=True)

    def fetch(self) -> None:
        """Start the copy back to the device, unless it has started."""
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            back = ((part, host) for host, part in self.parts(self.back))
            self.event = self.copies.copy(back, self.copies.queued())

    def get(self) -> Tensor:
        """The tensor on its device, of its shape and contiguous, valid for the current stream."""
        self.fetch()
        self.copies.await_copy(self.event)
        return self.back

    def __del__(self):
        # Fetched and never used: the current stream waits for the copy before its memory is reused. Otherwise
        # the copy could overwrite what that stream puts there next.
        self.copies.await_copy(self.event)


class HostStore:
    """Offloads tensors of one device to the host.

    At most two batches of copies to the host are in flight. A third one waits, on the device, for the first,
    so device memory is bounded however slow the link is.
    """

    def __init__(self, device: torch.device):
        self.copies = CopyStream(device)
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()
        self.batches = 0  # offloaded so far

    def put(self, tensors: list[Tensor]) -> list[HostTensor]:
        """Start to copy tensors to the host; their device memory is free once `release` has dropped it.
        ValueError for a tensor of another device, whose copies this stream would not order."""
        for a in tensors:
            if a.device != self.copies.device:
                raise ValueError(f"offload: got a tensor on {a.device}, want one on {self.copies.device}")
        made = [HostTensor(a, self.copies) for a in tensors]
        pairs = (pair for host, a in zip(made, tensors, strict=True) for pair in host.parts(a))
        self._leaving.append((self.copies.copy(pairs, self.copies.queued()), tensors))
        self.batches += 1
        self.release(2)
        return made

    def release(self, batches: int = 0) -> None:
        """Free the device memory of all batches except the last `batches`, after their copies."""
        while len(self._leaving) > batches:
            event, _ = self._leaving.popleft()
            self.copies.await_copy(event)


@cache
def store_of(device: torch.device) -> HostStore:
    """The store of a device; one per process."""
    return HostStore(device)


def new_block(layout: dict[str, tuple[int, torch.dtype]], device: torch.device, pinned: bool) -> Block:
    """Zeros of the sizes and dtypes of `layout`."""
    return {
        name: torch.zeros(n, dtype=dtype, device=device, pin_memory=pinned)
        for name, (n, dtype) in layout.items()
    }


class HostBlocks:
    """Streams host blocks through two slots on the device: while one block is in use, the next is copied to
    the device and the previous one back to the host, each on a stream of its own."""

    def __init__(self, device: torch.device, blocks: list[Block]):
        """`blocks`: all blocks that will ever be streamed. A slot fits the largest tensor of every name."""
        room: dict[tuple[str, torch.dtype], int] = {}
        for block in blocks:
            for name, a in block.items():
                room[name, a.dtype] = max(len(a), room.get((name, a.dtype), 0))
        self.slots = [
            {key: torch.empty(n, dtype=key[1], device=device) for key, n in room.items()} for _ in range(2)
        ]
        self.up, self.down, self.turn = CopyStream(device), CopyStream(device), 0
        # Events after which the slots are free. Queued work may still be reading their memory.
        self.freed = [self.up.queued()] * 2
        self.last: set[int] = set()  # addresses of the tensors copied to the device last

    def stream(self, work: Iterable[tuple[Any, Block]], how: str) -> Iterator[tuple[Any, Block]]:
        """Yield (what, block on the device) for every (what, block), and copy the block back to the host
        afterwards.

        how "both": blocks are copied to the device first; "write": they are not, because they are only
        written. Exhaust the iterator before the next call; the last block is copied back when it ends.
        """
        work, ahead = iter(work), []
        while True:
            ahead += [self._fetch(*item, how) for item in islice(work, 2 - len(ahead))]
            if not ahead:
                return
            what, block, here, turn, ready = ahead.pop(0)
            self.up.await_copy(ready)
            yield what, here
            back = ((block[k], here[k]) for k in block)
            self.freed[turn] = self.down.copy(back, self.down.queued())

    def wait(self) -> None:
        """Wait until the host blocks hold what has been written."""
        self.down.synchronize()

    def _fetch(self, what: Any, block: Block, how: str) -> tuple:
        """(what, block, block on the device, its slot, the event after which it is there)."""
        turn, self.turn = self.turn, 1 - self.turn
        here = {k: self.slots[turn][k, a.dtype][: len(a)] for k, a in block.items()}
        addresses = {a.data_ptr() for a in block.values()}
        # Its slot is free when the block there has been copied back. If this block was in the other slot just
        # before, its own copy back may not have ended.
        moved = addresses.isdisjoint(self.last)
        after = self.freed[turn], None if moved else self.freed[1 - turn]
        self.last = addresses
        pairs = ((here[k], block[k]) for k in block) if how == "both" else ()
        return what, block, here, turn, self.up.copy(pairs, *after)
