"""What test_plan_sharded.py runs on real ranks: the exchanges of a step, and whole runs, counted."""

from pathlib import Path

import plan_runs
import pytest
import torch
import torch.distributed as dist
from helpers import random_batch, tiny_config, tiny_model, under
from run_cases import launched

from prfl_engine.objectives import sft_loss
from prfl_engine.parallel import cut_sequence
from prfl_engine.planner.meta import COLLECTIVES
from prfl_kernels import exchange

SHAPE = (16, 3, 8, 8)  # 48 tokens


def exchanged(policy, blocks: int, graded: bool, heads: int) -> int:
    """Bytes of the larger sides of all exchanges of flow matching on this rank."""
    total, real = [0], {name: getattr(dist, name) for name in COLLECTIVES}

    class Counting:
        """torch.distributed, counted where a sequence group uses it."""

        def __getattr__(self, name):
            if name not in real:
                return getattr(dist, name)

            def call(found, given, *rest, **named):
                total[0] += max(found.nbytes, given.nbytes)
                return real[name](found, given, *rest, **named)

            return call

    config = tiny_config("t2v", dim=64, num_heads=heads, num_layers=blocks)
    model = cut_sequence(tiny_model(config), dist.group.WORLD)
    batch, before = random_batch(config, 1, SHAPE), exchange.dist
    exchange.dist = Counting()
    try:
        with torch.set_grad_enabled(graded):
            loss = sft_loss(model, batch, torch.randn_like(batch.latent), torch.tensor([0.3]), under(policy))
        if graded:
            loss.mean().backward()
    finally:
        exchange.dist = before
    return total[0]


def run(path: Path, size: int, port: int) -> tuple[int, int, int]:
    """Most bytes of a training run on this rank: (training, optimizer, validation)."""
    with pytest.MonkeyPatch.context() as changed, launched(size, port):
        found = plan_runs.measured(path, changed)
    return found.training, found.optimizer, found.validation
