"""Graded steps of fresh rollouts: every micro-batch starts from noise, as in the paper."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.config import Config
from prfl_engine.model.start import Anchor
from prfl_engine.objectives import (
    GradedWindow,
    Grader,
    Grading,
    index_range,
    start_of,
    stratified_indices,
)
from prfl_engine.rollout.choice import Seeds
from prfl_engine.rollout.drift import DriftMeter
from prfl_engine.seeds import Purpose, each, noise_like, seeded

LAST = float(np.nextafter(1, 0))  # of the numbers that a generator of numpy draws from [0, 1)


class Fresh:
    """Where graded steps come from, with `rollout.mode` fresh."""

    def __init__(
        self,
        grader: Grader,
        config: Config,
        meter: DriftMeter | None = None,
        readers: int = 1,
        anchor: Anchor | None = None,
    ):
        """readers: the groups of processes that have samples of their own."""
        self.grader, self.config, self.meter, self.anchor = grader, config, meter, anchor
        self.range = index_range(config.rollout)
        self.seeds = Seeds(config) if config.rollout.seeds > 1 else None
        alike = config.rollout.one_index
        self.together = readers if alike == "turn" else alike  # micro-batches that have the same graded steps

    def windows(self, batch: Batch, key: int) -> Iterator[tuple[GradedWindow, dict[str, Tensor]]]:
        """The rollout.samples windows of micro-batch `key`, each with metrics to add up. Backpropagate a
        window before taking the next one."""
        c, g, extra = self.config, self.grader, {}
        at, n = (c.train.seed, key * c.data.batch_size), len(batch.latent)
        indices = self.indices(key, n)
        if self.meter is not None:
            self.meter.begin(key // c.train.accumulate)
            extra = self.meter.values()
        anchor = self.anchor and self.anchor.at(key // c.train.accumulate)
        draw = partial(noise_like, purpose=Purpose.REWARD_DRAW, seed=at[0], first=at[1])
        grading = Grading(g, batch, anchor, draw)
        if self.seeds is None:
            noise = noise_like(batch.latent, Purpose.ROLLOUT_NOISE, *at)
            starts = [(start_of(c.rollout, g.schedule, batch.latent, noise), indices)]
            del noise
        else:
            starts, found = self.seeds.starts(grading, batch, key, indices)
            extra = extra | found
        while starts:
            for window in grading.windows(*starts.pop(0)):
                yield window, extra
                del window  # its graph holds the state before it
                extra = {}  # once for every micro-batch

    def indices(self, key: int, n: int) -> Tensor:
        """Graded steps [rollout.samples, n] of the n samples of micro-batch `key`, int64 on the CPU, each
        uniform over the range: by the seed and the sample, or with rollout.one_index by the seed and the
        optimizer step."""
        c = self.config
        step, micro = divmod(key, c.train.accumulate)
        if self.together:
            uniform = self._spread(step)[:, [micro // self.together]]
        else:
            drawn = each(Purpose.ROLLOUT_INDEX, c.train.seed, key * c.data.batch_size, n)
            uniform = np.stack([rng.random(c.rollout.samples) for rng in drawn], 1)
            pairs = n // 2 * 2
            uniform[:, 1:pairs:2] = LAST - uniform[:, 0:pairs:2]
        return stratified_indices(*self.range, torch.from_numpy(uniform)).expand(-1, n)

    def _spread(self, step: int) -> np.ndarray:
        """Places [rollout.samples, n] in [0, 1) of the n parts of an optimizer step that have graded steps of
        their own. Those of a row lie in n equal strata, dealt out at random: each is uniform."""
        c = self.config
        parts = c.train.accumulate // self.together
        rng = seeded(Purpose.ROLLOUT_INDEX, c.train.seed, step)
        strata = rng.permuted(np.tile(np.arange(parts), (c.rollout.samples, 1)), axis=1)
        return np.minimum((strata + rng.random(strata.shape)) / parts, LAST)
