"""Makes Triton's interpreter compute bfloat16 and fp8 as a GPU does.

As of Triton 3.9 the interpreter keeps bfloat16 as raw bits, so that arithmetic, reductions and
tl.dot on it are wrong, and it truncates where the hardware rounds to nearest even. `install` replaces
those few methods: operands go to float32, results are rounded. Our kernels compute in float32 and
only load, store, convert and multiply matrices in lower precision.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_LOW = {dtype.name for dtype in (tl.bfloat16, tl.float8e4nv, tl.float8e5)}


def _convert(x: np.ndarray, src, dst, rounding, plain=interpreter._convert_float) -> np.ndarray:
    """The bits of x as dst: round to nearest even, and fp8 saturates, as the hardware does."""
    if src not in _TORCH or dst not in _TORCH:
        return plain(x, src, dst, rounding)
    values = torch.from_numpy(np.ascontiguousarray(x).view(_BITS[x.itemsize]).copy())
    values = values.view(_TORCH[src]).to(torch.float64 if src is tl.float64 else torch.float32)
    if dst in (tl.float8e4nv, tl.float8e5):
        limit = torch.finfo(_TORCH[dst]).max
        values = torch.where(values.isnan(), values, values.clamp(-limit, limit))
    out = values.to(_TORCH[dst])
    bits = _BITS[out.element_size()]
    return out.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[
        out.element_size()
    ]).numpy().view(bits).reshape(x.shape)  # fmt: skip


def _low(handle) -> bool:
    """Whether it holds a type the interpreter cannot compute with."""
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar.name in _LOW


def _float32(handle):
    """The handle's values as float32 where it is low."""
    if _low(handle):
        bits = _convert(handle.data, handle.dtype.scalar, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    return handle


def _rounded(handle, dtype):
    if handle.dtype.scalar != tl.float32:
        return handle
    return interpreter.TensorHandle(_convert(handle.data, tl.float32, dtype, None), dtype)


def _elementwise(name: str) -> None:
    plain = getattr(interpreter.InterpreterBuilder, name)

    def method(self, *arguments):
        low = next((a.dtype.scalar for a in arguments if _low(a)), None)
        if low is None:
            return plain(self, *arguments)
        return _rounded(plain(self, *map(_float32, arguments)), low)

    setattr(interpreter.InterpreterBuilder, name, method)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = _float32(a).data.astype(np.float32), _float32(b).data.astype(np.float32)
    return interpreter.TensorHandle(np.matmul(a, b) + d.data, d.dtype.scalar)


def _patch_once_a_launch() -> None:
    """The interpreter patches the language again at every call of a device function, which is half
    of its time; once a launch and set of globals is enough."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: list[set[int]] = []

    def patch_once(fn):
        if done and id(fn.__globals__) in done[-1]:
            return None  # only a launch restores what it patched, and it comes first
        if done:
            done[-1].add(id(fn.__globals__))
        return patch(fn)

    def call(self, *arguments, **keywords):
        done.append(set())
        try:
            return launch(self, *arguments, **keywords)
        finally:
            done.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, call


def _patch_types() -> None:
    """The interpreter makes a table of all types whenever it asks for one of NumPy's, and constants anew for
    the shape of every tensor: a sixth of its time. Both are made once."""
    plain, init = interpreter._get_np_dtype, tl.tensor.__init__
    types: dict[str, np.dtype] = {}
    shapes: dict[tuple, dict] = {}

    def of_numpy(dtype):
        scalar = dtype.scalar
        if scalar.name not in types:
            types[scalar.name] = plain(scalar)
        return types[scalar.name]

    def made(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            init(self, handle, type)
            shapes[shape] = {k: v for k, v in vars(self).items() if k not in ("handle", "type", "dtype")}
        vars(self).update(shapes[shape], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype, tl.tensor.__init__ = of_numpy, made


def install() -> None:
    if interpreter._convert_float is _convert:
        return
    _patch_once_a_launch()
    _patch_types()
    interpreter._convert_float = _convert
    _elementwise("binary_op")
    _elementwise("unary_op")
    interpreter.InterpreterBuilder.create_dot = _dot
