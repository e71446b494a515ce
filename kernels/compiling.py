"""What torch.compile is told about functions, without the import of torch._dynamo."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """torch.compiler.assume_constant_result, which imports torch._dynamo: a CPU second of every start."""
    function._dynamo_marked_constant = True
    return function
