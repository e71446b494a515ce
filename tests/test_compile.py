"""Blocks under torch.compile: the eager results, one compilation for all blocks, no graph breaks."""

import copy
from shutil import which

import pytest
import torch
from helpers import model_and_batch, random_batch, tiny_config, tiny_model, tiny_reward, under, write_run
from rounding import assert_as_right, rounding
from torch._dynamo.utils import counters

from prfl_engine.batch import Batch
from prfl_engine.cli import main
from prfl_engine.config import ModelConfig
from prfl_engine.metrics import read_metrics
from prfl_engine.model.wan import WanTransformer, plain_blocks
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


def assert_as_eager(got, want, config, batch):
    """The results of a compiled tiny model are as right as those of the eager one; 48 is its widest sum."""
    exact = results(tiny_model(config).double(), Batch(*(a if a is None else a.double() for a in batch)))
    for a, right, b in zip(got, exact, want, strict=True):
        assert_as_right(a, right, b, rounding(48))


@pytest.mark.parametrize(
    "model_type, dtype, backend", [("t2v", None, "inductor"), ("i2v", torch.bfloat16, "aot_eager")]
)
def test_forward_and_gradients_are_those_of_the_eager_block(model_type, dtype, backend):
    config = tiny_config(model_type, num_layers=3)
    model, batch = tiny_model(config).set_precision(dtype), random_batch(config)
    want = results(model, batch)
    compiled = copy.deepcopy(model).compile_blocks(backend)
    assert_as_eager(results(compiled, batch), want, config, batch)
    assert compilations() == 1  # for three blocks
    if backend == "inductor":  # the rest is no matter of the code that it makes, which takes long
        return
    _, gradients = results(compiled, batch)
    assert compilations() == 1
    with torch.no_grad():
        v = bind(compiled, batch)(batch.latent, T, torch.arange(2))
    assert_as_eager((v, gradients), want, config, batch)
    assert compilations() == 2  # a forward without gradient is another use
    assert compiled.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("recompute", ["full", "attention"])
def test_recomputed_blocks_give_the_same_gradients(recompute):
    model, batch = model_and_batch()
    want = results(model, batch)
    compiled = copy.deepcopy(model).compile_blocks("aot_eager")
    assert_as_eager(results(compiled, batch, under(recompute)), want, model.config, batch)


@pytest.mark.parametrize("keep", ["nothing", "projections"])
def test_what_branches_keep_is_a_use_of_its_own(keep):
    model, batch = model_and_batch()
    want = results(model, batch)
    compiled = copy.deepcopy(model).compile_blocks("aot_eager")
    got = results(compiled, batch, under(keep=keep))
    assert compilations() == 1
    assert_as_eager(got, want, model.config, batch)


def test_a_frozen_reward_gives_the_same_gradient_to_its_input():
    config = tiny_config()
    reward, batch = tiny_reward(config).freeze(), random_batch(config)

    def gradient(reward, dtype=torch.float32):
        x = batch.latent.to(dtype, copy=True).requires_grad_()
        (made,) = torch.autograd.grad(reward(x, T, batch.text.to(dtype)).sum(), x)
        return made

    want, exact = gradient(reward), gradient(copy.deepcopy(reward).double(), torch.float64)
    reward.transformer.compile_blocks("aot_eager")
    assert_as_right(gradient(reward), exact, want, rounding(1024))  # the width of its MLP
    assert compilations() == 1


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


