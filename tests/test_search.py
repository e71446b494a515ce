"""The search for a row of blocks: against brute force, and a knapsack at the length of real models."""

import itertools

import numpy as np
import pytest

from prfl_engine.planner import search as search
from prfl_engine.planner.search import Blocks, Tails


def problem(rng, kinds: int = 4, phases: int = 2, tails: int = 3, alike: bool = False, top: int = 20):
    """Random numbers; alike: in all phases blocks keep the same bytes, as the real ones do."""

    def bytes_of(*shape):
        made = rng.integers(0, top, (*shape, phases))
        return made[..., :1].repeat(phases, -1) if alike else made

    peaks = [rng.integers(0, 3 * top, (kinds + 1, kinds, phases)) for _ in range(2)]
    blocks = Blocks(
        rng.integers(1, top, kinds), rng.integers(0, top, kinds) * rng.integers(0, 2, kinds),
        bytes_of(kinds), peaks[0], bytes_of(kinds), peaks[1],
    )  # fmt: skip
    ends = rng.integers(0, 4 * top, (tails, phases))
    return blocks, Tails(rng.integers(1, top, tails), rng.integers(0, top, tails), ends)


def totals(blocks: Blocks, tails: Tails, row: tuple[int, ...], tail: int) -> tuple[int, int, int]:
    """(cost, away, peak) by the letter."""
    kept, peaks, *inner = 0, [], *row[:-1]
    before = -1  # none
    for kind in inner:
        peaks.append(kept + blocks.peak[before, kind])
        kept, before = kept + blocks.saved[kind], kind
    peaks.append(kept + blocks.peak_last[before, row[-1]])
    peaks.append(kept + blocks.saved_last[row[-1]] + tails.peak[tail])
    cost = sum(blocks.cost[k] for k in row) + tails.cost[tail]
    away = sum(blocks.host[k] for k in inner) + tails.host[tail]
    return int(cost), int(away), int(np.max(peaks))


def all_rows(blocks: Blocks, tails: Tails, count: int) -> list[tuple[int, int, int]]:
    rows = itertools.product(range(len(blocks.cost)), repeat=count)
    return [totals(blocks, tails, row, t) for row in rows for t in range(len(tails.cost))]


