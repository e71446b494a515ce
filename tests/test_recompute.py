"""Block policies: the same gradients whatever is saved, offloaded or recomputed, and the bytes they say."""

import gc
from itertools import combinations

import pytest
import torch
from helpers import model_and_batch, random_batch, tiny_config, tiny_model, tiny_reward, under
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from prfl_engine import flow
from prfl_engine.config import ChainConfig, LoraConfig
from prfl_engine.memory import recompute
from prfl_engine.memory.host import HostStore, HostTensor, store_of
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import BETWEEN, NAMES, BlockPolicy, named
from prfl_engine.model import lora
from prfl_engine.model.layers import Linear
from prfl_engine.objectives import bind, graded_windows, sft_loss

LATENT = (16, 3, 8, 8)  # 48 tokens
INNER = tuple(n for n in NAMES if n not in BETWEEN)
POLICIES = {
    "none": named("none"),
    "full": named("full"),
    "attention": named("attention"),
    "full, little saved in a rerun": named("full", "nothing"),
    "between": BlockPolicy(BETWEEN),
    "no cross_normed": BlockPolicy(set(NAMES) - {"cross_normed"}),
    "no after_attention": BlockPolicy(set(NAMES) - {"after_attention"}),
    "no after_cross": BlockPolicy(set(NAMES) - {"after_cross"}),
    "only after_attention": BlockPolicy({"input", "after_attention"}),
    "hidden and attentions": BlockPolicy({"input", "attention", "cross_attention", "hidden"}),
    "input offloaded": BlockPolicy((), {"input"}),
    "input and attention offloaded": BlockPolicy((), {"input", "attention"}),
    "input kept, attention offloaded": BlockPolicy({"input"}, {"attention"}),
    "between offloaded": BlockPolicy(INNER, BETWEEN),
    "all offloaded": BlockPolicy((), NAMES),
    "hidden offloaded": BlockPolicy({*BETWEEN, "attention"}, {"hidden", "projections"}),
}


def gradients(policy, model_type="t2v", blocks=3, dtype=torch.float64, change=None):
    config = tiny_config(model_type, num_layers=blocks)
    model = tiny_model(config).to(dtype)
    if change is not None:
        change(model)
    torch.manual_seed(0)
    batch = random_batch(config, 2, LATENT, dtype=dtype)
    x = batch.latent.requires_grad_()
    v = bind(model, batch, run_blocks=under(policy))(x, torch.tensor([700.0, 30.0]), torch.arange(2))
    v.square().mean().backward()
    return {"x": x.grad, **{k: p.grad for k, p in model.named_parameters() if p.requires_grad}}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, a in want.items():
        assert a.any(), name
        torch.testing.assert_close(got[name], a, rtol=1e-12, atol=1e-14, msg=name)


def test_no_policy_changes_a_gradient():
    want = gradients("none")
    for policy in POLICIES.values():
        assert_same(gradients(policy), want)


@pytest.mark.parametrize("inner", [(), INNER, ("attention", "cross_attention", "hidden")], ids=len)
def test_any_tensors_between_sublayers_may_be_saved(inner):
    want = gradients("none", blocks=1)
    for count in range(len(BETWEEN)):
        for streams in combinations(BETWEEN[1:], count):
            assert_same(gradients(BlockPolicy({"input", *streams, *inner}), blocks=1), want)


def test_nor_with_an_image():
    want = gradients("none", "i2v", blocks=2)
    for name in ("full", "hidden and attentions", "between", "all offloaded"):
        assert_same(gradients(POLICIES[name], "i2v", blocks=2), want)


def test_blocks_may_have_policies_of_their_own():
    want = gradients("none")
    assert_same(gradients([POLICIES[k] for k in ("input offloaded", "none", "attention")]), want)
    assert_same(gradients([POLICIES[k] for k in ("between", "all offloaded", "full")]), want)


