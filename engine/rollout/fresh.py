"""Graded steps of fresh rollouts: every micro-batch starts from noise, as in the paper."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.config import Config
from prfl_engine.objectives import (
    GradedWindow,
    Grader,
    Grading,
    index_range,
    start_of,
    stratified_indices,
)
from prfl_engine.rollout.drift import DriftMeter
from prfl_engine.seeds import Purpose, each, noise_like


class Fresh:
    """Where graded steps come from, with `rollout.mode` fresh."""

    def __init__(self, grader: Grader, config: Config, meter: DriftMeter | None = None):
        self.grader, self.config, self.meter = grader, config, meter

    def windows(self, batch: Batch, key: int) -> Iterator[tuple[GradedWindow, dict[str, Tensor]]]:
        """The rollout.samples windows of micro-batch `key`, each with metrics to add up. Backpropagate a
        window before taking the next one."""
        c, g, extra = self.config, self.grader, {}
        at, n = (c.train.seed, key * c.data.batch_size), len(batch.latent)
        indices = self.indices(key, n)
        noise = noise_like(batch.latent, Purpose.ROLLOUT_NOISE, *at)
        if self.meter is not None:
            self.meter.begin(key // c.train.accumulate)
            extra = self.meter.values()
        start = start_of(c.rollout, g.schedule, batch.latent, noise)
        del noise
        for window in Grading(g, batch).windows(start, indices):
            yield window, extra
            del window  # its graph holds the state before it
            extra = {}  # once for every micro-batch

    def indices(self, key: int, n: int) -> Tensor:
        """Graded steps [rollout.samples, n] of the n samples of micro-batch `key`, int64 on the CPU: by the
        seed and the sample, or with rollout.one_index by the seed and the optimizer step."""
        c = self.config
        first, count = key * c.data.batch_size, n
        if c.rollout.one_index:
            first, count = key // c.train.accumulate, 1
        drawn = each(Purpose.ROLLOUT_INDEX, c.train.seed, first, count)
        uniform = np.stack([rng.random(c.rollout.samples) for rng in drawn], 1)
        return stratified_indices(*index_range(c.rollout), torch.from_numpy(uniform)).expand(-1, n)
