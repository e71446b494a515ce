"""The cheapest assignment of a policy to every block, under a peak-memory budget and a host-memory budget.

A policy is called a kind here, and a complete assignment a row. The peak in a block depends on its kind, on
the kind of the block before it, and on what all blocks before it save.

Method: dynamic programming from the last block to the first. A partial assignment (an end of a row) is
described by its cost, its host bytes, the kind of its first block, and its *room*: how many bytes the blocks
before it may still save. An end is dropped if another one of the same length and first kind is no worse in
all of these. It is also dropped if its cost plus a lower bound on the cost of the blocks before it exceeds
the best row known. The bound is that of the best fractional mix of kinds: a linear program in three unknowns,
whose dual has few corners. If more than `width` ends are left, those with the smallest bounds are kept. The
smallest bound dropped is the proof: no row is cheaper than that.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

UNLIMITED = 1 << 60
# Costs closer than this, relatively, count as equal: the cost of each kind is rounded to an integer.
SAME = 1e-6
# Ends kept: one number after the other is tried until the proof succeeds; the most needed at 14B was 22,000.
WIDTHS = 100, 1000, 30_000
LEAST_WIDTH = 300  # in the search for the smallest peak, which has to answer quickly


class Blocks(NamedTuple):
    """What K kinds of blocks cost and save, in P phases; int64."""

    cost: np.ndarray  # [K]
    host: np.ndarray  # [K] bytes offloaded, by every block except the last
    saved: np.ndarray  # [K, P] bytes that a block saves, in addition to those before it
    peak: np.ndarray  # [K + 1, K, P] peak in addition to that, by the kind before it (K: none) and its own
    saved_last: np.ndarray  # the same of a last block
    peak_last: np.ndarray


class Tails(NamedTuple):
    """R alternatives, one of which follows after the last block."""

    cost: np.ndarray  # [R]
    host: np.ndarray  # [R]
    peak: np.ndarray  # [R, P] in addition to what the blocks save


class Row(NamedTuple):
    """A complete assignment: the kind of every block, its tail, its cost, and its bytes."""

    kinds: list[int]
    tail: int
    cost: int
    host: int  # bytes on the host
    peak: int  # bytes on the device


class _Ends(NamedTuple):
    """Ends of rows, all of one length."""

    kind: np.ndarray  # of the first block
    cost: np.ndarray
    host: np.ndarray
    room: np.ndarray  # [n, P]
    before: np.ndarray  # the end that is one block shorter; of a single block: its tail
    bound: np.ndarray  # no row with this end costs less

    def take(self, index: np.ndarray) -> "_Ends":
        return _Ends(*(a[index] for a in self))


def search(
    blocks: Blocks, tails: Tails, count: int, budget: int, host: int
) -> tuple[Row | None, float]:
    """The cheapest row of `count` blocks and a tail whose peak is at most `budget` and which offloads at most
    `host` bytes, and a cost that no such row is below (inf: there is none).

    Of rows of one cost (see SAME) it is one that offloads least, and of those one of the least peak. Where
    the second result is the cost of the first, that is proved.
    """
    blocks, tails = _distinct(blocks, tails)
    best, floor = None, 0.0
    for width in WIDTHS:
        limit = np.inf if best is None else best.cost
        ends, steps, lost = _walk(blocks, tails, count, budget, host, limit, width)
        rows = [] if best is None else [best]
        if len(ends.cost):
            cheap = np.flatnonzero(ends.cost <= ends.cost.min() * (1 + SAME))
            room = ends.room.min(1)
            first = np.lexsort((ends.cost[cheap], -room[cheap], ends.host[cheap]))[0]
            rows.append(_row(ends, steps, cheap[first], budget))
        if rows:
            most = min(row.cost for row in rows) * (1 + SAME)
            best = min((row for row in rows if row.cost <= most), key=lambda r: (r.host, r.peak, r.cost))
        floor = max(floor, lost)
        if lost == np.inf or (best is not None and lost > best.cost * (1 + SAME)):
            break
    return best, float(floor if best is None else min(floor, best.cost))


def least(blocks: Blocks, tails: Tails, count: int, host: int) -> Row | None:
    """The row with the smallest peak among those that offload at most `host` bytes, at any cost. Its cost and
    its offloaded bytes are not filled in. If several phases decide, or not everything may be offloaded, only
    the ends with most room are kept, and a row with a smaller peak may be missed."""
    moves = 0 if host >= UNLIMITED else 1  # if everything may be offloaded, rows differ only in their peaks
    free = blocks._replace(cost=0 * blocks.cost, host=moves * blocks.host)
    free, tails = _distinct(free, tails._replace(cost=0 * tails.cost, host=moves * tails.host))
    ends, steps, _ = _walk(free, tails, count, UNLIMITED, host, np.inf, LEAST_WIDTH)
    return _row(ends, steps, ends.room.min(1).argmax(), UNLIMITED) if len(ends.cost) else None


def _distinct(blocks: Blocks, tails: Tails) -> tuple[Blocks, Tails]:
    """Merges phases in which every kind saves the same bytes into one with the higher peak."""
    saved = np.concatenate([blocks.saved, blocks.saved_last])
    columns, which = np.unique(saved, axis=1, return_inverse=True)
    alike = [np.flatnonzero(which.ravel() == p) for p in range(columns.shape[1])]

    def highest(peak: np.ndarray) -> np.ndarray:
        return np.stack([peak[..., phases].max(-1) for phases in alike], -1)

    saved, saved_last = np.split(columns, 2)
    blocks = Blocks(
        blocks.cost, blocks.host, saved, highest(blocks.peak), saved_last, highest(blocks.peak_last)
    )
    return blocks, tails._replace(peak=highest(tails.peak))


def _walk(
    blocks: Blocks, tails: Tails, count: int, budget: int, host: int, limit: float, width: int
) -> tuple[_Ends, list[_Ends], float]:
    """(complete rows that may cost `limit`, the ends of every length, the smallest bound of dropped ends)."""
    below, lost, steps = _bound(blocks, host), np.inf, []
    tail, kind = (a.ravel() for a in np.indices((len(tails.cost), len(blocks.cost))))
    room = budget - tails.peak[tail] - blocks.saved_last[kind]
    room = np.minimum(room, budget - blocks.peak_last.min(0)[kind])
    cost, gone = tails.cost[tail] + blocks.cost[kind], tails.host[tail]
    ends = _Ends(kind, cost, gone, room, tail, below(cost, gone, room, count - 1))
    for left in reversed(range(count)):
        peak = blocks.peak if steps else blocks.peak_last
        ends = ends.take(_fitting(ends, host, limit))
        # The kind of an end's first block matters where that block may decide what the one before it can be.
        group = np.where((budget - peak.max(0)[ends.kind] < ends.room).any(1), ends.kind, -1)
        ends = ends.take(_undominated(np.column_stack([ends.cost, ends.host, -ends.room]), group))
        if len(ends.cost) > width:
            order = np.lexsort((-ends.room.min(1), ends.bound))
            lost = min(lost, ends.bound[order[width]])
            ends = ends.take(order[:width])
        steps.append(ends)
        if left:
            kinds = range(len(blocks.cost))
            longer = [_before(ends, kind, blocks, peak, budget, below, left - 1) for kind in kinds]
            ends = _Ends(*map(np.concatenate, zip(*longer, strict=True)))
    room = np.minimum(ends.room, budget - peak[-1, ends.kind])
    ends = ends._replace(room=room, before=np.arange(len(room)))
    return ends.take(_fitting(ends, host, limit)), steps, lost


def _before(
    ends: _Ends, kind: int, blocks: Blocks, peak: np.ndarray, budget: int, below: Callable, left: int
) -> _Ends:
    """The ends with a block of `kind` before them; peak: of their first blocks."""
    room = np.minimum(ends.room, budget - peak[kind, ends.kind]) - blocks.saved[kind]
    room = np.minimum(room, budget - blocks.peak[:, kind].min(0))
    cost, host = ends.cost + blocks.cost[kind], ends.host + blocks.host[kind]
    index = np.arange(len(cost))
    return _Ends(np.full_like(index, kind), cost, host, room, index, below(cost, host, room, left))


def _fitting(ends: _Ends, host: int, limit: float) -> np.ndarray:
    ok = (ends.room >= 0).all(1) & (ends.host <= host) & (ends.bound <= limit * (1 + SAME))
    return np.flatnonzero(ok)


def _row(ends: _Ends, steps: list[_Ends], index: int, budget: int) -> Row:
    kinds, at = [], ends.before[index]
    for step in reversed(steps):
        kinds.append(int(step.kind[at]))
        at = step.before[at]
    peak = budget - ends.room[index].min()
    return Row(kinds, int(at), int(ends.cost[index]), int(ends.host[index]), int(peak))


def _undominated(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Indices of the undominated rows of `values` [n, D]. A row is dominated by another one, of the same
    group or of group -1, that is at most as large in every column. Of equal rows one is returned."""
    order = np.lexsort((group, *values.T[::-1]))
    rows = np.column_stack([values, group])[order]
    order = order[np.r_[True, (rows[1:] != rows[:-1]).any(1)][: len(order)]]
    found = [_front(values, order[group[order] < 0])]
    for g in np.unique(group[group >= 0]):
        front = _front(values, order[(group[order] == g) | np.isin(order, found[0])])
        found.append(front[group[front] == g])
    return np.concatenate(found)


