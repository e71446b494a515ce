"""Seconds and FLOPs of phases: counted where they happen, by formulas that agree with the models' weights."""

import sys
import threading
import time
from importlib import import_module

import pytest
import torch
from helpers import tiny_config, tiny_model, write_run
from training_runs import reward_run, run, values

from prfl_engine import exposed, phases
from prfl_engine.config import OptimConfig
from prfl_engine.measurements import Performance
from prfl_engine.model import flops
from prfl_engine.optim.optimizer import make_optimizer
from prfl_engine.parallel import World
from prfl_kernels.waits import waiting

TOKENS = ("self_attn", "cross_attn.q.", "cross_attn.o.", "ffn")
SHAPE = (1, 4, 4)  # 4 tokens


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_products_are_those_of_the_weights(kind):
    """Every linear layer of a block multiplies either the tokens of the latent or those of the context."""
    c = tiny_config(kind)
    work, image = flops.block_work(c, 7), 257 * (kind == "i2v")
    layers = {n: p.numel() for n, p in tiny_model(c).blocks[0].named_parameters() if p.dim() == 2}
    tokens = sum(n for name, n in layers.items() if name.startswith(TOKENS))
    text = sum(n for name, n in layers.items() if name.startswith(("cross_attn.k.", "cross_attn.v.")))
    images = sum(n for name, n in layers.items() if name.startswith(("cross_attn.k_img", "cross_attn.v_img")))
    assert tokens + text + images == sum(layers.values())
    assert work.tokens == 2 * 7 * tokens
    assert work.context == 2 * (c.text_len * text + 257 * images)
    assert work.attention == 2 * 2 * 7 * (7 + c.text_len + image) * c.dim
    assert work.backward(False) == work.tokens + work.context + 2 * work.attention
    assert work.backward(True) == 2 * work.forward
    small, none = (tiny_config(kind, num_layers=n) for n in (2, 0))
    got, ends = (flops.costs(c, SHAPE).flops["rollout"] for c in (small, none))
    assert got - ends == 2 * flops.block_work(small, 4).forward
    model = tiny_model(none)
    layers = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "modulation" not in n}
    rows = {"patch": 4, "head.": 4, "text_": c.text_len, "img_e": 257, "time_": 1}
    assert ends == 2 * sum(n * rows[name[:5]] for name, n in layers.items())


def test_peaks_are_known_by_whole_names():
    assert flops.peak("NVIDIA H100 80GB HBM3") == flops.peak("NVIDIA H200") == 989.4e12
    assert flops.peak("NVIDIA A100-SXM4-80GB") == 312e12 and flops.peak("NVIDIA B200") == 2250e12
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GH200 480GB", "NVIDIA L4", ""):
        assert flops.peak(name) is None


def test_a_lap_has_the_seconds_between_its_marks(monkeypatch):
    now = iter(float(n) for n in (0, 1, 3, 6, 10, 15))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    latent = torch.zeros(2, 16, *SHAPE)
    phases.count("graded", latent)  # nobody's
    with phases.timed(torch.device("cpu")) as clock:
        phases.mark("rollout")
        phases.count("rollout", latent)
        phases.mark("graded")
        lap = clock.lap()
        phases.mark("validation")
        phases.count("rollout", latent)
        after = clock.lap()
    assert lap.seconds() == {"data": 1, "rollout": 2, "graded": 3} and lap.work == {("rollout", SHAPE): 2}
    assert after.seconds() == {"graded": 4, "validation": 5} and not after.work


def test_on_a_gpu_marks_are_events_that_nothing_waits_for(monkeypatch):
    class Event:
        """At 2, 4, 8, ... ms; it has no synchronize."""

        now = 1.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "computes"
            Event.now *= 2
            self.at = Event.now

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computes")
    clock = phases.Clock(torch.device("cuda"))
    clock.mark("graded")
    clock.mark("reward")
    clock.mark("graded")
    with clock.waits():
        pass
    lap = clock.lap()
    assert lap.seconds() == pytest.approx({"data": 0.002, "graded": 0.116, "reward": 0.008})
    assert lap.waits() == pytest.approx({"graded": 0.032})


