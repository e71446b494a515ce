"""An operation of torch.ops.prfl, declared by one function.

    @operation("rms_norm", _gradient, _setup_context)
    def _rms_norm(fake: bool, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:

The annotations and defaults are the schema. The function checks its arguments (`prfl_kernels.checks`),
allocates the results and, unless it is called for fake tensors, has an implementation fill them. So eager
calls, torch.compile and fake tensors refuse the same arguments and get results of the same shapes and dtypes.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from prfl_kernels.extension import empty
from prfl_kernels.jit import register

_TYPES = {
    Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType",
}  # fmt: skip


def schema(hint: Any) -> str:
    """A type as a schema spells it: those of _TYPES, tuples of one of them, or one of these or None."""
    options = get_args(hint)
    if get_origin(hint) is tuple:
        return f"{schema(options[0])}[{'' if options[-1] is ... else len(options)}]"
    return f"{schema(options[0])}?" if type(None) in options else _TYPES[hint]


def operation(
    name: str, gradient: Callable | None = None, setup_context: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Register function(fake, *arguments) as torch.ops.prfl.NAME; `gradient` and `setup_context` are those of
    torch.library.register_autograd. The function stays as it is."""

    def registered(function: Callable) -> Callable:
        _, *arguments, (_, results) = get_type_hints(function).items()
        parameters = signature(function).parameters.items()
        ends = {k: "" if a.default is a.empty else f"={a.default}" for k, a in parameters}
        given = ", ".join(f"{schema(hint)} {argument}{ends[argument]}" for argument, hint in arguments)
        made = ", ".join(map(schema, get_args(results) or (results,)))
        made = f"({made})" if get_args(results) else made
        functions = partial(function, False), partial(function, True)
        register(f"{name}({given}) -> {made}", *functions, gradient, setup_context)
        return function

    return registered


def allocator(fill: Callable | None) -> Callable[..., Tensor]:
    """`empty`, for fake tensors (without fill) as torch has it, which asks nothing of a size."""
    return Tensor.new_empty if fill is None else empty


def or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, and an empty one [0] for None, as the results of an operation."""
    return tuple([like.new_empty(0) if a is None else a for a in tensors])


def gradients_like(parameter: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """`or_empty` of the gradients in the dtype of their parameter."""
    return tuple(parameter.new_empty(0) if a is None else a.to(parameter.dtype) for a in gradients)