@pytest.mark.parametrize("name", ["full", "attention", "input and attention offloaded", "between"])
def test_frozen_weights_and_layers_one_by_one(name):
    """Adapters: cross-attention runs layer by layer, and all but one linear layer is frozen."""

    class Adapted(Linear):
        pass

    def change(model):
        model.requires_grad_(False)
        for block in model.blocks:
            block.cross_attn.q.__class__ = Adapted
            block.cross_attn.q.requires_grad_()

    assert_same(gradients(POLICIES[name], change=change), gradients("none", change=change))


def gradients_of_updates(policy, targets):
    config = tiny_config(num_layers=2)
    model = lora.attach(tiny_model(config), LoraConfig(2, targets=targets)).double()
    torch.manual_seed(0)
    for p in lora.parameters(model).values():
        torch.nn.init.normal_(p)
    batch = random_batch(config, 2, LATENT, dtype=torch.float64)
    noise, sigma = torch.ones_like(batch.latent), torch.tensor([0.3, 0.8])
    sft_loss(model, batch, noise, sigma, under(policy)).mean().backward()
    return {k: p.grad for k, p in lora.parameters(model).items()}


@pytest.mark.parametrize("targets", [
    ("cross_attn.k", "cross_attn.v"), ("cross_attn.o",), ("ffn.2",), ("blocks.1.cross_attn.v",),
], ids=str)  # fmt: skip
def test_updates_with_nothing_trained_before_them(targets):
    """Neither the stream nor what cross-attention reads takes gradient in the first block trained."""
    want = gradients_of_updates("none", targets)
    for policy in POLICIES.values():
        assert_same(gradients_of_updates(policy, targets), want)


def test_blocks_without_a_backward_move_nothing(monkeypatch):
    monkeypatch.setattr(HostStore, "put", lambda *_: pytest.fail("offloaded for nothing"))
    config = tiny_config(num_layers=2)
    model, batch = tiny_model(config).requires_grad_(False), random_batch(config, 1, LATENT)
    made = []
    for name in ("none", "all offloaded"):
        velocity = bind(model, batch, run_blocks=under(POLICIES[name]))
        made.append(velocity(batch.latent, torch.tensor([500.0]), torch.arange(1)))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "name", ["full", "attention", "input offloaded", "between offloaded", "all offloaded"]
)
def test_windows_a_frozen_reward_and_flow_matching(name):
    config = tiny_config(num_layers=3)
    found = []
    for policy in (POLICIES["none"], POLICIES[name]):
        torch.manual_seed(0)
        model, reward = tiny_model(config).double(), tiny_reward(config, blocks=2).double().freeze()
        batch = random_batch(config, 2, LATENT, dtype=torch.float64)
        noise, schedule = torch.randn_like(batch.latent), flow.make_schedule("unipc", 5, 5.0)
        sft_loss(model, batch, noise, torch.tensor([0.3, 0.8]), under(policy)).mean().backward()
        indices = torch.tensor([[1, 0], [3, 3]])
        given = model, reward, schedule, batch, noise, indices, ChainConfig(window=3)
        for window in graded_windows(*given, run_blocks=under(policy), score_blocks=under(policy)):
            window.backward(torch.sigmoid(window.logit).sum())
        assert all(p.grad is None for p in reward.parameters())
        found.append({k: p.grad for k, p in model.named_parameters()})
    assert_same(found[1], found[0])


