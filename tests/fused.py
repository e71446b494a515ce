"""What every test of a fused kernel does: run it beside plain torch, both against float64."""

import pytest
import torch
from rounding import assert_as_right, longest_sum, rounding
from rounding import error as error

from prfl_kernels import dispatch, jit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(jit.triton is None, reason="Triton is not installed")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def strided(a: torch.Tensor) -> torch.Tensor:
    """The same values with a gap behind every row and sample, as a slice of a larger tensor has."""
    room = torch.full([*(n + 1 for n in a.shape[:-1]), a.shape[-1] + 16], float("nan"))
    view = room.to(a)[tuple(slice(n) for n in a.shape)]
    view.copy_(a)
    return view


def laid_out(a: torch.Tensor, repeats: int) -> torch.Tensor:
    """a [B, L, ...] with its last token `repeats` times, as a padded text has it."""
    return torch.cat([a, *[a[:, -1:]] * (repeats - 1)], dim=1)


def outputs_and_gradients(op, inputs, wanted=None, seed=0):
    """Outputs of op(*inputs), and the gradients of a fixed random projection of them.

    inputs may hold None; wanted gives the indices of the inputs to differentiate (all if None).
    """
    wanted = [i for i, a in enumerate(inputs) if a is not None] if wanted is None else wanted
    inputs = [a if a is None else a.detach() for a in inputs]
    for i in wanted:
        inputs[i].requires_grad_()
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, [inputs[i] for i in wanted], directions)
    return [o.detach() for o in outputs], list(gradients)


def assert_gradients_alone(op, inputs):
    """Each gradient that is asked for alone is the same to the bit as with all others."""
    every, given = outputs_and_gradients(op, inputs)[1], [i for i, a in enumerate(inputs) if a is not None]
    for i, want in zip(given, every, strict=True):
        (got,) = outputs_and_gradients(op, inputs, [i])[1]
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def assert_of_nothing(op, inputs, shape):
    """Inputs without a token: outputs of that shape, and no gradient for what is there nevertheless."""
    outputs, gradients = outputs_and_gradients(op, inputs)
    assert all(o.shape == shape for o in outputs)
    given = [a for a in inputs if a is not None]
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, given, strict=True))


def assert_transposed_gradients(op, inputs, shape):
    """Attention may return its gradient as [B, H, L, D] seen as [B, L, H, D]: shape [B, H, L, D]."""
    inputs, direction = [a.requires_grad_() for a in inputs], normal(*shape).transpose(1, 2)
    outputs = op(*inputs)
    got = torch.autograd.grad(outputs, inputs, [direction] * len(outputs), retain_graph=True)
    want = torch.autograd.grad(outputs, inputs, [direction.contiguous()] * len(outputs))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def assert_as_good_as_torch(op, inputs, reference=None, wanted=None, factor=2.0, chain=1):
    """Every output and gradient of op is as right as that of plain torch (see rounding.py).

    Both are compared with plain torch in float64. `reference` is op on the reference by default. chain: how
    many sums feed each other; their errors add up as those of one sum that is as long as all of them.
    """
    ours = outputs_and_gradients(op, inputs, wanted)
    reference = reference or on_reference(op)
    plain = outputs_and_gradients(reference, inputs, wanted)
    exact = outputs_and_gradients(reference, [a if a is None else a.double() for a in inputs], wanted)
    assert_all_as_right(ours, exact, plain, rounding(chain * longest_sum(inputs)), factor)


def assert_all_as_right(ours, exact, plain, floor, factor=2.0):
    """The same of what outputs_and_gradients returns."""
    for i, (got, want, low) in enumerate(zip(sum(ours, []), sum(exact, []), sum(plain, []), strict=True)):
        assert got.dtype == low.dtype
        assert_as_right(got, want, low, floor, f"result {i}", factor)


def on_reference(op, choice="reference"):
    """op by plain torch, or by another choice of kernels."""

    def run(*inputs):
        before = dispatch.configured()
        dispatch.configure(choice)
        try:
            return op(*inputs)
        finally:
            dispatch.configure(before)

    return run
