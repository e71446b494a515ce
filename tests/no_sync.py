"""A watch for host syncs that needs no GPU: tensors are named that would be on one, and followed."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prfl_kernels.jit import REGISTERED

aten = torch.ops.aten
# What waits for the device: a number taken out, a comparison of contents, a result whose size is data.
SYNCS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.is_nonzero.default,
}  # fmt: skip


class NoSync(TorchDispatchMode):
    """Inside, AssertionError at a sync on the tensors given to `add` or anything computed from them.

    Tensors made of numbers and of nothing followed count as the host's, such as step indices.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self._followed: set[int] = set()
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for a in tensors:
            storage = a.untyped_storage()
            if storage._cdata not in self._followed:
                self._followed.add(storage._cdata)
                weakref.finalize(storage, self._followed.discard, storage._cdata).atexit = False

    def _follows(self, values) -> bool:
        found = (a for a in tree_iter(values) if isinstance(a, Tensor))
        return any(a.untyped_storage()._cdata in self._followed for a in found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        follows = self._follows((args, kwargs))
        by_mask = func is aten.index.Tensor and any(
            a is not None and a.dtype in (torch.bool, torch.uint8) for a in args[1]
        )
        if follows and (func in SYNCS or by_mask):
            raise AssertionError(f"{func} waits for the device")
        inside = REGISTERED.get(func.name()) if func.namespace == "prfl" else None
        if inside is not None:
            with self:
                out = inside(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if follows:
            self.add(a for a in tree_iter(out) if isinstance(a, Tensor))
        return out


class NoBlockingCopy(TorchFunctionMode):
    """Inside, AssertionError where a tensor that is not followed goes to a device by a copy that blocks:
    without non_blocking, or by a constructor that is given numbers."""

    def __init__(self, watch: NoSync):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            raise AssertionError("torch.tensor copies numbers to the device and waits")
        moves = func is Tensor.to and any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))
        if moves and not kwargs.get("non_blocking") and not self.watch._follows(args[:1]):
            raise AssertionError("a copy from the host waits for the device")
        return func(*args, **kwargs)
