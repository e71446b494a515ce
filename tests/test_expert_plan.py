"""What the planner knows of experts and of guidance: bytes, forwards, configurations that are there."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import write_run

from prfl_engine.build import make_policy
from prfl_engine.config import ChainConfig, Config, ModelConfig, RolloutConfig, TrainConfig, load_config
from prfl_engine.errors import UserError
from prfl_engine.model.wan import PRESETS
from prfl_engine.objectives import schedule_of, steps_inside
from prfl_engine.planner.between import resume
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.flops import (
    expert_switches,
    graded_passes,
    rollout_forwards,
    validation_forwards,
)
from prfl_engine.planner.machine import MACHINES
from prfl_engine.planner.predict import memory
from prfl_engine.planner.setup import Setup
from prfl_engine.planner.sharded import Shards, exchanged_bytes, gathered_bytes
from prfl_engine.planner.standing import idle_bytes, models_of
from prfl_engine.planner.subject import find
from prfl_engine.planner.timing import times
from prfl_engine.together import asked
from prfl_engine.train import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*a14b*.yaml"))


@pytest.mark.parametrize("given, trained", [
    ([], (True, True)), (["rollout.sigma_range=[0.875, 1]"], (True, False)),
    (["lora.rank=4", "model.idle=host"], (True, True)),
    (["lora.rank=4", "model.idle=host", "rollout.sigma_range=[0, 0.875]"], (False, True)),
    (["model.idle=host", "rollout.sigma_range=[0.875, 1]"], (True, False)),
])  # fmt: skip
def test_the_bytes_of_a_pair_are_those_of_its_parameters(given, trained, tmp_path):
    random = ["model.path=null", "model.preset=tiny-t2v", "model.boundary=0.875"]
    flow_matching = ["reward.path=null", "loss.weight=0", "rollout.steps=8"]
    config = load_config(write_run(tmp_path), [*random, *flow_matching, *given])
    found = find(config, "x", "1x4x4")
    assert config.trained_experts == trained == found.setup.experts
    made = memory(config, found.setup, None)
    policy = make_policy(config, None, torch.device("cpu"))
    there = sum(p.untyped_storage().nbytes() for p in policy.parameters() if p.untyped_storage().nbytes() > 8)
    stands = {e.category: e.bytes for e in made.phases[-1].entries}
    # Nothing has been asked yet, so where both wait one's frozen blocks are still to come.
    idle = policy.bring is not None
    blocks = (expert.blocks.parameters() for expert in (policy.high, policy.low))
    frozen = [sum(p.nbytes for p in of if not p.requires_grad) for of in blocks]
    want = there + (max(frozen) if idle else 0)
    assert stands["weights"] + stands.get("LoRA", 0) == pytest.approx(want, rel=0.01)
    held = {e.category: e.bytes for e in made.host.entries}.get("idle experts", 0)
    assert held == pytest.approx(sum(frozen) if idle else 0, rel=0.01)
    real = [p for p in policy.parameters() if p.requires_grad]
    told = models_of(found.setup).trained
    assert sum(p.count for p in told) == len(real)
    assert sum(p.count * p.values for p in told) == sum(p.numel() for p in real)


def planned(tmp_path, *given: str):
    """(configuration, subject) of two experts with random weights that are trained by flow matching."""
    random = ["model.path=null", "model.preset=tiny-t2v", "model.boundary=0.875", "eval.every=5"]
    config = load_config(write_run(tmp_path), [*random, "reward.path=null", "loss.weight=0", *given])
    return config, find(config, "x", "1x4x4")


def test_training_keeps_the_untrained_expert_on_the_host(tmp_path):
    """Whose blocks alone are frozen where the other is trained whole; a validation asks both."""
    config, found = planned(tmp_path, "model.idle=host", "rollout.sigma_range=[0.875, 1]")
    made = memory(config, found.setup, None)
    size = {
        phase.name: next(e.bytes for e in phase.entries if e.category == "weights") for phase in made.phases
    }
    blocks = next(e.bytes for e in made.host.entries if e.category == "idle experts")
    assert size["validation"] - size["flow matching"] == blocks > 0
    assert size["flow matching"] == size["optimizer"]
    low = replace(found.setup, experts=(False, True))
    models = models_of(low)
    assert idle_bytes(low, models)[:3] == (0, 0, blocks)  # a chain begins with the high-noise expert
    low = replace(low, rollout=RolloutConfig(start="data", sigma_range=(0.0, 0.875)))
    assert idle_bytes(low, models)[:3] == (0, blocks, blocks)


@pytest.mark.parametrize("trained", ["rollout.sigma_range=[0, 1]", "rollout.sigma_range=[0.875, 1]"])
def test_a_pair_whose_frozen_matrices_wait_on_the_host(trained, tmp_path):
    """2^18 values a block of tiny-t2v, 8 C^2 + 2 C F, of either expert, whichever is trained; two there."""
    block, sizes, host = 4 * 2**18, [], []
    for place in ("device", "host"):
        config, found = planned(tmp_path, "lora.rank=4", f"lora.base_place={place}", trained)
        made = memory(config, found.setup, None)
        sizes.append(next(e.bytes for e in made.phases[-1].entries if e.category == "weights"))
        host.append({e.category: e.bytes for e in made.host.entries}.get("frozen matrices", 0))
    assert host == [0, 2 * 4 * block] and sizes[0] - sizes[1] == (2 * 4 - 2) * block


def test_a_resumed_run_reads_the_average_of_trained_experts_alone(tmp_path):
    def read(*given: str) -> int:
        config, found = planned(tmp_path, "train.ema=0.9", "optim.name=adamw8bit", *given)
        return sum(e.bytes for e in resume(config, found.setup, models_of(found.setup), Shards()))

    assert 2 * read("rollout.sigma_range=[0.875, 1]") == read() > 0


def test_a_gradient_of_a_block_is_counted_once(tmp_path):
    """Where it is there in its backward alone, of one expert as of two."""
    one, two = ["rollout.sigma_range=[0.875, 1]"], []
    sizes = []
    for given in (one, two):
        given = [*given, "train.accumulate=1", "data.batch_size=1", "loss.weight=0"]
        config, found = planned(tmp_path, *given)
        phases = memory(config, found.setup, None).phases
        phase = next(p for p in phases if p.name == "flow matching")
        assert not found.setup.alone  # `memory` finds out
        sizes.append({e.category: e.bytes for e in phase.entries}["gradients"])
    assert sizes[0] == sizes[1] > 0


T2V = {"steps": 40, "shift": 12.0}


@pytest.mark.parametrize("rollout, experts, switches", [
    ({}, (True, True), 2 * 13 / 39), ({"samples": 4}, (True, True), 2.0),
    ({"mode": "persistent", "samples": 2}, (True, True), 2),
    ({"sigma_range": (0.875, 1.0)}, (True, False), 0.0), ({"sigma_range": (0.0, 0.875)}, (False, True), 2.0),
    ({"sigma_range": (0.0, 0.875), "start": "data"}, (False, True), 0.0),
])  # fmt: skip
def test_chains_go_from_one_expert_to_the_other(rollout, experts, switches):
    """At a boundary of 0.875 the steps 0 to 25 of 40 ask the first."""
    setup = Setup(PRESETS["t2v-a14b-high"], (1, 16, 1, 2, 2), rollout=RolloutConfig(**T2V, **rollout))
    assert expert_switches(replace(setup, experts=experts), 0.875) == pytest.approx(switches)


def test_a_slow_link_is_waited_for(tmp_path):
    """What a switch copies beyond its first forward."""
    config, found = planned(tmp_path, "lora.rank=4", "model.idle=host", "eval.every=0")
    setup, gpu = found.setup, MACHINES["h100-80"]
    made, models = memory(config, setup, None), models_of(setup)

    def waits(link: float) -> float:
        on = gpu._replace(rates=gpu.rates._replace(link=link))
        moved = exchanged_bytes(setup, models, Shards(), made.reward)
        took = times(config, setup, made.kinds, made.reward, models, on, Shards(), moved)
        return sum(row.waits for row in took.rows if row.phase == "idle experts")

    assert waits(1e18) == 0 and waits(1e3) == pytest.approx(
        config.train.accumulate * idle_bytes(setup, models).coming / 1e3, rel=0.01
    )


@pytest.mark.parametrize("rollout, readers, often", [
    ({}, 1, (0, 0)), ({}, 2, (0.465, 4 / 9)), ({"one_index": "turn"}, 2, (0.465, 0)),
    ({"mode": "persistent"}, 8, (0.974, 0)), ({"sigma_range": (0.875, 1.0)}, 8, (0, 0)),
])  # fmt: skip
def test_how_often_groups_of_processes_ask_both_experts(rollout, readers, often):
    """632 of 1000 levels and 26 of 39 steps are the high-noise expert's; the draws are independent."""
    found = asked(of_pair(rollout), readers)
    assert (found.sft, *found.steps) == pytest.approx(often, abs=1e-3)
    assert asked(Config(ModelConfig(preset="t2v-14b")), readers).beside == ()


