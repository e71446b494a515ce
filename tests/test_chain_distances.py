"""benchmarks/chain_distances.py on tiny models."""

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model, write_run

from prfl_bench.chain_distances import distances, table
from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.build import load_generator
from prfl_engine.config import load_config
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.model.experts import HIGH, LOW
from prfl_engine.objectives import bind
from prfl_engine.seeds import Purpose, noise_like


@pytest.fixture
def config(tmp_path):
    path = write_run(tmp_path, rollout={"steps": 8, "shift": 5.0}, eval={"batch_size": 2})
    for folder in (HIGH, LOW):
        save_transformer(tiny_model(tiny_config()), tmp_path / "pair" / folder)
    pair = [f"model.path={tmp_path / 'pair'}", "model.boundary=0.875"]
    return load_config(path, [*pair, f"data.negative_text={tmp_path / 'data/null.npy'}"])


def test_distances_of_a_pair(config, tmp_path):
    """At the boundary and elsewhere; guidance of scale 1 is none, and a chain's own result is at 0."""
    found = list(distances(config, 2, [1.0, 4.0]))
    assert sorted({step for step, *_ in found}) == [2, 4, 6]  # the boundary is before step 4
    by = {(step, kind): d for step, _, kind, d in found}
    assert {kind for _, kind in by} == {"data", "other", "guided 1", "guided 4"}
    for (_, kind), d in by.items():
        zero = kind == "guided 1"
        assert (d.latent < 1e-6).all() if zero else (d.latent > 1e-3).all()
        assert (d.clean < 1e-6).all() if zero else (d.clean > 1e-3).all()
        assert d.reward.shape == d.plain.shape == (2,)
    lines = table(iter(found))
    assert len(lines) == 1 + 3 * 4 and lines[1].split()[:3] == ["2", "937", "data"]


def test_the_distance_of_data_is_that_of_plain_code(config, tmp_path):
    """At the boundary, from the same noise."""
    found = {(step, kind): d for step, _, kind, d in distances(config, 1, [])}
    latent, text = (torch.from_numpy(np.load(tmp_path / f"val/{k}-0.npy")) for k in ("latent", "short"))
    noise = noise_like(latent, Purpose.VALIDATION_SAMPLE, config.eval.seed, 0)
    schedule = flow.make_schedule("unipc", 8, 5.0)
    sigma = schedule.sigmas[4].item()
    with torch.no_grad():
        velocity = bind(load_generator(config, torch.device("cpu")), Batch(latent, text))
        want = chain.rollout(velocity, schedule, noise, torch.tensor([4])).x
    got = (1 - sigma) * latent + sigma * noise
    distance = ((got - want).norm() / want.norm()).item()
    assert found[4, "data"].latent.item() == pytest.approx(distance, rel=1e-4)
