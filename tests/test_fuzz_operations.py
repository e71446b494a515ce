"""Every operation, and every backward form, on random inputs: right for valid ones, refused for others.

Valid inputs are compared with the reference in float64, outputs and gradients. Then one argument of one call
that the operation made, forward or backward, is changed: the call is refused, or the change was valid and the
result is still that of the reference. A few seconds in the suite, always the same inputs; `make fuzz` runs it
for minutes on a build with AddressSanitizer, where reading or writing past a tensor ends the process.
PRFL_FUZZ_SECONDS=n is the time for all tests together, with new inputs every time.
"""

import itertools
import math
import os
import time

import pytest
import torch
from fuzz_cases import DIFFERENTIABLE, FORWARD_ONLY, Case, Inputs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

F64, HALVES = torch.float64, (torch.bfloat16, torch.float16)
SECONDS = float(os.environ.get("PRFL_FUZZ_SECONDS", 0))
EXAMPLES = 8  # of a test in the suite
REFUSED = ValueError, RuntimeError, TypeError
OPERATIONS = DIFFERENTIABLE | FORWARD_ONLY


def fuzz(body, examples: int = EXAMPLES) -> None:
    """body(random.Random) on `examples` inputs, or on new ones for this test's share of SECONDS."""
    run = settings(
        max_examples=examples, derandomize=not SECONDS, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )(given(st.randoms(use_true_random=False))(body))  # fmt: skip
    end = time.monotonic() + SECONDS / (len(DIFFERENTIABLE) + len(OPERATIONS))
    for number in itertools.count():
        if SECONDS:
            seed(number)(run)
        run()
        if time.monotonic() >= end:
            return


def wide(value):
    """An argument of an operation for the reference in float64."""
    if isinstance(value, Tensor):
        return value.detach().to(F64)
    if isinstance(value, torch.dtype):
        return F64
    return "reference" if isinstance(value, str) and value else value  # a group's name is empty


def assert_close(got: Tensor, want: Tensor, coarse: bool) -> None:
    assert got.shape == want.shape
    largest = want.abs().max().item() if want.numel() else 0.0
    assert math.isfinite(largest)
    limit = 4e-2 if coarse or got.dtype in HALVES else 1e-3
    torch.testing.assert_close(got.to(F64), want, rtol=limit, atol=limit * max(1.0, largest))


class Watched(TorchDispatchMode):
    """Keeps every call of an operation of this package."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prfl":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def outputs(case: Case, tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    made = case.run(*tensors, dtype)
    return [made] if isinstance(made, Tensor) else list(made)


def differentiated(case: Case, inputs: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients, and those of the reference in float64."""
    tensors = [None if a is None else a.detach().requires_grad_() for a in case.tensors]
    doubles = [None if a is None else wide(a).requires_grad_() for a in tensors]
    made, want = outputs(case, tensors, case.dtype), outputs(case, doubles, F64)
    directions = [inputs.tensor(*a.shape, dtype=a.dtype) for a in made]
    given = [a for a in tensors if a is not None]
    gradients = torch.autograd.grad(made, given, directions)
    exact = torch.autograd.grad(want, [a for a in doubles if a is not None], [wide(d) for d in directions])
    return [*made, *gradients], [*want, *exact], given


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_valid_inputs_give_what_the_reference_gives(name):
    def body(rng):
        inputs = Inputs(rng)
        case = DIFFERENTIABLE[name](inputs)
        made, want, given = differentiated(case, inputs)
        coarse = any(a.dtype in HALVES for a in [*made, *given])
        for got, exact in zip(made, want, strict=True):
            assert_close(got.detach(), exact.detach(), coarse)

    fuzz(body)


def _resized(a: Tensor, rng) -> Tensor:
    """a with another number of dimensions or another size of one, of ordinary numbers."""
    shape, change = list(a.shape), rng.choice(("more", "fewer", "one", "none", "rank", "flat"))
    if change == "rank" or not shape:
        shape.insert(0, 1)
    elif change == "flat":
        shape = shape[1:]
    else:
        at = rng.randrange(len(shape))
        shape[at] = {"more": shape[at] + 1, "fewer": max(0, shape[at] - 1), "one": 1, "none": 0}[change]
    # Of one shape it stays what the forward made: other numbers need not fit the other arguments.
    return a if a.shape == tuple(shape) else torch.full(shape, 0.5, dtype=torch.float32).to(a.dtype)


def _changed(value, rng):
    """(the argument changed, whether that must be refused)."""
    if isinstance(value, Tensor):
        kind = rng.choice(("shape", "shape", "shape", "dtype", "device"))
        if kind == "shape":
            return _resized(value, rng), False
        if kind == "dtype":
            return value.to(rng.choice((torch.int64, torch.bool, torch.complex64))), True
        return value.to("meta"), False  # alone it is the device of the operation
    if isinstance(value, bool):
        return not value, False
    if isinstance(value, int):
        return rng.choice((0, -1, value + 1, 2 * value + 1, 1000)), False
    if isinstance(value, float):
        return rng.choice((-1.0, 0.0, 0.5, math.nan)), False
    if isinstance(value, torch.dtype):
        return torch.int32, True
    if isinstance(value, str):
        return "nothing", True
    if isinstance(value, (list, tuple)):
        if not value:
            return [1], True
        shorter, zero = list(value[:-1]), [type(n)(0) for n in value]
        return rng.choice((shorter, [*value, value[-1]], zero)), False
    return value, False


def _call(func, args):
    made = func(*args)
    return [made] if isinstance(made, Tensor) else list(made)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_changed_argument_is_refused_or_right(name):
    def body(rng):
        inputs = Inputs(rng)
        case, watched = OPERATIONS[name](inputs), Watched()
        with watched:
            if name in DIFFERENTIABLE:
                differentiated(case, inputs)
            else:
                outputs(case, case.tensors, case.dtype)
        for func, args in watched.calls:
            args = [a.detach() if isinstance(a, Tensor) else a for a in args]
            at = rng.randrange(len(args))
            before, (args[at], refused) = args[at], _changed(args[at], rng)
            plain = [a.shape for a in args if isinstance(a, Tensor)]
            with torch.no_grad():
                try:
                    made = _call(func, args)
                except REFUSED as error:
                    assert str(error)
                    continue
            what = f"{func} took {args[at]!r} for argument {at}, {before!r}, of {plain}"
            # An empty tensor says that something was not kept, whatever its type.
            assert not refused or (isinstance(before, Tensor) and not before.numel()), what
            if name in FORWARD_ONLY or not isinstance(before, Tensor) or args[at].is_meta:
                continue  # another number than the forward's may give any result
            for got, exact in zip(made, _call(func, [wide(a) for a in args]), strict=True):
                assert_close(got, exact, True)

    fuzz(body)
