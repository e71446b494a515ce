"""The gate in front of every time: an error at most twice that of plain torch in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = 2.0
# Allowed whatever plain torch does: sums of float32 over tokens in another order err by 2.6e-7 where
# plain torch errs by 0.8e-7, and neither is wrong.
ROUNDING = 2.0**-22


def results(function: Callable, inputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """Outputs of function(*inputs), then gradients of a fixed random projection of them for the
    inputs numbered in `wanted`."""
    inputs = [a.detach() for a in inputs]
    for i in wanted:
        inputs[i].requires_grad_()
    with torch.set_grad_enabled(bool(wanted)):
        outputs = tupled(function(*inputs))
    if not wanted:
        return list(outputs)
    gradients = torch.autograd.grad(outputs, [inputs[i] for i in wanted], directions(outputs))
    return [*(o.detach() for o in outputs), *gradients]


def tupled(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def directions(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, the same for outputs of the same shapes on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(o.shape, generator=generator).to(o) for o in outputs]


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of `want`."""
    want = want.double()
    return (got.double() - want).norm().item() / (want.norm().item() or 1.0)


def failure(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> str | None:
    """Why results `got` do not pass beside those of plain torch, `exact` in float64; None if they do."""
    for i, (mine, low, want) in enumerate(zip(got, plain, exact, strict=True)):
        if mine.shape != want.shape:
            return f"result {i}: got {list(mine.shape)}, want {list(want.shape)}"
        limit = FACTOR * error(low, want) + ROUNDING
        if not error(mine, want) <= limit:  # not >: NaN fails
            return f"result {i}: error {error(mine, want):.2e}, want at most {limit:.2e}"
    return None
