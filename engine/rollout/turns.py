"""Which chain of a pool is drawn when, and at which step: an even rotation, decided by the seed alone.

A pool has P slots, and n of them are drawn in every optimizer step. The slots form n strata of P/n
neighbours. Slot i starts at place (i + u_i) R / P of the R steps of the range, u_i uniform in [0, 1); the
whole is turned by a random number of places. In one *round* of P/n optimizer steps every slot is drawn once,
and all slots then stand the same number of places further on (`rollout.stride` on average). So neighbours
stay neighbours, and

- every optimizer step draws one slot of each stratum: its graded steps are spread evenly over the range;
- over R rounds of stride 1 every slot is drawn exactly once at every step of the range: the marginal
  distribution is uniform, and no step is favoured in between by chance;
- within a stratum the order is random; with P >= 2 n no slot is drawn in two consecutive optimizer steps.

A slot that passes the end of the range begins another lap with a new chain. All this is a function of the
seed and of the number of the draw, never of data or results. So data-parallel ranks with pools of one seed
draw the same slots at the same steps, start new chains at the same draws, and make the same number of
forwards.
"""

from functools import cache
from typing import NamedTuple

from prfl_engine.seeds import Purpose, seeded


class Turn(NamedTuple):
    """A draw: the slot, the step that is to be graded, and how often the slot has passed the range before."""

    slot: int
    index: int
    lap: int


class Turns:
    """The draws of a pool; `turns[k]` is the k-th."""

    def __init__(self, steps: tuple[int, int], pool: int, drawn: int, batch: int, stride: int, seed: int):
        """steps: first and last of the range; pool: slots, a multiple of `drawn`, the draws of an optimizer
        step, which is a multiple of `batch`, those of one window; stride: mean steps from draw to draw."""
        self.first, self.length = steps[0], steps[1] + 1 - steps[0]
        self.pool, self.drawn, self.batch, self.stride, self.seed = pool, drawn, batch, stride, seed
        self.strata = pool // drawn  # slots of one
        self._offset = cache(self._offset)

    def __getitem__(self, k: int) -> Turn:
        turn, place = divmod(k, self.drawn)
        # The samples of one window are spread over the range as well.
        window, row = divmod(place, self.batch)
        stratum = row * (self.drawn // self.batch) + window
        round_, at = divmod(turn, self.strata)
        slot = stratum * self.strata + self._order(round_, stratum)[at]
        lap, step = divmod(self._offset(slot) + round_ * self.stride + self._jump(round_), self.length)
        return Turn(slot, self.first + step, lap)

    def _offset(self, slot: int) -> int:
        uniform = seeded(Purpose.POOL_PLACE, self.seed, slot).random()
        turned = int(seeded(Purpose.POOL_PLACE, self.seed, self.pool).integers(self.length))
        return (int((slot + uniform) * self.length / self.pool) + turned) % self.length

    def _jump(self, round_: int) -> int:
        """Steps by which a round runs ahead of the mean stride: 0..stride - 1."""
        return int(seeded(Purpose.POOL_JUMP, self.seed, round_).integers(self.stride))

    def _order(self, round_: int, stratum: int) -> tuple[int, ...]:
        """The order of a stratum's slots in a round. None comes last in one round and first in the next."""
        if self.strata < 3:
            return tuple(range(self.strata))
        order, before = self._shuffled(round_, stratum), self._shuffled(round_ - 1, stratum)
        if order[0] == before[-1]:  # the exchange leaves the last one where it is
            order[:2] = order[1::-1]
        return tuple(order)

    def _shuffled(self, round_: int, stratum: int) -> list[int]:
        rng = seeded(Purpose.POOL_ORDER, self.seed, round_ * self.drawn + stratum)
        return rng.permutation(self.strata).tolist()
