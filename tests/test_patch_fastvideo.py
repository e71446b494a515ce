"""accelerate on a transformer with the names, shapes and calls of FastVideo's (fastvideo_twin)."""

import copy
from types import SimpleNamespace

import fastvideo_twin as twin
import pytest
import torch
from helpers import randomize, relative

from prfl_engine.errors import UserError
from prfl_engine.patch import accelerate, report_of, restore

SIZE = (2, 6, 8)


def model_of(image=False, **more):
    return randomize(twin.FastVideoTwin(image, **more))


def inputs_of(image=False, size=SIZE):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return normal(2, 16, *size), normal(2, 512, 12), torch.tensor([900.0, 30.0]), (
        normal(2, 257, 24) if image else None
    )


def outcome(model, *inputs):
    """Results of all inputs, and gradients of their sum by name, made after all forwards."""
    model.zero_grad()
    made = [model(*given) for given in inputs]
    sum(a.square().sum() for a in made).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return torch.cat([a.detach().flatten() for a in made]), grads


def assert_close(got, want, tolerance=1e-5):
    assert relative(got[0], want[0]) < tolerance and got[1].keys() == want[1].keys()
    floor = 1e-2 * max(a.norm() for a in want[1].values())
    for name, a in want[1].items():
        assert (got[1][name] - a).norm() < tolerance * max(a.norm(), floor), name


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("image, recompute", [(False, "none"), (True, "attention")])
def test_values_and_all_gradients_stay(image, recompute, later):
    model, inputs = model_of(image, later=later), inputs_of(image)
    want = outcome(model, inputs)
    report = accelerate(model, recompute)
    copied = copy.deepcopy(model)
    assert_close(outcome(model, inputs), want)
    assert (report.calls, report.fallbacks.total()) == (2, 0) and "FastVideo" in str(report)
    assert_close(outcome(copied, inputs), want)
    assert report_of(copied).calls == 2
    restore(model)
    assert torch.equal(outcome(model, inputs)[0], want[0]) and "forward" not in vars(model.patch_embedding)


def test_recomputed_blocks_have_the_grid_of_their_own_forward():
    """Two forwards whose grids have as many tokens, then both backwards."""
    model = model_of()
    model.checkpointing = True
    both = inputs_of(), inputs_of(size=(2, 8, 6))
    want = outcome(model, *both)
    report = accelerate(model)
    assert_close(outcome(model, *both), want)
    assert report.calls == 8 and not report.fallbacks


def test_the_probe_needs_no_context_of_a_pipeline(monkeypatch):
    monkeypatch.setattr(twin.LocalAttention, "ready", False)
    model = model_of()
    accelerate(model)
    assert all("forward" in vars(block) for block in model.blocks)


def test_calls_that_are_not_ours(monkeypatch):
    model, inputs = model_of(), inputs_of()
    report = accelerate(model)
    with torch.no_grad():
        turns = model.rotations
        monkeypatch.setattr(model, "rotations", lambda *grid: [a.roll(1, 0) for a in turns(*grid)])
        model(*inputs)
        monkeypatch.setattr(model, "rotations", turns)
        monkeypatch.setattr(twin, "RANKS", 2)
        with pytest.raises(AssertionError):  # the twin's own attention knows no ranks
            model(*inputs)
    (rope, ranks) = report.fallbacks
    assert "another table of rotations" in rope and "cut over processes" in ranks and report.calls == 0


def test_padding_of_newer_versions_is_left_to_the_original():
    model, inputs = model_of(later=True), inputs_of()
    with torch.no_grad():
        want = model(*inputs)
        report = accelerate(model)
        model.padding = 3
        assert relative(model(*inputs), want) < 1e-6
        assert (report.calls, *report.fallbacks.values()) == (0, 2) and "padded" in str(report)
        model.padding = 0
        assert relative(model(*inputs), want) < 1e-5 and report.calls == 2


def test_what_is_refused():
    quantised, sparse, updated = model_of(), model_of(), model_of()
    quantised.blocks[1].ffn.fc_in.quant_method = object()
    sparse.blocks[0].attn1.__class__ = type("DistributedAttention_VSA", (twin.DistributedAttention,), {})
    tiled = model_of()
    tiled.blocks[1].attn1.backend = SimpleNamespace(name="SLIDING_TILE_ATTN")
    moved = model_of()
    moved.patch_embedding.forward = moved.patch_embedding.forward
    layer = updated.blocks[0].to_q
    updated.blocks[0].to_q = torch.nn.Module()
    updated.blocks[0].to_q.base_layer = layer
    updated.blocks[0].to_q.lora_A = torch.nn.Parameter(torch.zeros(2, 48))
    for model, words in (
        (quantised, "blocks.1: ffn.fc_in: it is quantised, or does not add its bias"),
        (sparse, "blocks.0: attn1, attn2: their attention is DistributedAttention_VSA and LocalAttention"),
        (tiled, "blocks.1: attn1: its attention is .*SLIDING_TILE_ATTN.*, which may quantise"),
        (moved, "FastVideoTwin: patch_embedding: its forward was replaced"),
        (updated, "blocks.0: to_q: it is a Module, an adapter that is not PEFT's LoRA"),
    ):
        with pytest.raises(UserError, match=words):
            accelerate(model)
