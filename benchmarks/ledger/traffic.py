"""Bytes and operations of a kernel launch, counted in Triton's interpreter at the full shape.

`count` runs a function on meta tensors. Every tensor argument of a launch gets an address range of
its own; loads return zeros, stores go nowhere, and the lanes that a mask lets through are counted
for each argument. An address outside its tensor raises. Of each axis of the grid the first, the
middle and the last program run, and of each loop the first, the middle and the last iteration; those
between first and last are taken to do what the middle one does. That holds for kernels that split
their work evenly and compute masks from the loop's counter, not from what a loop carries along
(tests/test_ledger.py compares with every program and iteration). TRITON_INTERPRET=1 has to be set
before this is imported.

A small tensor that the function's kernels or torch wrote is marked where it is read again: partial sums
come from the L2 in all likelihood, so such reads are counted apart.

Floating-point operations are counted twice over: 2 M N K for every tl.dot, and as "elementwise" one
a lane (padding too, it takes the same time) for every other arithmetic operation, comparison,
function and reduction; not for conversions and selections.
"""

import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from prfl_kernels.jit import INTERPRETED, tl

np = interpreter.np
CACHED = 25 << 20  # bytes of a tensor that the 50 MB L2 of an H100 may still hold: half of it
SPACE = 44  # bits of an argument's address range, 16 TiB
ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_fabs", "create_rsqrt")
Handle = interpreter.TensorHandle


class _Argument:
    """A tensor's place in the fake address space."""

    def __init__(self, index: int, name: str, tensor: torch.Tensor):
        self.name, self.tensor, self.dtype = name, tensor, tensor.dtype
        self.base = (index + 1) << SPACE
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.extent = span * tensor.element_size()

    def data_ptr(self) -> int:
        return self.base

    def stride(self, *axis):
        return self.tensor.stride(*axis)

    @property
    def shape(self):
        return self.tensor.shape


class _Meter:
    """Counts what one program does: {("read" | "written", argument) | ("dot", ...) | ...: number}."""

    def __init__(self, kernel: str, arguments: list[_Argument]):
        self.kernel, self.arguments = kernel, arguments
        self.counts: Counter = Counter()
        self.weight = 1  # how often what happens now happens

    def access(self, side: str, pointers: Handle, mask: Handle) -> None:
        selected = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not selected.size:
            return
        first, last = int(selected.min()), int(selected.max())
        index = (first >> SPACE) - 1
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        known = 0 <= index < len(self.arguments)
        if not known or last + size > self.arguments[index].base + self.arguments[index].extent:
            name = self.arguments[index].name if known else "a tensor"
            raise ValueError(f"ledger: {self.kernel}: got an address outside {name}, want none")
        name = self.arguments[index].name
        if ("read", name) not in self.counts and ("written", name) not in self.counts:
            self.counts["first", side, name] = 1
        self.counts[side, name] += self.weight * selected.size * size
        if pointers.data.size > 1:
            self.counts["blocks", name] = 1

    def dot(self, a: Handle, b: Handle, precision: Any) -> None:
        (m, k), n = a.data.shape[-2:], b.data.shape[-1]
        batch = a.data.size // (m * k)
        key = ("dot", m, n, k, a.dtype.scalar.name, getattr(precision, "name", "IEEE"))
        self.counts[key] += self.weight * batch

    def elementwise(self, *handles: Any) -> None:
        lanes = max(h.data.size for h in handles if isinstance(h, Handle))
        self.counts["elementwise"] += self.weight * lanes

    def loop(self, *bounds: Any, **_: Any) -> Iterator[int]:
        """range(*bounds), of which only the first, middle and last number come: the middle one for all
        that are left out."""
        numbers = range(*(int(b) for b in bounds))
        for i in sampled(len(numbers)):
            self.weight *= i[1]
            try:
                yield numbers[i[0]]
            finally:
                self.weight //= i[1]


