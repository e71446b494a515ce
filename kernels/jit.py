"""Triton where it is installed, and what every launcher and registration needs.

The kernel files import on a machine without Triton too (macOS, Windows): there the decorator leaves
the kernel alone and `dispatch` never chooses it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib import metadata
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
except ModuleNotFoundError:
    triton, tl = None, SimpleNamespace(constexpr=object, dtype=object)

    def jit(fn: Callable) -> Callable:
        return fn


__all__ = [
    "REGISTERED", "INTERPRETED", "LIBRARY", "absence", "jit", "launch", "on", "register", "tl", "triton",
    "unit_last", "wide",
]  # fmt: skip

# Kernels run as Python on the CPU when TRITON_INTERPRET=1 was set before this import.
INTERPRETED = triton is not None and not isinstance(tl.sum, triton.runtime.JITFunction)
LIBRARY = torch.library.Library("prfl", "DEF")
AUTOCAST_DEVICES = ("cpu", "cuda")
REGISTERED: dict[str, Callable] = {}  # of every operation, under its full name "prfl::..."


def absence(device_type: str) -> str | None:
    """Why Triton kernels do not run on a device, to follow "it"; None if they do."""
    if INTERPRETED:
        return interpreter_fault()
    if device_type != "cuda":
        return "needs a cuda device (or TRITON_INTERPRET=1 in the environment)"
    return "triton is not installed" if triton is None else None


@jit
def _loop(out, n):
    for i in range(n):
        tl.store(out + i, i)


@cache
def interpreter_fault() -> str | None:
    """Why Triton's interpreter runs no loop here, as that of 3.4 with NumPy 2.4 and of 3.6 with NumPy 2.5;
    None if it does."""
    try:
        launch(_loop, (1,), torch.empty(2, device="cpu"), 2)
    except triton.runtime.errors.InterpreterError as error:
        numpy = metadata.version("numpy")
        return f"needs another Triton or NumPy: the interpreter of {triton.__version__} with {numpy}: {error}"
    return None


def launch(kernel: Callable, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the device of its tensors: the one way to launch a kernel.

    Triton itself launches on the current device, wherever the tensors are. Raises ValueError for tensors of
    several devices, or none.
    """
    device = None
    for a in arguments:
        if not isinstance(a, torch.Tensor):
            a = getattr(a, "base", None)  # a descriptor's tensor
        if a is not None and a.device != device:
            if device is not None:
                both = f"{device} and {a.device}"
                raise ValueError(f"kernels: {kernel.__name__} got tensors on {both}, want one device")
            device = a.device
    if device is None:
        raise ValueError(f"kernels: {kernel.__name__} got no tensor, want at least one")
    with on(device):
        kernel[grid](*arguments, **options)


def on(device: torch.device) -> AbstractContextManager:
    """A block in which a CUDA device is the current one. Other devices, and fake tensors of a machine that
    does not use CUDA, need none."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and reductions run in: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_last(a: torch.Tensor | None) -> torch.Tensor | None:
    """`a` with contiguous rows: itself, or a copy if its last dimension is strided."""
    return a if a is None or a.stride(-1) == 1 else a.contiguous()


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define torch.ops.prfl.<name> from its schema, with its fake and, if given, its gradient.

    Implementation and gradient run with autocast off: an operation computes in the dtypes it was told.
    Library.impl costs 3 us a call on a CPU, torch.library.custom_op 8 us; a block makes ten calls. Under
    autocast a call costs 7 us more; without it the dispatcher never gets there.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    operation = getattr(torch.ops.prfl, name).default
    for device in AUTOCAST_DEVICES:
        LIBRARY.impl(name, _off(device, operation), f"Autocast{device.upper()}")
    REGISTERED[f"prfl::{name}"] = implementation
    torch.library.register_fake(f"prfl::{name}", fake, lib=LIBRARY)
    if backward is not None:
        differentiable = _differentiable(operation, _without_autocast(backward), setup_context)
        LIBRARY.impl(name, differentiable, "Autograd", with_keyset=True)


def _differentiable(
    operation: torch._ops.OpOverload, backward: Callable, setup_context: Callable
) -> Callable:
    """What torch.library.register_autograd makes, for an operation without lists of tensors. torch's reads
    the schema in every call, to fill in defaults: for 39 arguments that takes the host 0.3 ms."""
    defaults = [a.default_value for a in operation._schema.arguments]

    def below(keyset: torch._C.DispatchKeySet, args: tuple):
        return operation.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, *args):
        *args, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            output = below(keyset, args)
            # The dispatcher leaves out the last arguments where they are the defaults.
            setup_context(ctx=ctx, inputs=(*args, *defaults[len(args) :]), output=output)
        return output

    def gradients(ctx, *of_outputs):
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[:-1]  # not of the keyset
        try:
            made = backward(ctx, *of_outputs)
        finally:
            ctx.needs_input_grad = needs
        return (*made, None) if isinstance(made, tuple) else (made, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(f"prfl_{operation._opname}", (torch.autograd.Function,), methods)

    def run(keyset, *args):
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return below(keyset, args)

    return run


def _off(device: str, run: Callable) -> Callable:
    """`run` with autocast off on `device`."""

    @wraps(run)
    def plain(*args):
        with torch.autocast(device, enabled=False):
            return run(*args)

    return plain


def _without_autocast(gradient: Callable) -> Callable:
    """A gradient formula with autocast off on the device of what it gets: a backward can be called under
    autocast, or under another one than the forward was."""
    plain = {device: _off(device, gradient) for device in AUTOCAST_DEVICES}

    @wraps(gradient)
    def run(ctx, *gradients):
        device = next((a.device.type for a in gradients if a is not None), None)
        if device in plain and torch.is_autocast_enabled(device):
            return plain[device](ctx, *gradients)
        return gradient(ctx, *gradients)

    return run
