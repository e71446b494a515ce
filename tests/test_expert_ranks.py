"""Both experts of Wan2.2 A14B in several processes: the losses, gradients and runs of one process."""

import expert_cases as cases
import pytest
from ranks import Ranks
from test_shards import check


@pytest.fixture(scope="module")
def two():
    made = Ranks(2, ("expert_cases",))
    yield made
    made.close()


@pytest.fixture(scope="module")
def four():
    made = Ranks(4, ("expert_cases",))
    yield made
    made.close()


@pytest.fixture(params=["two", "four"])
def ranks(request):
    return request.getfixturevalue(request.param)


EQUAL, UNEQUAL = [[2] * 4, [4] * 4], [[0, 1, 0, 2], [1, 4, 3, 3]]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_flow_matching(two, policy):
    check(two, cases.flow_matching, policy)


@pytest.mark.parametrize("window, indices, frozen, resident", [
    (3, EQUAL, None, False), (1, UNEQUAL, None, False), (3, UNEQUAL, None, True), (3, UNEQUAL[1:], 0, False),
    (3, UNEQUAL[1:], 1, True),
], ids=["equal", "unequal", "resident", "high frozen", "low frozen, resident"])  # fmt: skip
def test_graded_steps(two, window, indices, frozen, resident):
    """Windows go through the boundary, and with unequal indices ranks ask other experts at a time."""
    check(two, cases.graded, window, indices, frozen, resident)


def test_on_four_ranks(four):
    """Two copies of the weights, and two ranks a sample."""
    check(four, cases.graded, 3, UNEQUAL, None, False)


def test_an_image(ranks):
    check(ranks, cases.image)


@pytest.mark.parametrize("high, indices", [(4, [[1, 4, 3, 2]]), (1, [[1, 1, 4, 4]])])
def test_updates_with_guidance_and_a_leash(two, high, indices):
    """Also where a step of one expert is not guided, and ranks ask different experts."""
    check(two, cases.leashed, high, indices)


def test_copies_add_up_what_the_last_backward_has_no_part_in(four):
    check(four, cases.accumulated)


def test_resident_weights_of_one_expert_at_a_time(two):
    first, last = two(cases.resident, 5)
    assert first == ([(True, False)], 0)
    assert last == ([(True, False)] * 4 + [(False, True)], 0)