def of_pair(rollout: dict, window: int | str = 1) -> Config:
    r = RolloutConfig(**T2V, **rollout)
    pair, train = ModelConfig(preset="t2v-a14b-high", boundary=0.875), TrainConfig(accumulate=8)
    return Config(pair, rollout=r, chain=ChainConfig(window), train=train)


SFT, GRADED, WINDOW = "flow matching", "graded step", "window"


@pytest.mark.parametrize("rollout, window, readers, beside", [
    ({}, 1, 1, ()), ({}, 1, 2, (SFT, GRADED)), ({}, 2, 2, (SFT, GRADED, WINDOW)),
    ({"one_index": "turn"}, 2, 2, (SFT,)), ({"one_index": 2}, 2, 2, (SFT,)),
    ({"one_index": 1}, 2, 2, (SFT, GRADED, WINDOW)), ({"mode": "persistent"}, 3, 2, (SFT,)),
    ({"sigma_range": (0.0, 0.875)}, 1, 2, ()), ({"sigma_range": (0.0, 0.875)}, 2, 2, (WINDOW,)),
    ({"sigma_range": (0.0, 0.875), "start": "data"}, "all", 2, ()),
    ({"sigma_range": (0.875, 1.0)}, 3, 2, ()), ({"range": (0, 25)}, "all", 2, (SFT,)),
    ({"range": (25, 26)}, 1, 2, (SFT, GRADED)), ({"range": (26, 26)}, "all", 2, (SFT,)),
    ({"range": (28, 29)}, 3, 2, (SFT,)), ({"range": (28, 29)}, 4, 2, (SFT, WINDOW)),
])  # fmt: skip
def test_where_groups_of_processes_may_ask_different_experts(rollout, window, readers, beside):
    """In any step of a window, whichever is trained: the low-noise one alone, too, where windows begin with
    the other. The steps 0 to 25 are the high-noise expert's."""
    found = asked(of_pair(rollout, window), readers)
    assert found.beside == beside
    assert found.apart == bool({GRADED, WINDOW} & {*beside})