def test_a_wait_counts_once_and_what_is_computed_in_it_does_not(monkeypatch):
    """Nor do waits of a thread beside the computation. An update in a backward is made in a reduction."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def lasts(seconds):
        now[0] += seconds

    def save():
        phases.apart()
        with waiting():
            lasts(100)

    layer = torch.nn.Linear(2, 1)
    optimizer = make_optimizer([(layer, 1.0)], OptimConfig(in_backward=True, clip=None))
    update = optimizer._update
    monkeypatch.setattr(optimizer, "_update", lambda *given: (lasts(10), update(*given)))
    with phases.timed(torch.device("cpu")) as clock, exposed.measured(clock):
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
        phases.mark("graded")
        with waiting():
            lasts(1)
            layer(torch.ones(2)).sum().backward()  # two updates
            with waiting():
                lasts(2)
        with pytest.raises(ValueError), waiting():
            lasts(4)
            raise ValueError
        lap = clock.lap()
    with waiting():
        lasts(1000)  # nobody's
    assert lap.waits() == {"graded": 7} and lap.seconds() == {"data": 100, "graded": 27}
    assert not clock.lap().waits()


@pytest.mark.parametrize("gone", ["method", "module"])
def test_where_torch_has_other_names_waits_are_left_out(gone, monkeypatch, capsys):
    """And nothing stops; with them all methods are wrapped, and as they were after it."""
    if gone == "method":
        group = import_module(f"{exposed._PLACE}._fsdp_param_group").FSDPParamGroup
        before = group.unshard
        with phases.timed(torch.device("cpu")) as clock, exposed.measured(clock):
            assert group.unshard is not before
        assert group.unshard is before
        monkeypatch.delattr(group, "unshard")
    else:
        monkeypatch.setitem(sys.modules, f"{exposed._PLACE}._fsdp_state", None)
    capsys.readouterr()
    for leads in (True, False):
        with phases.timed(torch.device("cpu")) as clock, exposed.measured(clock, leads), waiting():
            pass
        assert not clock.lap().waits()
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "perf/exposed_s" in line
    assert ("unshard" if gone == "method" else "_fsdp_state") in line


def test_one_process_needs_no_private_name_of_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exposed, "_PLACE", "torch.nowhere")
    run("train", write_run(tmp_path), "train.steps=1")
    assert "exposed" not in capsys.readouterr().err
    assert not any("exposed" in name for name in values(tmp_path / "run", "perf/")[1])


def test_ranks_are_summed_up(monkeypatch):
    """Two ranks of one sample count its work once."""
    other = {"seconds": {"graded": 3.0, "save": 1.0}, "waits": {"data": 0.5, "save": 4.0}}
    other |= {"memory": 1e15, "tokens": 8, "flops": 100.0}
    monkeypatch.setattr(World, "all", lambda self, mine: [mine, other])
    world = World(size=2, sequence=2)
    made = Performance(torch.device("cpu"), world, lambda shape: flops.Costs(4, {"graded": 50.0}), True)
    made.peak = 10.0
    monkeypatch.setattr(made, "_memory", lambda: 1e6)
    work = phases.Counter({("samples", SHAPE): 2, ("graded", SHAPE): 2})
    waits = [("graded", 0.0), ("graded", 0.25), ("graded", 0.5), ("save", 1.0)]
    made.add(phases.Lap([("graded", 0.0), ("save", 1.0), ("save", 2.0)], work, waits))
    made.add(phases.Lap([("graded", 3.0), ("graded", 3.0)], phases.Counter()))
    assert made.values() == {
        "step_s": 1.0, "graded_s": 1.0, "save_s": 1.0, "tokens_per_s": 4.0, "model_flop_per_s": 50.0,
        "mfu": 2.5, "memory_bytes": 1e15, "memory_bytes_least": 1e6,
        "exposed_s": 0.3125, "exposed_s_least": 0.25, "graded_exposed_s": 0.1875, "data_exposed_s": 0.125,
        "save_exposed_s": 2.0,
    }  # fmt: skip
    assert made.steps == 0 and not made.work and not made.waits
    other["waits"] = {}
    made.add(phases.Lap([("graded", 0.0), ("save", 1.0)], phases.Counter()))
    assert not any("exposed" in name for name in made.values())  # not measured


def counted(config, out, command="train", *overrides):
    """FLOPs and tokens of every step of a run by its metrics."""
    run(command, config, f"train.out={out}", "train.log_every=1", *overrides)
    found = values(out, "perf/").values()
    names = "perf/model_flop_per_s", "perf/tokens_per_s"
    return [tuple(round(v[name] * v["perf/step_s"]) for name in names) for v in found]


def test_a_run_counts_its_forwards_and_backwards(tmp_path, capsys):
    """Rollouts of 0 to 2 steps, by the seed; windows; flow matching; not what a validation does."""
    config = write_run(tmp_path, rollout={"steps": 4, "range": [2, 2]}, eval={"every": 1})
    costs = flops.costs(tiny_config(), SHAPE, reward=(tiny_config(), 1)).flops
    step = costs["graded"] + costs["reward"]
    found = counted(config, tmp_path / "plain")
    assert found == [(2 * costs["rollout"] + step + costs["flow_matching"], 4)] * 2
    perf = values(tmp_path / "plain", "perf/")[2]
    for name in ("data", "rollout", "graded", "reward", "flow_matching", "optimizer", "validation"):
        assert perf[f"perf/{name}_s"] > 0
    assert "perf/mfu" not in perf and perf["perf/memory_bytes"] > 1e6
    assert capsys.readouterr().out.count("prfl: kernels: ") == 1
    found = counted(config, tmp_path / "window", "train", "chain.window=2", "loss.sft_weight=0")
    assert found == [(2 * costs["rollout"] + step + costs["earlier"], 4)] * 2


def test_reward_training_counts_pairs(tmp_path):
    found = counted(reward_run(tmp_path, "bt"), tmp_path / "run", "train-reward", "train.steps=1")
    costs = flops.costs(tiny_config(), SHAPE, reward=(tiny_config(), 1), reward_trained=True).flops
    assert found == [(8 * costs["reward"], 32)]
