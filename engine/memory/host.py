"""Tensors that wait for the backward in host memory.

On CUDA both ways are asynchronous: copies run on a stream of their own, to and from pinned memory, while the
compute stream goes on. At most two lots are on their way out: putting away a third waits, on the device, for
the first, so device memory stays bounded however slow the link is. On the CPU the same code copies into
buffers that LiveBytes counts as host memory.
"""

from collections import deque
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from prfl_engine.memory.live_bytes import host_memory

SMALL = 1 << 20  # values that are not worth several copies


def pieces(n: int) -> list[int]:
    """n in powers of two, largest first, and a rest of at most a 64th; small n as it is.

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
    """A tensor on the host: start to `fetch` it early, `get` it when it is needed."""

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
        """Start to bring it back, if that has not begun."""
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.event = self.store.copy(self._bring)

    def _bring(self) -> None:
        for here, host in self._parts(self.back):
            here.copy_(host, non_blocking=True)

    def _parts(self, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of a tensor and their places on the host."""
        return zip(a.reshape(-1).split([len(host) for host in self.host]), self.host, strict=True)

    def get(self) -> Tensor:
        """The tensor on its device, valid for the current stream."""
        self.fetch()
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)
        return self.back

    def __del__(self):
        # What was fetched and never asked for: its memory goes back to the current stream behind the copy,
        # which would else run into what that puts there next.
        if self.event is not None:
            self.get()


class HostStore:
    """The way to the host and back for one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()
        self.lots = 0  # put away so far

    def copy(self, run) -> "torch.cuda.Event | None":
        """Run copies behind what the current stream has queued so far; the event that they are done."""
        if self.stream is None:
            run()
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            run()
            return self.stream.record_event()

    def put(self, tensors: list[Tensor]) -> list[Away]:
        """Start to copy tensors to the host; their device memory is free once `settle` has let go of it."""
        made: list[Away] = []
        event = self.copy(lambda: made.extend(Away(self, a) for a in tensors))
        self._leaving.append((event, tensors))
        self.lots += 1
        self.settle(2)
        return made

    def settle(self, lots: int = 0) -> None:
        """Let go of all lots but the last `lots`, when their copies are done."""
        while len(self._leaving) > lots:
            event, _ = self._leaving.popleft()
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)


@cache
def store_of(device: torch.device) -> HostStore:
    """The store of a device; one a process."""
    return HostStore(device)
