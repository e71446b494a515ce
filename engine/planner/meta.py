"""Tensors on the meta device, without values, for dry runs of code that asks small tensors of integers which
steps to make."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from prfl_engine.parallel import cut_modules
from prfl_kernels import dispatch, exchange, extension


class _MetaFloats(TorchFunctionMode):
    """What is made anew, not from given numbers or tensors, is on the meta device unless it is of integers or
    the call names a device."""

    def __init__(self):
        super().__init__()
        self._makers = _device_constructors() - {torch.tensor, torch.as_tensor}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._makers and kwargs.get("device") is None and self._of_floats(func, args, kwargs):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)

    @staticmethod
    def _of_floats(func, args, kwargs) -> bool:
        dtype = kwargs.get("dtype")
        if dtype is None:
            return func is not torch.arange or not all(isinstance(a, int) for a in args)
        return dtype.is_floating_point


@contextmanager
def meta_tensors() -> Iterator[None]:
    """New tensors have no values and are float32 unless they say otherwise, and kernels allocate what the
    compiled CPU kernels do and compute nothing."""
    before = dispatch.configured()
    dispatch.configure("")
    try:
        with default_dtype(torch.float32), extension.dry_run(), _MetaFloats(), _silent_exchange():
            yield
    finally:
        dispatch.configure(before)


def call(func: Callable, args: tuple, kwargs: dict) -> Any:
    """func(*args, **kwargs) for an operation of torch. The most frequent ones on the meta device are Python
    decompositions in torch, half the time of a dry run; their results are allocated here instead."""
    form = _FORMS.get(func)
    made = None if form is None or kwargs else form(*args)
    return func(*args, **kwargs) if made is None else made


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _empty((*x.shape[:-1], len(weight)), x.dtype) if x.is_meta else None


def _in_place(a: Tensor, *_) -> Tensor | None:
    return a if a.is_meta else None


def _elementwise(a: Tensor, b: Tensor | float) -> Tensor | None:
    """Where the result has the shape of a contiguous a."""
    shape, other = a.shape, b.shape if isinstance(b, Tensor) else ()
    if not (a.is_meta and a.is_contiguous() and len(other) <= len(shape)):
        return None
    if any(n not in (1, m) for n, m in zip(other, shape[len(shape) - len(other) :], strict=True)):
        return None
    return _empty(shape, torch.result_type(a, b))


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_FORMS = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.addmm_.default: _in_place,
    torch.ops.aten.mul.Tensor: _elementwise,
    torch.ops.aten.add.Tensor: _elementwise,
}


class _OneOf(exchange.SequenceGroup):
    """The first of `size` ranks of which no other exists."""

    def __init__(self, size: int, heads: int):
        self.name, self.size, self.rank = "dry run", size, 0
        exchange._GROUPS[self.name] = None
        self._split(heads)

    def _parts(self) -> tuple[str, str]:
        return self.name, self.name


def cut(model: nn.Module, ranks: int) -> nn.Module:
    """The model with its sequences cut over so many ranks, of which it is the first. Returns it."""
    return model if ranks == 1 else cut_modules(model, partial(_OneOf, ranks))


COLLECTIVES = "all_to_all_single", exchange.GATHER, exchange.REDUCE
traffic = [0]  # bytes of the larger side of all exchanges in dry runs so far


def _counted(found: torch.Tensor, given: torch.Tensor, *_, **__) -> None:
    traffic[0] += max(found.nbytes, given.nbytes)


@contextmanager
def _silent_exchange() -> Iterator[None]:
    """Collectives of a sequence group are counted and leave what they fill as it was allocated."""
    silent = {name: _counted for name in COLLECTIVES}
    before, exchange.dist = exchange.dist, SimpleNamespace(get_rank=lambda _: 0, **silent)
    try:
        yield
    finally:
        exchange.dist = before


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype of a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
