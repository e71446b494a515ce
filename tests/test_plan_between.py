"""Bytes between the steps of a run: resuming, checkpoints, chains in host memory."""

import math

import pytest
from helpers import write_run

from prfl_engine import loop, resume
from prfl_engine.config import load_config
from prfl_engine.inputs import load_pickle
from prfl_engine.memory.live_bytes import LiveBytes, host_memory
from prfl_engine.planner import between
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.fit_memory import chain_values, pool_bytes
from prfl_engine.planner.predict import memory
from prfl_engine.planner.setup import ROUND
from prfl_engine.planner.sharded import Shards
from prfl_engine.planner.standing import models_of, pinned, state_bytes
from prfl_engine.planner.subject import find
from prfl_engine.train import train

GB = 10**9


@pytest.mark.parametrize("optim", [{"name": "adamw8bit"}, {"offload": "states"}])
def test_a_resumed_run_has_the_bytes_predicted(optim, tmp_path, monkeypatch):
    """From the weights on: averaged weights read while those of the start are there, then states."""
    path = write_run(tmp_path, optim=optim, train={"ema": 0.9, "steps": 1, "save_every": 1})
    train(load_config(path))
    live, load = LiveBytes(ROUND), loop._load

    def loaded(config, begin, model, optimizer, ema, *rest):
        own = [a for s in optimizer.state.values() for b in s["blocks"] for a in b.values()]
        with host_memory():
            live.add(own if "offload" in optim else ())
        live.add([*model.parameters(), *own, *ema.average.values()])
        with live:
            return load(config, begin, model, optimizer, ema, *rest)

    def read(*given, **named):
        with host_memory():
            return load_pickle(*given, **named)

    monkeypatch.setattr(loop, "_load", loaded)
    monkeypatch.setattr(resume, "load_pickle", read)
    config = load_config(path, ["train.resume=true", "train.steps=2"])
    train(config)
    found = memory(config, find(config, str(path), on_cpu=True).setup, None)
    phase = next(phase for phase in found.phases if phase.name == "resume")
    told = sum(e.bytes for e in phase.entries if not e.category.startswith(("reward", "optimizer slots")))
    assert told == pytest.approx(live.peak, rel=0.05)


def test_chains_are_shared_by_groups_of_ranks_and_counted_where_they_are(tmp_path):
    path = str(write_run(tmp_path, rollout={"mode": "persistent"}, train={"accumulate": 4}))

    def chains(gpus: int, *overrides: str) -> tuple[int, int]:
        m = predict(path, overrides, Options(gpus=gpus)).memory
        return tuple(
            max(e.bytes for e in phase.entries if e.category == "chains that persist")
            for phase in (next(p for p in m.phases if p.name == "graded step"), m.host)
            if any(e.category == "chains that persist" for e in phase.entries)
        )

    (one,), (two,) = chains(1), chains(2)
    setup = find(load_config(path), path).setup
    prompt = pool_bytes(setup, 0)
    assert one == setup.pool and 2 * (two - prompt) == one - prompt > 0
    device, host = chains(1, "rollout.pool_place=host")
    assert device == prompt and host == 8 * sum(pinned(4 * n) for n in chain_values(setup))


def test_checkpoints_of_several_ranks_are_copied_to_the_host_first(tmp_path):
    """Weights, states and averaged weights of a rank; without save_async one weight at a time."""
    path = str(write_run(tmp_path, train={"accumulate": 2, "ema": 0.9}))

    def copied(*overrides: str) -> int:
        host = predict(path, overrides, Options(gpus=2)).memory.host
        return next(e.bytes for e in host.entries if e.category == "checkpoints")

    config = load_config(path)
    setup = find(config, path).setup
    models = models_of(setup, 2)
    own = sum(p.count * p.values for p in models.trained)
    assert copied() == 4 * own + state_bytes(models, config.optim, True).saved + 4 * own
    assert copied("parallel.save_async=false") == 4 * max(math.prod(p.shape) for p in models.generator)


@pytest.mark.parametrize("workers, processes", [(0, 1), (3, 3)])
def test_samples_that_are_kept_are_in_the_host_memory_of_a_plan(tmp_path, workers, processes):
    path = str(write_run(tmp_path))

    def kept(*overrides: str) -> list[int]:
        host = predict(path, (f"data.num_workers={workers}", *overrides), Options()).memory.host
        return [e.bytes for e in host.entries if e.category == "kept samples"]

    assert kept() == [] and kept("data.keep_gb=1.5") == [processes * 1_500_000_000]


def test_adapters_of_a_reward_model_are_merged_for_a_checkpoint():
    """The whole reward model in float32: on the host, of sharded ones a rank's shards on the device."""
    config = "configs/reward_t2v_14b_480p.yaml"
    lora = ("lora.rank=16", "model.weights_dtype=bfloat16", "train.accumulate=8")
    one, eight = (
        predict(config, lora, Options(gpus=n, train_reward=True)).memory for n in (1, 8)
    )
    held = next(e.bytes for e in one.host.entries if e.category == "checkpoints")
    merged = next(e.bytes for p in eight.phases for e in p.entries if e.category == "merged weights")
    assert held == pytest.approx(12.7 * GB, rel=0.02) and merged == pytest.approx(held / 8, rel=0.02)
    assert one.disk == pytest.approx(held + GB, rel=0.01)  # and moments of adapters and head


def test_groups_of_ranks_have_buffers_of_their_own():
    assert [between.communicators(s) for s in (Shards(), Shards(8), Shards(8, 1, 2), Shards(16, 2, 8))] == [
        0, 1, 2, 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "overrides, category, phase",
    [
        (("rollout.precision=fp8",), "e4m3 weights", "graded step"),
        (("rollout.cuda_graph=true",), "CUDA graph", "graded step"),
        (("rollout.cache=0.1",), "step cache, first tokens", "rollout"),
        (("rollout.mode=persistent",), "chains that persist", "graded step"),
        (("train.ema=0.9",), "averaged weights", "checkpoint"),
        (("lora.rank=4",), "LoRA", "rollout"),
        (("optim.offload=states",), "optimizer slots", "optimizer"),
    ],
)  # fmt: skip
def test_what_a_setting_needs_is_in_the_plan_of_a_run_that_has_it(tmp_path, overrides, category, phase):
    path = str(write_run(tmp_path, eval={"every": 5}))
    for given, there in ((overrides, True), ((), False)):
        phases = predict(path, given, Options()).memory.phases
        found = [e for p in phases if p.name.startswith(phase) for e in p.entries if e.category == category]
        assert bool(found) is there, given
        assert all(e.bytes > 0 and e.basis for e in found)


def test_states_of_longer_windows_and_caches_grow_as_they_should(tmp_path):
    """Of window=all as many states as the chain has steps; of the step cache three tensors of all tokens."""
    path = str(write_run(tmp_path, eval={"every": 0}, rollout={"steps": 9}))

    def size(category: str, *overrides: str) -> int:
        phases = predict(path, overrides, Options()).memory.phases
        return max(e.bytes for p in phases for e in p.entries if e.category == category)

    setup = find(load_config(path), path).setup
    latent = 4 * math.prod(setup.latent)
    one, every = (size("sampler states", f"chain.window={w}") for w in (1, "all"))
    assert every - one == pytest.approx(7 * 3 * latent, rel=0.4)
    tokens = 4 * setup.tokens * setup.config.dim
    assert size("step cache, first tokens", "rollout.cache=0.1") == 3 * tokens
