"""Blocks under torch.compile: the eager results, one compilation for all blocks, no graph breaks."""

import copy
from shutil import which

import pytest
import torch
from helpers import random_batch, relative, tiny_config, tiny_model, tiny_reward, under, write_run
from torch._dynamo.utils import counters

from prfl_engine.cli import main
from prfl_engine.config import ModelConfig
from prfl_engine.dit import WanTransformer, plain_blocks
from prfl_engine.metrics import read_metrics
from prfl_engine.objectives import bind

pytestmark = pytest.mark.skipif(which("g++") is None, reason="inductor needs g++ on a CPU")
T = torch.tensor([500.0, 20.0])


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compilations():
    """How many graphs were compiled; that none broke."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def results(model, batch, run_blocks=plain_blocks):
    """(velocity, gradients) of a forward and backward."""
    model.zero_grad()
    v = bind(model, batch, run_blocks=run_blocks)(batch.latent, T, torch.arange(2))
    v.square().sum().backward()
    return v.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "model_type, dtype, limit, backend",
    [("t2v", None, 1e-6, "inductor"), ("i2v", torch.bfloat16, 1e-2, "aot_eager")],
)
def test_forward_and_gradients_are_those_of_the_eager_block(model_type, dtype, limit, backend):
    config = tiny_config(model_type, num_layers=3)
    model, batch = tiny_model(config).set_precision(dtype), random_batch(config)
    want = results(model, batch)
    compiled = copy.deepcopy(model).compile_blocks(backend)
    for got, right in zip(results(compiled, batch), want, strict=True):
        assert relative(got, right) < limit
    assert compilations() == 1  # for three blocks
    results(compiled, batch)
    assert compilations() == 1
    with torch.no_grad():
        assert relative(bind(compiled, batch)(batch.latent, T, torch.arange(2)), want[0]) < limit
    assert compilations() == 2  # a forward without gradient is another use
    assert compiled.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("recompute", ["full", "attention"])
def test_recomputed_blocks_give_the_same_gradients(recompute):
    config = tiny_config()
    model, batch = tiny_model(config), random_batch(config)
    want = results(model, batch)
    compiled = copy.deepcopy(model).compile_blocks("aot_eager")
    for got, right in zip(results(compiled, batch, under(recompute)), want, strict=True):
        assert relative(got, right) < 1e-6


@pytest.mark.parametrize("keep", ["nothing", "projections"])
def test_what_branches_keep_is_a_use_of_its_own(keep):
    config = tiny_config()
    model, batch = tiny_model(config), random_batch(config)
    want = results(model, batch)[1]
    compiled = copy.deepcopy(model).compile_blocks("aot_eager")
    assert relative(results(compiled, batch, under(keep=keep))[1], want) < 1e-6 and compilations() == 1


def test_a_frozen_reward_gives_the_same_gradient_to_its_input():
    config = tiny_config()
    reward, batch = tiny_reward(config).freeze(), random_batch(config)

    def gradient():
        x = batch.latent.clone().requires_grad_()
        (made,) = torch.autograd.grad(reward(x, T, batch.text).sum(), x)
        return made

    want = gradient()
    reward.transformer.compile_blocks("aot_eager")
    assert relative(gradient(), want) < 1e-6 and compilations() == 1


def test_a_run_is_compiled_if_asked_to(tmp_path, monkeypatch):
    """One training step: the losses of the run that is not compiled; and it is off by default."""
    assert not ModelConfig().compile
    config = write_run(tmp_path, train={"steps": 1})
    plain = WanTransformer.compile_blocks
    monkeypatch.setattr(WanTransformer, "compile_blocks", lambda self: plain(self, "aot_eager"))
    runs = {name: tmp_path / name for name in ("eager", "compiled")}
    assert main(["train", str(config), f"train.out={runs['eager']}"]) == 0
    assert compilations() == 0
    assert main(["train", str(config), f"train.out={runs['compiled']}", "model.compile=true"]) == 0
    assert compilations() > 0
    want, got = (read_metrics(runs[name])[-1]["values"] for name in ("eager", "compiled"))
    for name in ("train/sft_loss", "train/reward", "train/grad_norm"):
        assert got[name] == pytest.approx(want[name], rel=1e-4)


