"""Triton where it is installed, and what every launcher and registration needs.

The kernel files import on a machine without Triton too (macOS, Windows): there the decorator leaves
the kernel alone and the table never chooses it.
"""

from collections.abc import Callable
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
    "REGISTERED", "INTERPRETED", "LIBRARY", "jit", "register", "tl", "triton", "unit_last", "wide",
]  # fmt: skip

# Kernels run as Python on the CPU when TRITON_INTERPRET=1 was set before this import.
INTERPRETED = triton is not None and not isinstance(tl.sum, triton.runtime.JITFunction)
LIBRARY = torch.library.Library("prfl", "DEF")
REGISTERED: dict[str, Callable] = {}  # of every operation, under its full name "prfl::..."


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and reductions run in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


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

    Library.impl costs 3 us a call on a CPU, torch.library.custom_op 8 us; a block makes ten calls.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    REGISTERED[f"prfl::{name}"] = implementation
    torch.library.register_fake(f"prfl::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"prfl::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
