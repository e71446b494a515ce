"""Right as far as rounding allows: the one home of limits on results that were rounded.

Another processor, another number of threads and another version of torch sum in another order. A limit that
was fitted to the rounding of one of them fails on the next. So limits are derived from two things:

- Torch's own error in the same precision on the same inputs, by plain formulas. It holds what the problem
  itself amplifies, such as terms that cancel. Ours may be twice that.
- A floor for the order of summation, in units of the last bit times a function of the length of the sum:
  `rounding`. Torch's own error may happen to be next to nothing.
"""

import torch
from torch import Tensor


def error(got: Tensor, want: Tensor) -> float:
    """L2 norm of the difference over that of `want`, or over 1 if `want` is zero."""
    norm = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (norm or 1.0)


def rounding(length: int, dtype: torch.dtype = torch.float32, alike: bool = False) -> float:
    """The relative error that summing `length` terms in `dtype` may have in any order.

    With u = eps / 2, each of the additions errs by at most u of the partial sum, by 0.4 u in the root mean
    square, and with either sign. One after the other, with partial sums that grow as the root of their
    length, that is 0.4 u sqrt(length / 2) of the result; pairs and blocks err less. The floor is
    u sqrt(length), which leaves a factor of 3 for several sums in a chain.
    alike: terms that are equal round alike, so their errors add up: u length.
    """
    return torch.finfo(dtype).eps / 2 * (length if alike else length**0.5)


def longest_sum(inputs) -> int:
    """The longest sum that a result of these inputs may need: over all rows of one, or over a row."""
    sizes = [(a.shape[-1], a.numel() // a.shape[-1]) for a in inputs if a is not None and a.numel()]
    return max((n for pair in sizes for n in pair), default=1)


def assert_as_right(
    got: Tensor, exact: Tensor, peer: Tensor, floor: float, what: str = "the result", factor: float = 2.0
) -> None:
    """`got` errs at most `factor` times as much as `peer`, plus `floor`.

    exact: the same in float64; peer: by plain torch in the precision of `got`; floor: `rounding` of the
    longest sum, in float32 whatever the results are rounded to, since sums are in float32.
    """
    assert got.shape == exact.shape
    assert not got.isnan().any(), f"{what} holds NaN"
    found, limit = error(got, exact), factor * error(peer, exact) + floor
    assert found <= limit, f"{what} is off by {found:.2e}, want {limit:.2e}"
