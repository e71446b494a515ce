"""Which chains of a pool are drawn: evenly over the range, uniformly, at random, never twice in a row."""

import math
from collections import Counter

import pytest

from prfl_engine.rollout.turns import Turns

# first and last step, chains, draws of an optimizer step, of a window, stride
POOLS = [((0, 38), 10, 5, 1, 1), ((6, 18), 32, 8, 8, 1), ((13, 25), 48, 12, 4, 3), ((2, 2), 4, 2, 1, 1)]


def drawn(steps, pool, count, batch, stride, rounds, seed=0):
    """The turns of every optimizer step."""
    turns = Turns(steps, pool, count, batch, stride, seed)
    total = rounds * pool // count
    return [[turns[s * count + i] for i in range(count)] for s in range(total)]


@pytest.mark.parametrize("pool", POOLS)
def test_every_optimizer_step_sees_the_range_evenly(pool):
    """No two slots of a step are the same, and no arc of the range has a chain more than its share."""
    (first, last), _, count, _, _ = pool
    length = last + 1 - first
    for turns in drawn(*pool, rounds=6):
        assert len({turn.slot for turn in turns}) == count
        places = Counter(turn.index - first for turn in turns)
        assert set(places) <= set(range(length))
        for arc in range(1, length + 1, 3):
            for start in range(length):
                held = sum(places[(start + i) % length] for i in range(arc))
                # One of every stratum: the strata that an arc may touch.
                assert held <= math.ceil(arc * count / length) + 1


@pytest.mark.parametrize("pool", POOLS)
def test_the_graded_steps_are_uniform(pool):
    (first, last), size, _, _, stride = pool
    length = last + 1 - first
    found = [t for turns in drawn(*pool, rounds=length) for t in turns]
    by_slot = Counter((t.slot, t.index) for t in found)
    if stride == 1:  # every slot is drawn once at every step
        assert set(by_slot.values()) == {1} and len(by_slot) == size * length
    seeds = range(20)
    counts = Counter(t.index for s in seeds for turns in drawn(*pool, rounds=length, seed=s) for t in turns)
    mean = len(seeds) * size  # a slot's steps of one run are not independent: this is a generous bound
    assert all(abs(counts[i] / mean - 1) < 0.2 for i in range(first, last + 1))
    starts = {Turns(*pool, seed=s)[0].index for s in range(400)}
    assert starts == set(range(first, last + 1))  # missed with a chance of 39 (38/39)^400 = 1e-3


@pytest.mark.parametrize("pool", [p for p in POOLS if p[1] >= 2 * p[2]])
def test_consecutive_steps_do_not_follow_one_chain(pool):
    before, orders = set(), set()
    for turns in drawn(*pool, rounds=12):
        slots = {turn.slot for turn in turns}
        assert not slots & before
        before = slots
        orders.add(tuple(sorted(slots)))
    if pool[1] // pool[2] > 2:
        assert len(orders) > 12  # the company that a slot is drawn in changes


@pytest.mark.parametrize("pool", POOLS)
def test_a_slot_goes_on_by_the_stride_and_then_begins_another_lap(pool):
    (first, last), _, _, _, stride = pool
    length, at, jumps = last + 1 - first, {}, []
    for turns in drawn(*pool, rounds=40):
        moved = set()
        for turn in turns:
            place = turn.lap * length + turn.index - first
            if turn.slot in at:
                moved.add(place - at[turn.slot])
            at[turn.slot] = place
        assert len(moved) <= 1  # as many forwards whatever the indices: ranks stay in step
        jumps += moved
    assert all(1 <= j < 2 * stride for j in jumps)
    assert sum(jumps) / len(jumps) == pytest.approx(stride, rel=0.1)
