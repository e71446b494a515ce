"""The limits on rounded results: any order of summation is within them, a small fault is not."""

import pytest
import torch
from cpu_cases import NAMES, row_case
from fused import assert_as_good_as_torch, error, laid_out, normal, outputs_and_gradients
from rounding import assert_as_right, rounding

from prfl_bench import formulas

F32, BF16 = torch.float32, torch.bfloat16


def in_sequence(x):
    """The sum of the rows, one after the other."""
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("length", [2, 30, 1000])
def test_a_sum_in_sequence_is_within_the_floor(length, dtype):
    x = normal(length, 4096, dtype=dtype)
    assert error(in_sequence(x), x.double().sum(0)) <= rounding(length, dtype) / 2


def test_terms_that_are_equal_round_alike():
    """Only the linear floor holds for them."""
    x = normal(1, 64).expand(3000, -1)
    found = error(in_sequence(x), x.double().sum(0))
    assert rounding(3000) < found <= rounding(3000, alike=True)


def off(reference, factor):
    """`reference` with its last result, and the gradients that come through it, off by a factor."""

    def run(*inputs):
        made = reference(*inputs)
        return (*made[:-1], factor * made[-1]) if isinstance(made, tuple) else factor * made

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [96, 1536])
def test_a_factor_of_a_ten_thousandth_is_caught(name, width):
    _, reference, inputs = row_case(name, 1, 37, width)
    assert_as_good_as_torch(off(reference, 1.0), inputs, reference)
    with pytest.raises(AssertionError, match="is off by .*want .*e-0[678]"):
        assert_as_good_as_torch(off(reference, 1 + 1e-4), inputs, reference)


def test_a_repeated_token_that_counts_once_too_often_is_caught():
    """The linear floor of 400 equal terms is 2.4e-5; one of 400 is 2.5e-3."""
    x, u = normal(1, 20, 16), normal(3, 16) / 4
    runs = [lambda x, u, n=n: formulas.reward_pool_with_lse(laid_out(x, n), u) for n in (400, 401)]
    exact, plain, wrong = (
        sum(outputs_and_gradients(run, [a.to(dtype) for a in (x, u)]), [])
        for run, dtype in ((runs[0], torch.float64), (runs[0], F32), (runs[1], F32))
    )
    floor = rounding(420, alike=True)
    for a, want, low in zip(wrong, exact, plain, strict=True):
        with pytest.raises(AssertionError, match="want .*e-05"):
            assert_as_right(a, want, low, floor)