@pytest.mark.parametrize("count, seeds", [(1, 8), (2, 10), (3, 15), (4, 12), (5, 3)])
@pytest.mark.parametrize("alike, first", [(False, 100), (True, 100), (False, 1)])
def test_the_row_is_that_of_brute_force(count, seeds, alike, first, monkeypatch):
    """The least cost, then the fewest bytes away, then the lowest peak; and the row is what it says. A first
    walk that follows a single end leaves the row to the second."""
    monkeypatch.setattr(search, "WIDTHS", (first, 10_000))
    for seed in range(seeds):
        blocks, tails = problem(np.random.default_rng(seed), alike=alike)
        every = all_rows(blocks, tails, count)
        peaks, aways = (sorted({row[i] for row in every}) for i in (2, 1))
        assert search.least(blocks, tails, count, aways[-1]).peak == peaks[0]
        budgets = (peaks[0] - 1, peaks[0], peaks[len(peaks) // 8], peaks[len(peaks) // 3], search.UNLIMITED)
        for budget, away in itertools.product(budgets, (aways[0], aways[len(aways) // 3], search.UNLIMITED)):
            fitting = [row for row in every if row[2] <= budget and row[1] <= away]
            found, bound = search.search(blocks, tails, count, budget, away)
            if not fitting:
                assert found is None and bound == np.inf
                continue
            assert (found.cost, found.host, found.peak) == min(fitting)
            assert totals(blocks, tails, tuple(found.kinds), found.tail) == min(fitting)
            assert bound == found.cost


def test_a_narrow_walk_says_how_far_it_may_be_from_the_best(monkeypatch):
    """Never below the best row, which is never below the bound; and some of the walks do miss it."""
    missed = 0
    monkeypatch.setattr(search, "WIDTHS", (2,))
    for seed in range(40):
        blocks, tails = problem(np.random.default_rng(seed))
        every = all_rows(blocks, tails, 4)
        budget = sorted(row[2] for row in every)[len(every) // 50]
        best = min(row[0] for row in every if row[2] <= budget)
        found, bound = search.search(blocks, tails, 4, budget, search.UNLIMITED)
        assert bound <= best
        if found is not None:
            assert bound <= best <= found.cost <= (1 + search.SAME) * best or bound < found.cost
        missed += found is None or found.cost > best
    assert missed


@pytest.mark.parametrize("columns", [3, 4])
def test_of_equal_and_dominated_rows_none_stays(columns):
    """Against all pairs: what is of group -1 beats everything, other rows those of their group."""
    rng = np.random.default_rng(0)
    values, group = rng.integers(0, 40, (2000, columns)), rng.integers(-1, 2, 2000)
    values[:, 0] = values[:, 0] // 4 - values[:, 1:].sum(1)  # so that many stay
    rows = np.unique(np.column_stack([values, group]), axis=0)
    smaller = (rows[:, None, :-1] <= rows[None, :, :-1]).all(-1)
    smaller &= (rows[:, None, -1] < 0) | (rows[:, None, -1] == rows[None, :, -1])
    want = rows[smaller.sum(0) == 1]  # each beats itself
    found = search._undominated(values, group)
    assert len(want) > 256 and len(found) == len(want)
    np.testing.assert_array_equal(np.unique(np.column_stack([values, group])[found], axis=0), want)


@pytest.mark.parametrize("host", [search.UNLIMITED, 5 * 10**9])
def test_the_least_peak_is_found_at_once_at_the_length_of_real_models(host, monkeypatch):
    """Nine kinds and four phases: of the ends few are followed, and the row has the peak that it says."""
    followed = []
    front = search._front
    monkeypatch.setattr(search, "_front", lambda v, order: followed.append(len(order)) or front(v, order))
    blocks, tails = problem(np.random.default_rng(0), kinds=9, phases=4, tails=9, top=10**9)
    row = search.least(blocks, tails, 40, host)
    _, away, peak = totals(blocks, tails, tuple(row.kinds), row.tail)
    assert peak == row.peak and away <= host
    assert max(followed) <= 2 * 9 * search.LEAST_WIDTH


def test_costs_that_differ_by_rounding_are_one():
    """Of two kinds whose costs differ by less than a millionth it is the one that moves nothing."""
    zeros = np.zeros((2, 1), np.int64)
    peak = np.zeros((3, 2, 1), np.int64)
    blocks = Blocks(np.array([10**9 + 1, 10**9]), np.array([0, 5]), zeros, peak, zeros, peak)
    tails = Tails(np.array([1]), np.array([0]), zeros[:1])
    assert search.search(blocks, tails, 6, 10, search.UNLIMITED)[0].host == 0
    dearer = blocks._replace(cost=np.array([10**9 + 10**5, 10**9]))
    assert search.search(dearer, tails, 6, 10, search.UNLIMITED)[0].kinds[:-1] == [1] * 5


@pytest.mark.parametrize("count, phases", [(30, 1), (40, 2), (40, 1), (48, 1)])
def test_rows_of_real_length_cost_what_a_knapsack_does(count, phases, monkeypatch):
    """Where what follows behind the last block decides alone, the least cost is that of a knapsack of count
    things with two weights, which a table over both weights gives. In a second phase blocks keep less. Bounds
    are good enough for a proof by few ends."""
    monkeypatch.setattr(search, "WIDTHS", (30,))
    rng, top = np.random.default_rng(count), 12
    cost = rng.integers(10**5, 2 * 10**5, 9)
    kept, away = rng.integers(0, top, (9, 1)), rng.integers(0, top, 9)
    kept = np.column_stack([kept, rng.integers(0, kept + 1)])[:, :phases]
    none = np.zeros((10, 9, phases), np.int64)
    blocks, tails = Blocks(cost, away, kept, none, kept, none), Tails(*np.zeros((2, 1), int), none[0, :1])
    room, host = count * 3, count * 3
    table = np.full((room + 1, host + 1), np.inf)
    table[0, 0] = 0
    for i in range(count):
        following = np.full_like(table, np.inf)
        for k in range(9):
            x, y = int(kept[k, 0]), int(away[k]) * (i > 0)  # the last block, taken first, puts nothing away
            ahead = table[: room + 1 - x, : host + 1 - y] + cost[k]
            following[x:, y:] = np.minimum(following[x:, y:], ahead)
        table = following
    found, bound = search.search(blocks, tails, count, room, host)
    assert len(found.kinds) == count
    assert found.cost <= table.min() * (1 + search.SAME) and table.min() <= found.cost
    assert table.min() * (1 - search.SAME) <= bound <= found.cost
