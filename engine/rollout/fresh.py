"""Graded steps of fresh rollouts: every micro-batch starts from noise, as in the paper."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.config import Config
from prfl_engine.objectives import GradedWindow, Grader, Grading, index_range, stratified_indices
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
        uniform = [rng.random(c.rollout.samples) for rng in each(Purpose.ROLLOUT_INDEX, *at, n)]
        indices = stratified_indices(*index_range(c.rollout), torch.from_numpy(np.stack(uniform, 1)))
        noise = noise_like(batch.latent, Purpose.ROLLOUT_NOISE, *at)
        if self.meter is not None:
            self.meter.begin(key // c.train.accumulate)
            extra = self.meter.values()
        for window in Grading(g, batch).windows(noise, indices):
            yield window, extra
            del window  # its graph holds the state before it
            extra = {}  # once for every micro-batch
