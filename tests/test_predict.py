"""`prfl plan`: its bytes against real runs and hand counts, its command and its mistakes."""

import os

import pytest
from plan_runs import configuration, guided, measured, with_rewards

from prfl_engine.config import load_config
from prfl_engine.planner.predict import memory
from prfl_engine.planner.subject import find
from prfl_kernels import extension

built = pytest.mark.skipif(extension.absence("cpu", "cpu") is not None, reason="the kernels are not built")
TRAINING = ("rollout", "graded", "reward", "flow")
FIRST = int(os.environ.get("PRFL_PLAN_FIRST", 0))
RUNS = int(os.environ.get("PRFL_PLAN_RUNS", 0))  # docs/planner.md has the result of 60
# Every mode of the optimizer once, and what predictions once missed: gradients that come one after another
# (11, 18, 23), in float32 (13), a pool in the update (20), images in a validation (36, 42), the noise of
# drift probes (37), the copied states of a pool (57).
SEEDS = range(FIRST, FIRST + RUNS) if RUNS else (0, 4, 5, 7, 9, 11, 13, 18, 20, 23, 36, 37, 42, 57)


@built
@pytest.mark.parametrize("seed", SEEDS)
def test_no_phase_of_a_run_has_other_bytes_than_predicted(seed, tmp_path, monkeypatch):
    """Everything that is alive on the device, within 1 %, and never more than 0.5 % above."""
    compare(configuration(tmp_path, seed), seed, monkeypatch)


@built
@pytest.mark.parametrize("seed", SEEDS if RUNS else (1, 4, 7))
def test_several_rewards_and_draws(seed, tmp_path, monkeypatch):
    """A further reward of another width and depth, each at two or three noise levels."""
    compare(with_rewards(tmp_path, seed), seed, monkeypatch)


GRADIENT = {"guidance": 3, "unconditional": "gradient"}


@built
@pytest.mark.parametrize("seed, sections", [
    (4, {"chain": GRADIENT | {"window": 2}}), (1, {"chain": GRADIENT, "model": {"recompute": "none"}}),
    (4, {"chain": GRADIENT, "rollout": {"guidance_at_once": True}, "eval": {"every": 2, "guidance": 3}}),
    (4, {"rollout": {"cache": 0.1}}),
], ids=["halves apart", "nothing recomputed", "at once", "step cache"])  # fmt: skip
def test_guided_steps(seed, sections, tmp_path, monkeypatch):
    """Autograd holds the gradients of one half until it has those of the other; rewards score no half."""
    compare(guided(tmp_path, seed, **sections), seed, monkeypatch)


def compare(path, seed, monkeypatch):
    config = load_config(path)
    found = memory(config, find(config, str(path), on_cpu=True).setup, None)
    real = measured(path, monkeypatch)
    told = {phase.name: phase.bytes for phase in found.phases}
    pairs = {
        "training": (max(told[name] for name in told if name.startswith(TRAINING)), real.training),
        "optimizer": (told["optimizer"], real.optimizer),
        "validation": (told.get("validation", 0), real.validation),
    }
    for name, (want, got) in pairs.items():
        print(f"seed {seed} {name} {want} {got} {want / max(1, got) - 1:+.4f}")
    for name, (want, got) in pairs.items():
        assert want >= 0.995 * got, name
    want, got = map(max, zip(*pairs.values(), strict=True))
    assert want <= 1.01 * got
    assert found.host.bytes >= real.host