def test_two_backwards_of_one_graph():
    config = tiny_config(num_layers=2)
    model = tiny_model(config).double()
    batch = random_batch(config, 1, LATENT, dtype=torch.float64)
    for policy in POLICIES.values():
        velocity = bind(model, batch, run_blocks=under(policy))
        loss = velocity(batch.latent, torch.tensor([500.0]), torch.arange(1)).square().sum()
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def live_bytes(policy, blocks):
    """(device bytes between forward and backward, host bytes there, peak) of a model of `blocks` blocks."""
    config = tiny_config(num_layers=blocks)
    model = tiny_model(config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    batch, t = random_batch(config, 1, LATENT), torch.tensor([700.0])
    bind(model, batch)(batch.latent, t, torch.arange(1)).sum().backward()  # tables of angles are made once
    with LiveBytes() as live:
        live.add([*model.parameters(), *(p.grad for p in model.parameters()), batch.latent, batch.text, t])
        before = live.now
        loss = bind(model, batch, run_blocks=under(policy))(batch.latent, t, torch.arange(1)).sum()
        kept = live.now - before
        host = live.host_now
        loss.backward()
        assert live.host_now == 0
    return kept, host, live.peak - before


TOKENS, C, F, H = 48, 32, 48, 2
ROW = 4 * TOKENS * C  # a float32 [L, C]
SIZES = dict.fromkeys(NAMES, ROW) | {
    "projections": 3 * ROW, "rotated": 2 * ROW + 2 * 4 * TOKENS, "attention": ROW + 4 * TOKENS * H,
    "cross_attention": ROW + 4 * TOKENS * H, "cross_projections": ROW + 2 * 4 * 6 * C,
    "cross_queries": ROW + 4 * TOKENS, "hidden": 4 * TOKENS * F,
}  # fmt: skip


def a_block(policy):
    """Bytes that a block more keeps on the device and on the host."""
    (device, host, _), (device_more, host_more, _) = (live_bytes(policy, n) for n in (3, 4))
    return device_more - device, host_more - host


SMALL = 6 * 4 * C + 3 * 2 * 4 * TOKENS  # the six vectors of a block, and mean and 1/std of its norms


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_saved_and_offloaded_with_the_bytes_that_it_says(name):
    base = BlockPolicy(BETWEEN)
    device, host = a_block(base)
    assert (device, host) == (sum(SIZES[k] for k in BETWEEN) + SMALL, 0)
    keep = {*BETWEEN, name}
    assert a_block(BlockPolicy(keep))[0] - device == (0 if name in BETWEEN else SIZES[name])
    away = a_block(BlockPolicy(keep - {name}, {name}))
    # batches of copies of two blocks are on their way
    assert away[1] == SIZES[name]
    assert away[0] == device - (SIZES[name] if name in BETWEEN else 0)


@pytest.mark.parametrize("name", ["after_attention", "cross_normed", "after_cross"])
def test_a_tensor_between_sublayers_that_is_recomputed_is_not_saved(name):
    assert a_block(BlockPolicy(BETWEEN))[0] - a_block(BlockPolicy(set(BETWEEN) - {name}))[0] >= SIZES[name]


def test_modes_keep_what_they_say():
    kept = {name: a_block(POLICIES[name])[0] for name in ("none", "attention", "full", "input offloaded")}
    assert kept["full"] <= ROW + SMALL
    assert kept["attention"] - kept["full"] == SIZES["attention"]
    assert kept["input offloaded"] == kept["full"] - ROW
    assert kept["none"] == sum(SIZES.values()) + SMALL


def test_nothing_is_left_behind_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        for policy in POLICIES.values():
            model, batch = model_and_batch("t2v", 1, LATENT, num_layers=2)
            with LiveBytes() as live:
                live.add([*model.parameters(), batch.latent, batch.text])
                before = live.now
                for backward in (True, False):
                    velocity = bind(model, batch, run_blocks=under(policy))
                    out = velocity(batch.latent, torch.tensor([700.0]), torch.arange(1)).sum()
                    del velocity
                    if backward:
                        out.backward()
                    del out
                    model.zero_grad(set_to_none=True)
                    assert live.now - before <= 2 * 4  # a constant or two
    finally:
        gc.enable()


def test_the_backward_brings_back_one_block_ahead(monkeypatch):
    """Order of fetches: while a block's backward runs, the block before it is on its way already."""
    order = []
    fetch, rerun = HostTensor.fetch, recompute.Run._rerun

    def watched(stored):
        if stored.back is None:
            order.append(("fetch", stored.host[0].data_ptr()))
        fetch(stored)

    monkeypatch.setattr(HostTensor, "fetch", watched)
    monkeypatch.setattr(
        recompute.Run, "_rerun", lambda run, name: (order.append(("rerun", id(run))), rerun(run, name))
    )
    gradients(BlockPolicy((), {"input"}), blocks=4)
    kinds = [kind for kind, _ in order]
    # the last block keeps its input: its two sublayers are rerun after the first fetch
    assert kinds == ["fetch", "rerun", "rerun"] * 3 + ["rerun"] * 2
    assert len({place for kind, place in order if kind == "fetch"}) == 3


def test_at_most_two_batches_of_copies_are_on_their_way(monkeypatch):
    store, sizes = store_of(torch.device("cpu")), []
    put = HostStore.put

    def watched(self, tensors):
        made = put(self, tensors)
        sizes.append(len(self._leaving))
        return made

    monkeypatch.setattr(HostStore, "put", watched)
    gradients(BlockPolicy((), {"input"}), blocks=6)
    assert sizes == [1, 2, 2, 2, 2] and not store._leaving


def test_what_a_block_offloads_has_left_when_the_next_one_is_over(monkeypatch):
    """Also where that one offloads nothing. In the end all of a model's blocks have let go."""
    store, left = store_of(torch.device("cpu")), []
    run = recompute.Run.__call__

    def watched(*arguments):
        left.append(len(store._leaving))
        return run(*arguments)

    monkeypatch.setattr(recompute.Run, "__call__", watched)
    away, stays = BlockPolicy((), {"input"}), named("none")
    gradients([away, away, stays, stays, away, stays], blocks=6)
    assert left == [0, 1, 1, 0, 0, 1] and not store._leaving


class Count(TorchDispatchMode):
    """How often each of our operations runs."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prfl":
            name = func.name().removeprefix("prfl::")
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, attend, cross, feed",
    [("none", 3, 3, 3), ("full", 6, 6, 3), ("attention", 6, 6, 3), ("between", 3, 3, 3)],
)
def test_sublayers_are_rerun_only_for_tensors_between_them_and_the_ffn_never(name, attend, cross, feed):
    with Count() as count:
        gradients(POLICIES[name])
    assert count.calls["modulated_attention"] == attend
    assert count.calls["cross_attention"] == cross
    assert count.calls["modulated_ffn"] == feed


def test_attention_that_is_saved_is_not_recomputed(monkeypatch):
    from prfl_kernels.sublayers import heads

    calls, real = [], heads.attend
    monkeypatch.setattr(heads, "attend", lambda *a: calls.append(1) or real(*a))
    for name, want in (("full", 6), ("attention", 3), ("input and attention offloaded", 3), ("between", 6)):
        calls.clear()
        gradients(POLICIES[name])
        assert len(calls) == want, name


@pytest.mark.parametrize(
    "saved, ran_again",
    [
        (torch.ops.prfl.modulated_attention.default, "modulated_attention"),
        (torch.ops.prfl.cross_attention.default, "cross_attention"),
    ],
)
def test_torchs_selective_checkpoint_sees_the_operations(saved, ran_again):
    """A user's policy that saves one of them: right gradients, and that operation runs once."""
    config = tiny_config(num_layers=1)
    block = tiny_model(config).double().blocks[0]
    x, e = torch.randn(1, 8, 32).double().requires_grad_(), torch.randn(1, 6, 32).double()
    context = torch.randn(1, 6, 32).double()

    def policy(ctx, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func is saved else CheckpointPolicy.PREFER_RECOMPUTE

    def run(**how):
        with Count() as count:
            given = x, e, context, 1, (2, 2, 2)
            out = checkpoint(block, *given, use_reentrant=False, **how) if how else block(*given)
            out = out[0]
            made = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
        return made, count.calls

    want, _ = run()
    got, calls = run(context_fn=lambda: create_selective_checkpoint_contexts(policy))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    counted = {k: calls[k] for k in ("modulated_attention", "cross_attention", "modulated_ffn")}
    assert counted.pop(ran_again) == 1
    assert set(counted.values()) == {2}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="keep: got 'hiden', want some of input, after_attention"):
        BlockPolicy({"input", "hiden"})
    with pytest.raises(ValueError, match="offload: got 'input', which keep names too"):
        BlockPolicy({"input"}, {"input"})
    with pytest.raises(ValueError, match="keep: got no input, want it in keep or offload"):
        BlockPolicy({"attention"})
    with pytest.raises(ValueError, match="recompute: got 'half', want one of none, full, attention"):
        named("half")
