"""The engine on the Triton kernels gives what it gives on plain torch."""

from pathlib import Path

import pytest
import torch
from fused import needs_triton
from helpers import random_batch, relative, tiny_config, tiny_model, tiny_reward, under
from safetensors.torch import load_file

from prfl_engine import flow
from prfl_engine.config import LossConfig
from prfl_engine.golden import compute
from prfl_engine.objectives import graded_windows, reward_loss, sft_loss
from prfl_kernels import table

pytestmark = needs_triton
GOLDEN = Path(__file__).parent / "golden" / "dev_t2v"


def losses_and_gradients(model_type: str, recompute: str):
    """Flow-matching loss, reward loss and all gradients of a tiny policy."""
    config = tiny_config(model_type)
    policy, reward = tiny_model(config), tiny_reward(config).freeze()
    torch.manual_seed(0)
    batch = random_batch(config)
    noise = torch.randn_like(batch.latent)
    schedule = flow.make_schedule("unipc", 3, 5.0)
    sft = sft_loss(policy, batch, noise, torch.tensor([0.3, 0.8]), under(recompute)).mean()
    found = [sft.detach(), *torch.autograd.grad(sft, list(policy.parameters()))]
    given = policy, reward, schedule, batch, noise, torch.tensor([[0, 1]])
    (window,) = graded_windows(*given, run_blocks=under(recompute))
    prfl = reward_loss(window.logit, LossConfig()).mean()
    window.backward(prfl)
    return [*found, prfl.detach(), *(p.grad for p in policy.parameters())]


@pytest.mark.parametrize("model_type, recompute", [("t2v", "none"), ("t2v", "attention"), ("i2v", "none")])
def test_losses_and_gradients(triton, model_type, recompute):
    got = losses_and_gradients(model_type, recompute)
    table.configure("reference")
    for a, b in zip(got, losses_and_gradients(model_type, recompute), strict=True):
        assert relative(a, b) < 1e-3


def test_golden_values(triton):
    # The norm of 512 text keys in every block and step is half of the interpreter's time here, and
    # test_losses_and_gradients has it too.
    table.configure("triton,rms_norm=reference")
    got, expected = compute(GOLDEN), load_file(GOLDEN / "expected.safetensors")
    wrong = {k: relative(got[k], v) for k, v in expected.items() if not relative(got[k], v) < 1e-3}
    assert not wrong