@pytest.mark.parametrize("given, always", [
    (["chain.window=2"], True), (["chain.window=1"], False),
    (["chain.window=2", "rollout.one_index=turn"], False),
])  # fmt: skip
def test_a_plan_makes_both_halves_where_groups_may_ask_different_experts(given, always, tmp_path):
    """Of a low-noise expert trained alone, whose windows begin with the other: also in guided steps of one
    expert alone."""
    path = write_run(tmp_path, data={"negative_text": str(tmp_path / "data/null.npy")}, eval={"every": 0})
    config = load_config(path, [
        "model.path=null", "model.preset=tiny-t2v", "model.boundary=0.875", "rollout.sigma_range=[0, 0.875]",
        "rollout.steps=40", "rollout.shift=12", "chain.guidance=[4, 1]", "train.accumulate=2", *given,
    ])  # fmt: skip
    setup = find(config, str(path), "1x4x4", readers=2).setup
    assert asked(config, 2).apart == always
    window = config.chain.window
    halves = rollout_forwards(setup) - rollout_forwards(replace(setup, chain=ChainConfig(window)))
    # Else in the one of 13 windows that begins before the boundary.
    assert halves == pytest.approx(window if always else (window - 1) / 13)


def test_a_rank_gathers_one_expert_at_a_time(tmp_path):
    """So what it gathers is what it gathers of one model, and a pass that asks both gathers twice."""
    config, found = planned(tmp_path, "train.accumulate=8", "eval.every=0", "data.batch_size=1")
    one = replace(found.setup, experts=None)
    shards, kind = Shards(8, 2), memory(config, found.setup, None).reward
    parts = [(s, models_of(s, 4)) for s in (found.setup, one)]
    assert sum(p.bytes() for p in parts[0][1].generator) == 2 * sum(p.bytes() for p in parts[1][1].generator)
    gathered = [gathered_bytes(models, shards._replace(resident=True)) for _, models in parts]
    assert gathered[0] == gathered[1] and gathered[0].resident > 0
    sums = [exchanged_bytes(setup, models, shards, kind) for setup, models in parts]
    assert sums[0] == sums[1] and sums[0].replicas > 0
    slow = MACHINES["h100-80"]._replace(fast=1e3, slow=1e3)  # so that collectives are all
    rows = [
        next(r for r in times(config, s, [kind] * s.count, kind, models, slow, shards, sums[0]).rows
             if r.phase == "flow matching")
        for s, models in parts
    ]  # fmt: skip
    often = asked(config, 8).sft
    assert 0.5 < often < 1 and rows[0].waits == pytest.approx((1 + often) * rows[1].waits, rel=1e-3)