def _front(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The same without groups, for the rows `order`, which are sorted in ascending order."""
    found = against = order[:0]
    for start in range(0, len(order), 256):
        here = order[start : start + 256]
        here = here[~_beaten(values, against, here).any(0)]
        here = here[~np.triu(_beaten(values, here, here), 1).any(0)]
        found, against = np.concatenate([found, here]), np.concatenate([against, here])
        if values.shape[1] == 3:  # later rows are as large in the first column, so two columns are left
            against = against[np.lexsort(values[against, 2:0:-1].T)]
            least = np.minimum.accumulate(values[against, 2])
            against = against[np.r_[True, least[1:] < least[:-1]][: len(against)]]
    return found


def _beaten(values: np.ndarray, by: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[len(by), len(rows)] bool: whether the row of `by` is at most as large in every column."""
    beaten = np.ones((len(by), len(rows)), bool)
    for column in values.T:
        beaten &= column[by, None] <= column[rows]
    return beaten


def _bound(blocks: Blocks, host: int) -> Callable[..., np.ndarray]:
    """below(cost, host, room, left): a lower bound on the cost of rows with such ends and `left` blocks to
    add.

    With any prices per byte saved and per byte offloaded, each block left costs at least its cheapest kind,
    prices included, minus the price of the bytes available. The best prices are corners of { each <= cost +
    price * saved + host_price * host for every kind, prices >= 0 }. Phases are bounded one at a time.
    """
    corners = [_corners(blocks.cost, saved, blocks.host) for saved in blocks.saved.T]

    def below(cost: np.ndarray, gone: np.ndarray, room: np.ndarray, left: int) -> np.ndarray:
        rest = [
            left * each - price * space - host_price * (host - gone)
            for prices, space in zip(corners, room.T, strict=True)
            for price, host_price, each in prices
        ]
        return cost + np.max(rest, axis=0)

    return below


def _corners(cost: np.ndarray, saved: np.ndarray, host: np.ndarray) -> list[tuple[float, float, float]]:
    """(price per byte saved, price per byte offloaded, cost of the cheapest kind at these prices)."""
    scale = max(1.0, float(cost.max())), max(1.0, float(saved.max())), max(1.0, float(host.max()))
    c, x, y = cost / scale[0], saved / scale[1], host / scale[2]
    planes = np.concatenate([np.column_stack([-x, -y, np.ones_like(x)]), np.eye(3)[:2]])
    values, found = np.r_[c, 0, 0], {(0.0, 0.0)}
    for three in map(list, itertools.combinations(range(len(planes)), 3)):
        if abs(np.linalg.det(planes[three])) > 1e-12:
            *corner, each = np.linalg.solve(planes[three], values[three])
            if min(corner) > -1e-12 and each <= (c + corner[0] * x + corner[1] * y).min() + 1e-9:
                found.add(tuple(max(0.0, round(price, 12)) for price in corner))
    prices = [(p * scale[0] / scale[1], q * scale[0] / scale[2]) for p, q in sorted(found)]
    return [(p, q, float((cost + p * saved + q * host).min())) for p, q in prices]
