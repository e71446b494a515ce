"""The counter of live bytes, by hand and on the chain: long windows live in the memory of one step."""

import pytest
import torch
from helpers import random_batch as make_batch
from helpers import tiny_config, tiny_model, tiny_reward, under

from prfl_engine import flow
from prfl_engine.config import ChainConfig
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.objectives import graded_windows
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn


def test_by_hand():
    x = torch.ones(1000)
    with LiveBytes() as live:
        live.add([x, x[:10]])
        assert (live.now, live.peak) == (4000, 4000)
        y = x + 1
        z = (y * 2).sum()
        assert live.now == 4000 + 4000 + 4  # y and z; the product is gone
        assert live.peak == 12004
        del y
        assert live.now == 4004
        view = x.view(10, 100)
        assert live.now == 4004
    assert z.item() == 4000 and view.shape == (10, 100)


def test_sizes_are_rounded_as_asked():
    with LiveBytes(512) as live:
        x = torch.ones(3)
        assert live.now == 512
        del x
    assert live.now == 0


def test_what_autograd_keeps_is_live():
    w = torch.ones(100, 100, requires_grad=True)
    with LiveBytes() as live:
        y = torch.tanh(w)  # kept for the backward
        z = torch.tanh(y)
        loss = z.sum()
        del y, z
        assert live.now == 2 * 40000 + 4
        loss.backward()
        assert live.now == 40000 + 4  # the gradient and the loss
    assert live.peak >= 3 * 40000


def test_fused_operations_are_opened_up():
    """The hidden layer of an FFN branch is allocated inside one operation, and counts."""
    x, vectors = torch.randn(1, 64, 32), [torch.randn(1, 32) for _ in range(3)]
    weights = FFNWeights(torch.randn(512, 32), torch.randn(512), torch.randn(32, 512), torch.randn(32))
    with torch.no_grad(), LiveBytes() as live:
        live.add([x, *vectors, *weights])
        before = live.now
        out = modulated_ffn(x, None, *vectors, weights)
    assert live.peak >= before + 2 * 64 * 512 * 4  # before and after the GELU
    del out
    assert live.now == before


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_a_window_of_40_lives_in_the_memory_of_a_window_of_1(recompute):
    """Peak bytes, gradients allocated before; allowed beyond it are the latents and states kept."""
    config = tiny_config(num_layers=3)
    policy, reward = tiny_model(config), tiny_reward(config).freeze()
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    batch = make_batch(config, 1, (16, 5, 12, 12))
    noise, schedule = torch.randn_like(batch.latent), flow.make_schedule("unipc", 41, 5.0)
    peaks = {}
    for window in (1, 40):
        live = LiveBytes()
        live.add([*policy.parameters(), *reward.parameters(), *(p.grad for p in policy.parameters())])
        with live:
            indices = torch.tensor([[39]])
            how = ChainConfig(window=window)
            given = policy, reward, schedule, batch, noise, indices, how
            for graded in graded_windows(*given, run_blocks=under(recompute)):
                graded.backward(torch.sigmoid(graded.logit).sum())
                del graded
        peaks[window] = live.peak
    # A state is four tensors, of which a step makes three.
    kept = 40 * 3 * noise.numel() * 4
    assert peaks[40] <= 1.10 * peaks[1] + kept
