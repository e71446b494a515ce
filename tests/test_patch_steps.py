"""What runs several blocks of a patched model together: offloading, the step cache, checkpoints."""

import copy

import pytest
import torch
from helpers import relative
from torch.utils.checkpoint import checkpoint

from prfl_engine.errors import UserError
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.patch import accelerate, step_cache

pytest.importorskip("diffusers")
from diffusers_small import assert_close, inputs_of, model_of, outcome  # noqa: E402


def test_a_policy_that_offloads():
    """Every block but the last has its tensors on the host while the others run."""
    model, inputs = model_of(num_layers=3), inputs_of()
    want = outcome(model, inputs)
    model.zero_grad()
    accelerate(model, BlockPolicy({"input"}, {"attention", "hidden"}))
    live = LiveBytes()
    with live:
        made = model(*inputs, return_dict=False)[0]
        assert live.host_now >= 2 * 48 * 4 * (48 + 80)  # two blocks, two samples of 24 tokens, float32
        made.sum().backward()
        del made
    assert live.host_now == 0
    assert_close(outcome(copy.deepcopy(model), inputs), want)


def chain_of(model, inputs, times):
    """The model's results along some timesteps, the latents unchanged."""
    x, _, *rest = inputs
    with torch.no_grad():
        return [model(x, torch.full((len(x),), t), *rest, return_dict=False)[0] for t in times]


def test_steps_that_hardly_move_reuse_what_the_blocks_added():
    model, inputs = model_of(), inputs_of()
    times = [900.0, 899.0, 500.0, 499.0, 900.0, 100.0]
    plain = chain_of(model, inputs, times)
    report = accelerate(model)
    with step_cache(model, 0.1, steps=4) as cache:
        first = chain_of(model, inputs, times[:1])
        got = first + chain_of(model, inputs, times[1:])
    # The second moves by too little, the third by enough; the fourth is the last, the fifth begins another.
    assert (cache.computed, cache.reused) == (5, 1) and not report.fallbacks
    for i in (0, 2, 3, 4, 5):
        assert relative(got[i], plain[i]) < 1e-5, i
    assert 1e-5 < relative(got[1], plain[1]) < 0.1
    assert relative(chain_of(model, inputs, times)[1], plain[1]) < 1e-5  # outside of it as before
    assert_close(outcome(model, inputs), outcome(model_of(), inputs))


def test_lanes_have_steps_of_their_own():
    model, inputs = model_of(), inputs_of()
    accelerate(model)
    with step_cache(model, 0.1, steps=3, lanes=2) as cache:
        chain_of(model, inputs, [900.0, 100.0, 899.0, 99.0, 898.0, 98.0])
    assert (cache.computed, cache.reused) == (4, 2)


def test_what_a_step_cache_refuses():
    model, inputs = model_of(), inputs_of()
    with pytest.raises(UserError, match="got 0 patched transformers"), step_cache(model, 0.1, 4):
        pass
    accelerate(model)
    for words, needle in (
        (dict(threshold=0.0, steps=4), "threshold: got 0.0, want a positive number"),
        (dict(threshold=0.1, steps=0), "steps: got 0, want at least 1"),
        (dict(threshold=0.1, steps=4, lanes=0), "lanes: got 0, want at least 1"),
    ):
        with pytest.raises(UserError, match=needle), step_cache(model, **words):
            pass
    with step_cache(model, 0.1, 4):
        with pytest.raises(UserError, match="want one without"), step_cache(model, 0.1, 4):
            pass
        chain_of(model, inputs, [900.0])
        with pytest.raises(UserError, match=r"step_cache: got tokens \[1, 24, 48\] in step 1 of 4"):
            chain_of(model, [a if a is None else a[:1] for a in inputs], [900.0])
        model.rope.freqs_cos = model.rope.freqs_cos.roll(1, 0)
        with pytest.raises(UserError, match="step_cache: got a call for the original code"):
            chain_of(model, inputs, [900.0])


def test_reentrant_checkpoints_do_not_run_what_is_for_no_gradient():
    """Their forward has no gradient enabled, their recomputation has."""
    model, inputs = model_of(), inputs_of()
    accelerate(model)

    def reentrant(block, *arguments):
        return checkpoint(block, *arguments, use_reentrant=True)

    model.enable_gradient_checkpointing(reentrant)
    model.train()
    with step_cache(model, 0.1, 4), pytest.raises(UserError, match="want use_reentrant=False"):
        model(*inputs)
    model(*inputs, return_dict=False)[0].sum().backward()