@pytest.mark.parametrize("rollout, chain, forwards, passes", [
    ({}, {}, 19.0, 1.0), ({"sigma_range": (0.875, 1.0)}, {}, 12.5, 1.0),
    ({"sigma_range": (0.875, 1.0), "mode": "persistent"}, {}, 0.0, 1.0),
    ({"sigma_range": (0.0, 0.875), "start": "data"}, {}, 6.0, 1.0),
    ({"sigma_range": (0.0, 0.875)}, {}, 32.0, 1.0), ({"guidance": 4.0}, {}, 38.0, 1.0),
    ({"guidance": 4.0}, {"guidance": 4.0}, 39.0, 1.0),
    ({"guidance": 4.0}, {"guidance": 4.0, "unconditional": "gradient"}, 38.0, 2.0),
    ({"guidance": (1, 4)}, {}, 19.0 + 2.0, 1.0),  # (12 + ... + 0) / 39 of the steps below the boundary
    ({"guidance": (1, 4)}, {"guidance": (1, 4)}, 19.0 + 2.0 + 13 / 39, 1.0),
    ({}, {"guidance": (1, 4), "unconditional": "gradient"}, 19.0, 1.0 + 13 / 39),
    ({"seeds": 4, "seeds_step": 10}, {}, 40 + 28 * 29 / 2 / 39, 1.0),
    ({"seeds": 4, "seeds_step": 10, "range": (12, 38)}, {}, 40 + 15, 1.0),
    ({"seeds": 3, "seeds_step": 2, "seeds_keep": "both", "samples": 2, "range": (2, 13)}, {},
     6 + 2.5 + 8.5, 2.0),
])  # fmt: skip
def test_forwards_of_a_graded_step(rollout, chain, forwards, passes):
    setup = Setup(PRESETS["t2v-a14b-high"], (1, 16, 1, 2, 2), rollout=RolloutConfig(**T2V, **rollout))
    setup = replace(setup, chain=ChainConfig(**chain), boundary=0.875)
    assert rollout_forwards(setup) == pytest.approx(forwards)
    assert graded_passes(setup) == pytest.approx(passes)


def test_the_configurations_of_experts():
    """They load, are known by their names, and a validation of an expert alone makes its own steps."""
    steps = {"t2v_a14b_high": 26, "t2v_a14b_low": 14, "i2v_a14b_high": 15, "i2v_a14b_low": 25}
    steps["t2v_a14b_480p"] = 40
    assert len(CONFIGS) == len(steps)
    for path in CONFIGS:
        config = load_config(path)
        name, forwards = next(item for item in steps.items() if item[0] in path.stem)
        assert validation_forwards(config) == forwards
        assert find(config, str(path)).model.startswith(name[:8].replace("_", "-"))


def test_a_validation_from_data_ends_below_the_range(tmp_path):
    path = write_run(tmp_path, rollout={"steps": 40, "sigma_range": [0.3, 0.9], "start": "data"})
    r = (config := load_config(path)).rollout
    first, end = steps_inside(r)
    assert validation_forwards(config) == end < len(schedule_of(r)) and first == 0


def test_guided_drift_probes_take_twice_the_forwards(tmp_path):
    def seconds(scale: int) -> float:
        given = [f"{part}.guidance={scale}" for part in ("rollout", "chain")]
        rows = predict(path, ["rollout.mode=persistent", *given]).times.rows
        return next(row.seconds for row in rows if row.phase == "drift probes")

    path = str(write_run(tmp_path, eval={"every": 0}, data={"negative_text": "negative.npy"}))
    assert seconds(4) == pytest.approx(2 * seconds(1))


def test_drift_probes_are_of_one_sample(tmp_path):
    """Whatever the batch: it unpacks all weights of e4m3 by itself."""

    def seconds(size: int) -> float:
        given = f"data.batch_size={size}", "rollout.cache=0.1", "lora.rank=4", "lora.base=e4m3"
        return next(row.seconds for row in predict(path, given).times.rows if row.phase == "drift probes")

    path = str(write_run(tmp_path, eval={"every": 0}, rollout={"steps": 5}))
    assert seconds(2) == pytest.approx(seconds(1))


@pytest.mark.parametrize("given, field", [
    (["rollout.sigma_range=[0, 0.875]"], "rollout.start"),
    (["rollout.mode=persistent", "rollout.guidance=4"], "rollout.guidance"),
    (["optim.in_backward=true", "optim.clip=null"], "loss.alternate"),
])  # fmt: skip
def test_a_plan_refuses_what_training_refuses(given, field, tmp_path):
    path = str(write_run(tmp_path))
    for job in (partial(predict, path), lambda given: train(load_config(path, given))):
        with pytest.raises(UserError, match=f"^{field}: "):
            job(given)
    predict(path, given, Options(train_reward=True))
