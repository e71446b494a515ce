"""Fake tensors for dry runs of code that asks small tensors of integers which steps to make."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prfl_kernels import dispatch, extension


class _RealIntegers(TorchDispatchMode):
    """On top of a fake mode: what is made of integers and of real tensors alone is real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if FakeTensor not in types and self._real(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _real(func, args, kwargs) -> bool:
        """Of an operation without fake tensors: whether its result is real."""
        if any(isinstance(a, Tensor) for a in tree_iter((args, kwargs))):
            return True
        dtype = kwargs.get("dtype")
        if dtype is None and func.overloadpacket is torch.ops.aten.arange:
            return all(isinstance(a, int) for a in args)
        return dtype is not None and not dtype.is_floating_point


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors are fake, float32 unless they say otherwise, and kernels allocate and compute nothing."""
    before = dispatch.configured()
    dispatch.configure("")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with default_dtype(torch.float32), fake, _RealIntegers(), extension.dry_run(), torch.device("cpu"):
            yield
    finally:
        dispatch.configure(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype of a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
