"""A step cache on a patched transformer, whose own code runs the loop over its blocks.

Every forward of the model without gradient is a step. Its first block sees how far the modulated input has
moved and decides for the whole batch (prfl_engine.rollout.step_cache has the measure). Where a step is not
computed, the first block returns its tokens with what all blocks added in the last computed step, and the
others return what they are given.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prfl_engine.errors import UserError
from prfl_engine.rollout.step_cache import StepCache


class BlockCache:
    """What the blocks of one model carry from step to step. `computed` and `reused` count forwards."""

    def __init__(self, threshold: float, steps: int, lanes: int):
        self.threshold, self.steps, self.lanes = threshold, steps, lanes
        self.computed = self.reused = 0
        self._stores: dict[int, StepCache] = {}  # of every lane
        self._reusing = False
        self._first: tuple[StepCache, Tensor, Tensor] | None = None  # of a step that is computed

    def __call__(
        self,
        place: tuple[bool, bool],
        x: Tensor,
        modulated: Callable[[], Tensor],
        run: Callable[[], Tensor],
    ) -> Tensor:
        """The tokens [B, L, C] after a block, from those before it. place: whether it is the first block of
        the model and whether it is the last; modulated() is the first block's modulated input, run() runs a
        block."""
        first, last = place
        if first:
            store, m = self._begin(modulated(), x)
            if self._reusing:
                return torch.cat([store.reuse(b, a) for b, a in enumerate(x.split(1))])
            self._first = store, m, x
        if self._reusing:
            return x
        out = run()
        if last:
            store, m, before = self._first
            for b in range(len(out)):
                store.keep(b, m[b], before[b : b + 1], out[b : b + 1])
            self._first = None
        return out

    def _begin(self, m: Tensor, x: Tensor) -> tuple[StepCache, Tensor]:
        """Decide about the next forward."""
        step, lane = divmod(self.computed + self.reused, self.lanes)
        step %= self.steps
        if step == 0:
            self._stores[lane] = StepCache(self.threshold, 0.0)
        store = self._stores[lane]
        if any(kept.modulated.shape != m.shape[1:] for kept in store.kept.values()) or (
            store.kept and len(store.kept) != len(m)
        ):
            raise UserError(
                f"step_cache: got tokens {list(m.shape)} in step {step} of {self.steps}, want the shape of "
                "the steps before; steps and lanes have to be those of the sampler"
            )
        left = m.new_full((len(x),), self.steps - 1 - step, dtype=torch.float32)
        self._reusing = not any(store.chosen(m, left, list(range(len(x)))))
        self.reused, self.computed = self.reused + self._reusing, self.computed + (not self._reusing)
        return store, m
