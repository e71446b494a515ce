"""Tensors that are offloaded to host memory until backward needs them.

On CUDA both directions are asynchronous: copies run on a separate stream, to and from pinned memory, while
the compute stream continues. At most two batches of copies to the host are in flight (a batch is called a lot
here). A third one waits, on the device, for the first, so device memory is bounded however slow the link is.
On the CPU the same code copies into buffers that LiveBytes counts as host memory.
"""

from collections import deque
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from prfl_engine.memory.live_bytes import host_memory

SMALL = 1 << 20  # below this many values a tensor is copied in one piece


def pieces(n: int) -> list[int]:
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


class Away:
    """A tensor that was offloaded: `fetch` starts the copy back, `get` returns the tensor."""

    def __init__(self, store: "HostStore", a: Tensor):
        self.store, self.shape, self.dtype, self.device = store, a.shape, a.dtype, a.device
        self.back, self.event, pinned = None, None, store.stream is not None
        with host_memory():
            self.host = [
                torch.empty(n, dtype=a.dtype, device="cpu", pin_memory=pinned) for n in pieces(a.numel())
            ]
        for here, host in self._parts(a):
            host.copy_(here, non_blocking=True)

    def fetch(self) -> None:
        """Start the copy back to the device, unless it has started."""
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.event = self.store.copy(self._bring)

    def _bring(self) -> None:
        for here, host in self._parts(self.back):
            here.copy_(host, non_blocking=True)

    def _parts(self, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of a tensor, each with its host buffer."""
        return zip(a.reshape(-1).split([len(host) for host in self.host]), self.host, strict=True)

    def get(self) -> Tensor:
        """The tensor on its device, valid for the current stream."""
        self.fetch()
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)
        return self.back

    def __del__(self):
        # Fetched and never used: the current stream waits for the copy before its memory is reused. Otherwise
        # the copy could overwrite what that stream puts there next.
        if self.event is not None:
            self.get()


class HostStore:
    """Copies tensors of one device to the host and back."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()
        self.lots = 0  # offloaded so far

    def copy(self, run) -> "torch.cuda.Event | None":
        """Run copies after all work queued on the current stream so far. Returns the event of their end."""
        if self.stream is None:
            run()
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            run()
            return self.stream.record_event()

    def put(self, tensors: list[Tensor]) -> list[Away]:
        """Start to copy tensors to the host; their device memory is free once `settle` has released it."""
        made: list[Away] = []
        event = self.copy(lambda: made.extend(Away(self, a) for a in tensors))
        self._leaving.append((event, tensors))
        self.lots += 1
        self.settle(2)
        return made

    def settle(self, lots: int = 0) -> None:
        """Release the device memory of all lots except the last `lots`, after their copies."""
        while len(self._leaving) > lots:
            event, _ = self._leaving.popleft()
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)


@cache
def store_of(device: torch.device) -> HostStore:
    """The store of a device; one per process."""
    return HostStore(device)
