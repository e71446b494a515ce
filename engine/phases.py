"""Seconds and work of the phases of a run, without waiting for the device.

A mark begins a phase and ends the one before. On a GPU a mark is an event in the stream, so a phase is the
time that the device spends between two marks, idle time included: `data` is what it waits for data. Elsewhere
marks read the clock. `mark` and `count` belong to the clock that `timed` has started, and do nothing without
one. What is between optimizer steps has seconds and no work.

Waits for other ranks are timed in the same way, inside the phase that they are in.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Phase = Literal["data", "flow_matching", "rollout", "graded", "reward", "optimizer", "validation", "save"]
BETWEEN: tuple[Phase, ...] = ("validation", "save")
"""Phases between optimizer steps."""
Shape = tuple[int, int, int]


class Lap(NamedTuple):
    """What the clock has seen from one call of `lap` to the next."""

    marks: list[tuple[Phase, object]]  # the last one only ends the phase before
    work: Counter[tuple[str, Shape]]  # samples by phase and shape of latent
    edges: Sequence[tuple[Phase, object]] = ()  # by turns where a wait begins and where it ends

    def seconds(self) -> Counter[Phase]:
        """Seconds by phase. On a GPU the device must have passed the last mark."""
        return _sum(self.marks, self.marks[1:])

    def waits(self) -> Counter[Phase]:
        """Seconds of waits by the phase that they are in."""
        return _sum(self.edges[::2], self.edges[1::2])


def _sum(begins: Sequence[tuple[Phase, object]], ends: Sequence[tuple[Phase, object]]) -> Counter[Phase]:
    found = Counter()
    for (phase, begin), (_, end) in zip(begins, ends, strict=False):
        found[phase] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
    return found


class Clock:
    """Marks and work of a run on a device."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._lap = Lap([("data", self._now())], Counter(), [])

    def _now(self):
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)  # that of the computation, whichever is the current one
        return event

    def mark(self, phase: Phase) -> None:
        """A phase begins here."""
        self._lap.marks.append((phase, self._now()))

    def count(self, phase: str, latent: Tensor) -> None:
        """Work on all samples of latent [B, C, T, H, W]."""
        if self._lap.marks[-1][0] not in BETWEEN:
            self._lap.work[phase, tuple(latent.shape[2:])] += len(latent)

    def lap(self) -> Lap:
        """What was seen since the last call; the phase goes on."""
        phase, _ = self._lap.marks[-1]
        self.mark(phase)
        done, self._lap = self._lap, Lap(self._lap.marks[-1:], Counter(), [])
        return done

    @contextmanager
    def waits(self, flag: bool = True) -> Iterator[None]:
        """Inside, the computation waits for other ranks; with False it does not, inside of a wait. Nothing in
        a thread that is `apart`."""
        before = getattr(_thread, "waits", False)
        if before in (flag, None):
            yield
            return
        self._edge(flag)
        try:
            yield
        finally:
            self._edge(before)

    def _edge(self, waits: bool) -> None:
        _thread.waits = waits
        self._lap.edges.append((self._lap.marks[-1][0], self._now()))


_clock: Clock | None = None
_thread = threading.local()


def apart() -> None:
    """What this thread waits for delays no computation from now on."""
    _thread.waits = None


def computing() -> AbstractContextManager[None]:
    """A with block of computation inside of a wait."""
    return nullcontext() if _clock is None else _clock.waits(False)


@contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    """A clock that `mark` and `count` belong to inside the block."""
    global _clock
    before, _clock = _clock, Clock(device)
    try:
        yield _clock
    finally:
        _clock = before


def mark(phase: Phase) -> None:
    """A phase begins here."""
    if _clock is not None:
        _clock.mark(phase)


def count(phase: str, latent: Tensor) -> None:
    """Work on all samples of latent [B, C, T, H, W] in a phase of flops.costs."""
    if _clock is not None:
        _clock.count(phase, latent)
