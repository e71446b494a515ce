"""The engine on the Triton kernels gives what it gives on plain torch."""

import json
from pathlib import Path

import torch
from fused import needs_triton
from helpers import random_batch, relative, tiny_config, tiny_model, tiny_reward, under
from safetensors.torch import load_file

from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.config import LossConfig
from prfl_engine.model.checkpoint import build
from prfl_engine.model.sources import stored
from prfl_engine.model.wan import WanConfig
from prfl_engine.objectives import graded_windows, reward_loss, sft_loss
from prfl_engine.tools import golden
from prfl_kernels import dispatch

pytestmark = needs_triton
GOLDEN = Path(__file__).parent / "golden" / "dev_t2v"


def losses_and_gradients():
    """Flow-matching loss, reward loss and all gradients of a tiny policy whose blocks are recomputed."""
    config, run_blocks = tiny_config(), under("attention")
    policy, reward = tiny_model(config), tiny_reward(config).freeze()
    torch.manual_seed(0)
    batch = random_batch(config)
    noise = torch.randn_like(batch.latent)
    schedule = flow.make_schedule("unipc", 3, 5.0)
    sft = sft_loss(policy, batch, noise, torch.tensor([0.3, 0.8]), run_blocks).mean()
    found = [sft.detach(), *torch.autograd.grad(sft, list(policy.parameters()))]
    given = policy, reward, schedule, batch, noise, torch.tensor([[0, 1]])
    (window,) = graded_windows(*given, run_blocks=run_blocks)
    prfl = reward_loss(window.logit, LossConfig()).mean()
    window.backward(prfl)
    return [*found, prfl.detach(), *(p.grad for p in policy.parameters())]


def test_losses_and_gradients(triton):
    """An image model runs the same operations, on 257 tokens more that take the interpreter a minute."""
    got = losses_and_gradients()
    dispatch.configure("reference")
    for a, b in zip(got, losses_and_gradients(), strict=True):
        assert relative(a, b) < 1e-3


def load_policy(model: dict):
    config = WanConfig.from_values(model, "model")
    return build(config, stored(GOLDEN / "policy.safetensors"), GOLDEN).set_precision(torch.float32)


def on(block, chosen: str) -> None:
    """Run a block on this implementation, and what comes after it; in its backward, too."""
    block.register_forward_pre_hook(lambda *_: dispatch.configure(chosen))
    block.register_full_backward_pre_hook(lambda *_: dispatch.configure(chosen))


def test_golden_values(triton):
    """The gradients of flow matching, with the last block and the head on the Triton kernels, but for the
    norm of 512 text keys. The other blocks are the same again, at five seconds each in the interpreter."""
    spec, inputs = json.loads((GOLDEN / "config.json").read_text()), load_file(GOLDEN / "inputs.safetensors")
    policy = load_policy(spec["model"])
    for block in policy.blocks:
        on(block, "triton,rms_norm=reference" if block is policy.blocks[-1] else "reference")
    batch = Batch(inputs["latent"], inputs["text_states"], None, None)
    loss = sft_loss(policy, batch, inputs["noise"], torch.tensor([spec["sft"]["sigma"]])).mean()
    loss.backward()
    got = {"sft_loss": loss.detach()} | golden._gradients("sft", policy)
    expected = load_file(GOLDEN / "expected.safetensors")
    expected = {k: a for k, a in expected.items() if k.startswith("sft")}
    assert "sft_loss" in expected and len(expected) > 4
    wrong = {k: relative(got[k], a) for k, a in expected.items() if not relative(got[k], a) < 1e-3}
    assert not wrong
