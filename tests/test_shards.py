"""Sharded over 2 and 4 ranks (FSDP2, HSDP, with a cut sequence) training is that of one process."""

import pytest
import shard_cases as cases
import torch
from ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    made = Ranks(request.param, ("shard_cases",))
    yield made
    made.close()


def layouts(size: int) -> list[tuple[int, int]]:
    """(replicas, ranks that share a sequence)."""
    return [(1, 1), (1, 2)] if size == 2 else [(2, 1), (1, 2)]


def check(ranks, function, *arguments) -> None:
    for layout in layouts(ranks.size):
        for loss, gradient, name in ranks(function, *arguments, *layout):
            assert loss < 1e-12, layout
            assert gradient < 1e-11, (layout, name)


@pytest.mark.parametrize("policy", ["none", "full", "attention"])
def test_flow_matching(ranks, policy):
    check(ranks, cases.flow_matching, policy)


@pytest.mark.parametrize("window, samples", [(1, 1), (3, 2)])
def test_graded_steps(ranks, window, samples):
    check(ranks, cases.graded, window, samples)


def test_reward_training(ranks):
    check(ranks, cases.rewards)


def test_an_adapter(ranks):
    check(ranks, cases.adapter)


@pytest.mark.parametrize(
    "settings, dtype, limit",
    [
        ({}, torch.float32, 1e-3),
        ({"rounding": "master"}, torch.bfloat16, 1e-1),
        ({"rounding": "stochastic"}, torch.bfloat16, 0.3),
        ({"name": "adamw8bit"}, torch.float32, 1e-2),
        ({"offload": "all", "rounding": "master"}, torch.bfloat16, 1e-1),
        ({"in_backward": True, "clip": None}, torch.float32, 1e-3),
    ],
)
def test_optimizer_modes(ranks, settings, dtype, limit):
    """After five steps weights, their average, and the losses of both are those of one process, relative to
    how far the weights have moved. Ranks add up gradients in the dtype of the weights, and round at random by
    their own numbers."""
    for distance, moved in ranks(cases.trained, settings, dtype, 5, ranks.size // 2):
        assert distance < limit
        assert moved > 1e-3
