"""The benchmark of a whole step, on a tiny model."""

import sys

import pytest
import torch

from prfl_bench import bench_step
from prfl_kernels import dispatch

TINY = (
    "--width", "32", "--ffn", "48", "--heads", "2", "--blocks", "2", "--steps", "4", "--index", "2",
    "--latent", "1", "8", "8", "--repeat", "1", "--dtype", "float32",
)  # fmt: skip


@pytest.fixture
def bench():
    yield bench_step
    dispatch.configure("")


def test_every_setting_has_a_row(bench, capsys):
    bench.main([*TINY, "--kernels", "reference", "--recompute", "none", "full", "--samples", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("gate:")]) == 4
    rows = {line[:60].strip(): line[60:].split() for line in lines if line.startswith("reference,")}
    assert len(rows) == 4
    for name, row in rows.items():
        *phases, total, rate, mib = map(float, row)
        assert total > 0 and mib > 0 and sum(phases) == pytest.approx(total, abs=0.01)
        samples = int(name.split(" x ")[0][-1])
        assert rate * total == pytest.approx(samples, rel=0.05)
    kept, again = (rows[f"reference, recompute {mode}, 1 x 1 step"][-1] for mode in ("none", "full"))
    assert float(again) < float(kept)


def test_lora_is_gated_by_itself(bench, capsys):
    bench.main([*TINY, "--kernels", "reference", "--train", "full", "lora", "--recompute", "none", "full"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("gate: reference, lora")]) == 2
    rows = {line[:60].strip(): line[60:].split() for line in lines if line.startswith("reference,")}
    assert len(rows) == 4 and all(float(row[-1]) > 0 for row in rows.values())


def test_an_accelerated_rollout_is_gated_by_its_drift(bench, monkeypatch, capsys):
    run = [*TINY, "--kernels", "reference", "--rollout", "same", "cache:0.3"]
    bench.main(run)
    lines = capsys.readouterr().out.splitlines()
    (drift,) = (float(line.split()[-1]) for line in lines if "drift" in line)
    assert 0 < drift < 0.05
    assert len([line for line in lines if line.startswith("reference,")]) == 2
    monkeypatch.setattr(bench.Step, "drift", lambda self, setting: 0.06)
    with pytest.raises(SystemExit, match="want a drift of at most"):
        bench.main(run)
    assert "MiB" not in capsys.readouterr().out


def test_chains_that_persist_have_the_gradients_of_fresh_rollouts(bench, monkeypatch, capsys):
    run = [*TINY, "--kernels", "reference", "--rollout", "persistent", "--sft-every", "1", "4"]
    bench.main([*run, "--samples", "1", "2", "--window", "2"])
    lines = capsys.readouterr().out.splitlines()
    errors = [line.split()[-1] for line in lines if line.startswith("gate:") and "gradients within" in line]
    assert len(errors) == 2 and all(float(e) < 1e-5 for e in errors)
    rows = {line[:60].strip(): line[60:].split() for line in lines if line.startswith("reference,")}
    assert len(rows) == 4
    sft = [float(row[0]) for name, row in rows.items() if name.endswith("sft 1/4")]
    assert len(sft) == 2 and all(float(row[0]) > 0 for name, row in rows.items() if "sft" not in name)
    noise = bench.Persistent.noise
    monkeypatch.setattr(bench.Persistent, "noise", lambda *args: noise(*args) * torch.randn(()))
    with pytest.raises(SystemExit, match="gate failed"):
        bench.main(run)


def test_what_does_not_agree_gets_no_time(bench, monkeypatch, capsys):
    run = bench.Step.run

    def broken(self, setting, *how, **which):
        losses, seconds = run(self, setting, *how, **which)
        return [loss * (2 if setting.recompute == "full" else 1) for loss in losses], seconds

    monkeypatch.setattr(bench.Step, "run", broken)
    with pytest.raises(SystemExit, match="gate failed"):
        bench.main([*TINY, "--kernels", "reference", "--recompute", "none", "full"])
    assert "MiB" not in capsys.readouterr().out
    assert torch.is_grad_enabled()


# What a checkout of HY-Video-PRFL offers to the benchmark, by its names, around our own modules.
STAND_IN = {
    "wan/modules/model.py": """
from torch import nn
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.model.layers import Block as WanAttentionBlock

class WanModel(WanTransformer):
    def __init__(self, **values):
        super().__init__(WanConfig(**values))

    def forward(self, x, t, context, seq_len, output_features=False, selected_layers=()):
        assert seq_len == x[0][0].numel() // 4
        context = self.embed_context(context[0][None])
        if output_features:
            return [self.features(x[0][None], t, context, None, selected_layers[0])]
        return list(super().forward(x[0][None], t, context))
""",
    "utils/network.py": """
from prfl_engine.model.reward import MLP, QueryPool

class QueryAttention(QueryPool):
    def __init__(self, dim, num_queries, num_heads, dropout, return_type):
        super().__init__(dim, num_queries, num_heads, dropout, return_type == "query")
""",
    "wan/utils/fm_solvers_unipc.py": """
import torch
from prfl_engine import flow

class FlowUniPCMultistepScheduler:
    def __init__(self, num_train_timesteps, shift, use_dynamic_shifting):
        assert (num_train_timesteps, shift, use_dynamic_shifting) == (1000, 1, False)

    def set_timesteps(self, steps, device, shift):
        self.schedule, self.state, self.index = flow.make_schedule("unipc", steps, shift), None, 0
        self.timesteps = self.schedule.timesteps

    def step(self, velocity, t, x, return_dict):
        assert t == self.timesteps[self.index]
        state = flow.init_state(x) if self.state is None else self.state._replace(x=x)
        self.state = flow.step(self.schedule, state, velocity, torch.tensor([self.index]))
        self.index += 1
        return (self.state.x,)
""",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in STAND_IN.items():
        file = tmp_path / "diffusers_lite" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "diffusers_lite"]:
        del sys.modules[name]


def test_a_peer_is_gated_and_has_a_row_for_each_recomputation(bench, checkout, capsys):
    bench.main([*TINY, "--kernels", "reference", "--peer", str(checkout)])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("gate: peer")]) == 2
    rows = {line[:60].strip(): line[60:].split() for line in lines if line.startswith("peer,")}
    kept, again = (float(rows[f"peer, recompute {mode}, 1 x 1 step"][-1]) for mode in ("none", "full"))
    assert 0 < again < kept


def test_a_peer_that_computes_something_else_gets_no_time(bench, checkout):
    file = checkout / "diffusers_lite/utils/network.py"
    file.write_text(file.read_text().replace('return_type == "query"', "False"))
    with pytest.raises(SystemExit, match="gate failed"):
        bench.main([*TINY, "--kernels", "reference", "--peer", str(checkout)])


def test_a_peer_needs_a_checkout(bench, tmp_path):
    with pytest.raises(SystemExit, match="want a checkout of HY-Video-PRFL"):
        bench.main([*TINY, "--peer", str(tmp_path)])
