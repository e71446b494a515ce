"""Counts exactly the bytes of tensor storage that are alive while code runs, on any device and for fake
tensors.

The storage of every tensor that an operation returns counts from then until it is freed. Tensors that exist
before have to be announced by `add`, because a view of them would count too. Allocations inside the fused
operations of prfl_kernels are included. The counter keeps no tensor and sets no hook, so it does not change
what is alive. (torch's own MemTracker keeps gradients alive by its hooks and reports more.) Memory allocated
in a `host_memory` block is counted separately, also on a CPU.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prfl_kernels.jit import REGISTERED

_on_host = [False]


@contextmanager
def host_memory() -> Iterator[None]:
    """Tensors first seen in this block are on the host, whatever their device."""
    before, _on_host[0] = _on_host[0], True
    try:
        yield
    finally:
        _on_host[0] = before


class LiveBytes(TorchDispatchMode):
    """A context manager that counts live bytes: `now`, and the largest value so far, `peak`; on the host
    `host_now` and `host_peak`.

    round_to: sizes are rounded up to a multiple of this many bytes, on the host too (so that a tensor has the
    same size on both sides); 512 counts as torch's CUDA allocator does. call(operation, args, kwargs) returns
    the results of an operation that has no parts to be counted.
    """

    def __init__(self, round_to: int = 1, call: Callable = lambda func, args, kwargs: func(*args, **kwargs)):
        super().__init__()
        self._call = call
        self.round_to, self.now, self.peak, self.host_now, self.host_peak = round_to, 0, 0, 0, 0
        self._known: dict[int, tuple[bool, int]] = {}  # {storage: (on the host?, bytes)}
        self._watched: dict[int, weakref.ref] = {}
        self._lap = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's wrapper against compilation is a sixth of a dry run, and nothing here is compiled."""
        return False

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, such as parameters."""
        for a in tensors:
            self._see(a)
        self.peak = max(self.peak, self.now)

    def lap(self) -> int:
        """The largest value since the last call, or since the start."""
        lap, self._lap = max(self._lap, self.now), self.now
        return lap

    def _see(self, a: Tensor) -> None:
        storage = a.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self.round_to) * self.round_to
        known = self._known.get(key)
        if known is None:
            self._watched[key] = weakref.ref(storage, lambda _: self._free(key))
        elif known[1] == size:  # else it has been resized since
            return
        on_host, before = known or (_on_host[0], 0)
        self._known[key] = on_host, size
        self._change(on_host, size - before)

    def _change(self, on_host: bool, size: int) -> None:
        if on_host:
            self.host_now += size
            self.host_peak = max(self.host_peak, self.host_now)
        else:
            self.now += size

    def _free(self, key: int) -> None:
        del self._watched[key]
        on_host, size = self._known.pop(key)
        self._change(on_host, -size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = REGISTERED.get(func.name()) if func.namespace == "prfl" else None
        if inside is not None:
            with self:
                out = inside(*args, **(kwargs or {}))
        else:
            out = self._call(func, args, kwargs or {})
        for a in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(a, Tensor):
                self._see(a)
        if self.now > self._lap:
            self._lap = self.now
            self.peak = max(self.peak, self.now)
        return out