def sampled(n: int) -> list[tuple[int, int]]:
    """(place, how many it stands for) of the first, middle and last of n places."""
    if n <= 3:
        return [(i, 1) for i in range(n)]
    return [(0, 1), (n // 2, n - 2), (n - 1, 1)]


_meter: list[_Meter] = []


def _floating(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar.is_floating()


def _zeros(shape: tuple[int, ...], dtype: Any) -> Handle:
    return Handle(np.zeros(shape, interpreter._get_np_dtype(dtype.scalar)), dtype.scalar)


def _load(self, pointers, mask, other, *rest, **options):
    _meter[-1].access("read", pointers, mask)
    return _zeros(pointers.data.shape, pointers.get_element_ty())


def _store(self, pointers, value, mask, *rest, **options):
    _meter[-1].access("written", pointers, mask)


def _dot(self, a, b, d, precision, *rest):
    _meter[-1].dot(a, b, precision)
    return d


def _converted(plain: Callable) -> Callable:
    def convert(self, source, target, *rest):
        if _floating(source) and target.scalar.is_floating():
            return _zeros(source.data.shape, target)
        return plain(self, source, target, *rest)

    return convert


def _counted(plain: Callable) -> Callable:
    def method(self, *arguments):
        if _floating(arguments[0]):
            _meter[-1].elementwise(*arguments)
        return plain(self, *arguments)

    return method


def _reduced(plain: Callable) -> Callable:
    def apply(self, inputs):
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        if _floating(first.handle):
            _meter[-1].elementwise(first.handle)
        return plain(self, inputs)

    return apply


@contextmanager
def _counting(launched: Callable):
    """The interpreter with counters in place of memory, matrix products and launches."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    replaced = [
        (builder, "create_masked_load", _load),
        (builder, "create_masked_store", _store),
        (builder, "create_dot", _dot),
        (builder, "cast_impl", _converted(builder.cast_impl)),
        (builder, "create_fp_to_fp", _converted(builder.create_fp_to_fp)),
        *((builder, name, _counted(getattr(builder, name))) for name in ARITHMETIC),
        (interpreter.ReduceOps, "apply_impl", _reduced(interpreter.ReduceOps.apply_impl)),
        (executor, "_init_args_hst", lambda self, arguments, keywords: (arguments, keywords)),
        (executor, "_restore_args_dev", lambda self, *rest: None),
        (executor, "__call__", launched),
    ]  # fmt: skip
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, method in replaced:
        setattr(owner, name, method)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        for owner, name, method in plain:
            setattr(owner, name, method)


@contextmanager
def _program(place: tuple[int, ...], grid: tuple[int, ...]):
    """Make the interpreter's one program the one at `place` of the grid, and patch tl only once."""
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    patched: set[int] = set()
    folded: list[dict[str, Any]] = []

    def once(fn):
        """Device functions ask at every call, which costs more than they do themselves."""
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        scope = patch(fn)
        if not fn.__module__.startswith("triton."):
            folded.append(fn.__globals__)
            fn.__globals__["range"] = tl.range = _meter[-1].loop
        return scope

    def at(*_):
        builder.grid_dim, builder.grid_idx = grid, place

    interpreter._patch_lang, builder.set_grid_dim, builder.set_grid_idx = once, at, at
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        for names in folded:
            names.pop("range", None)
        del builder.set_grid_dim, builder.set_grid_idx


def total(grid: tuple[int, ...], run: Callable[[tuple[int, ...]], Counter]) -> Counter:
    """Sum of run(place) over the grid, from the first, middle and last place of every axis.

    An axis along which they do alike is not varied further.
    """
    known: dict[tuple[int, ...], Counter] = {}

    def at(place: tuple[int, ...]) -> Counter:
        if place not in known:
            known[place] = run(place)
        return known[place]

    middle = tuple(n // 2 for n in grid)
    axes = []
    for axis, n in enumerate(grid):
        places = sampled(n)
        alike = all(at((*middle[:axis], i, *middle[axis + 1 :])) == at(middle) for i, _ in places)
        axes.append([(middle[axis], n)] if alike else places)
    found: Counter = Counter()
    for places in itertools.product(*axes):
        weight = 1
        for _, times in places:
            weight *= times
        for key, value in at(tuple(i for i, _ in places)).items():
            found[key] += weight * value
    return found


class _Written:
    """What was written since counting began."""

    def __init__(self):
        self.storages: dict[int, Any] = {}  # kept, so that no later one gets the same address

    def add(self, a: torch.Tensor) -> None:
        storage = a.untyped_storage()
        self.storages[storage._cdata] = storage

    def cached(self, a: torch.Tensor) -> bool:
        storage = a.untyped_storage()
        return storage._cdata in self.storages and storage.nbytes() <= CACHED


class _TorchTraffic(TorchDispatchMode):
    """Bytes that torch operations on meta tensors read and write: second stages, copies."""

    def __init__(self, written: _Written):
        super().__init__()
        self.written = written
        self.memory, self.cached = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        given = {name: a for name, a in (kwargs or {}).items() if name != "out"}
        inputs = [a for a in leaves((args, given)) if isinstance(a, torch.Tensor)]
        outputs = [a for a in leaves(out) if isinstance(a, torch.Tensor)]
        held = {a.untyped_storage()._cdata for a in inputs}
        views = all(a.untyped_storage()._cdata in held for a in outputs)
        name = func.overloadpacket.__name__
        in_place = name.endswith("_")
        if "empty" not in name and (in_place or not views) and all(a.is_meta for a in inputs + outputs):
            read = [] if name.startswith("new_") or name.endswith("_like") else inputs
            for a in read:
                counter = self.cached if self.written.cached(a) else self.memory
                counter[name] += a.nbytes
            for a in outputs:
                self.memory[name] += a.nbytes
                self.written.add(a)
        return out


def _launch(executor: Any, one: Callable, arguments: tuple, keywords: dict, written: _Written) -> dict:
    """The counts of a launch; one(executor, **arguments) runs a single program."""
    parameters = inspect.signature(executor.fn).parameters
    bound = inspect.signature(executor.fn).bind(
        *arguments, **{k: v for k, v in keywords.items() if k in parameters}
    )
    grid = executor.grid(bound.arguments) if callable(executor.grid) else executor.grid
    grid = (*grid, 1, 1)[:3]
    tensors: list[_Argument] = []
    for name, value in bound.arguments.items():
        held = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(held, torch.Tensor):
            tensors.append(_Argument(len(tensors), name, held))
            place = tensors[-1]
            if isinstance(value, TensorDescriptor):
                place = TensorDescriptor(place, value.shape, value.strides, value.block_shape)
            bound.arguments[name] = place
    single = interpreter.GridExecutor(executor.fn, executor.arg_names, (1, 1, 1))

    def run(place: tuple[int, ...]) -> Counter:
        _meter.append(_Meter(executor.fn.__name__, tensors))
        try:
            with _program(place, grid):
                one(single, **bound.arguments)
            return _meter[-1].counts
        except InterpreterError as error:
            while error.__cause__ is not None:
                error = error.__cause__
            raise error from None
        finally:
            _meter.pop()

    counts = total(grid, run)
    cached = {a.name for a in tensors if written.cached(a.tensor)}
    for a in tensors:
        if counts["written", a.name]:
            written.add(a.tensor)
    return {
        "kernel": executor.fn.__name__,
        "grid": list(grid),
        "arguments": [
            {
                "name": a.name, "shape": list(a.tensor.shape), "dtype": str(a.dtype).removeprefix("torch."),
                "footprint": a.tensor.nbytes,
                "read": counts["read", a.name], "written": counts["written", a.name],
                "scalar": not counts["blocks", a.name],
                "cached": a.name in cached or ("first", "written", a.name) in counts,
            }
            for a in tensors
        ],
        "dots": [[*key[1:], number] for key, number in counts.items() if key[0] == "dot"],
        "elementwise": counts["elementwise"],
    }  # fmt: skip


def count(call: Callable[[], Any]) -> tuple[Any, list[dict], dict[str, dict[str, int]]]:
    """(what call() returns, the counts of every launch, those of torch: {"memory" | "cached": {operation:
    bytes}})."""
    if not INTERPRETED:
        raise ValueError("ledger: got no TRITON_INTERPRET, want it set to 1 before Triton is imported")
    found: list[dict] = []
    written = _Written()
    one = interpreter.GridExecutor.__call__

    def launched(self, *arguments, **keywords):
        found.append(_launch(self, one, arguments, keywords, written))

    with _counting(launched), _TorchTraffic(written) as traffic:
        result = call()
    return result, found, {"memory": dict(traffic.memory), "cached": dict(traffic.cached)}
