"""The padding of the text as one token that counts as often: everything is as with all of the padding."""

import pytest
import torch
from helpers import SHAPE, random_batch, relative, tiny_config, tiny_model, tiny_reward, under
from rounding import assert_as_right, rounding
from test_graphs import FakeRecorder

from prfl_engine import chain, flow
from prfl_engine.config import ChainConfig, LoraConfig, LossConfig, RolloutConfig, UserError
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.model import lora, wan
from prfl_engine.model.layers import IMAGE_TOKENS
from prfl_engine.objectives import bind, graded_windows, reward_loss, sft_loss
from prfl_engine.rollout.accelerated import Rollout
from prfl_engine.rollout.fp8 import Fp8Blocks
from prfl_kernels import dispatch

WHOLE, GIVEN, MERGED = 160, 70, 128  # tokens of a padded text, of a prompt, of its context
BOTH = pytest.mark.parametrize("model_type", ["t2v", "i2v"])
POLICIES = {
    "none": "none",
    "full": "full",
    "cross-attention kept": BlockPolicy({"input", "cross_attention", "cross_projections"}),
    "all away": BlockPolicy((), {"input", "attention", "after_attention", "after_cross"}),
}


def long_text(model_type="t2v", **fields):
    return tiny_config(model_type, text_len=WHOLE, **fields)


def with_and_without_all_padding(run):
    """(what run() returns, what it returns where contexts have every token of the padding)."""
    got = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "TEXT_MULTIPLE", WHOLE)
        return got, run()


def assert_close(got, want, limit):
    assert got.keys() == want.keys()
    for name, a in want.items():
        assert a.any(), name
        assert relative(got[name], a) < limit, name


def gradients(model):
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


@BOTH
@pytest.mark.parametrize(
    "given, tokens",
    [(0, 64), (1, 64), (63, 64), (64, 128), (70, 128), (127, 128), (128, 160), (159, 160), (160, 160)],
)
def test_tokens_of_a_context(model_type, given, tokens):
    """At least one of padding, unless the text leaves no room for it."""
    config = long_text(model_type)
    model, batch = tiny_model(config), random_batch(config, 2, tokens=given)
    context = model.embed_context(batch.text, batch.clip)
    image = IMAGE_TOKENS if config.image else 0
    assert context.shape == (2, image + tokens, config.dim)
    assert model.repeats(context) == WHOLE - tokens + 1
    if given < WHOLE:
        padding = model.text_embedding(torch.zeros(1, config.text_dim))
        torch.testing.assert_close(context[:, image + given :], padding.expand(2, tokens - given, -1))


def test_contexts_of_a_few_tokens_are_those_of_the_official_code():
    assert tiny_model().embed_context(torch.randn(1, 2, 12)).shape[1] == 6


def test_a_text_that_is_too_long_is_named():
    model = tiny_model(long_text())
    with pytest.raises(UserError, match="^text: got 161 tokens, want at most 160$"):
        model.embed_context(torch.randn(1, 161, 12))
    with pytest.raises(ValueError, match="got 0 repeats of the last key, want at least 1"):
        model(torch.randn(1, *SHAPE), torch.tensor([500.0]), torch.randn(1, 161, 32))


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
def test_all_gradients_in_float64(model_type, policy):
    """Of the weights, those of text_embedding among them, of latent and text."""
    config = long_text(model_type)

    def run():
        model = tiny_model(config).double()
        torch.manual_seed(0)
        batch = random_batch(config, 2, tokens=GIVEN, dtype=torch.float64)
        x, text = batch.latent.requires_grad_(), batch.text.requires_grad_()
        velocity = bind(model, batch, run_blocks=under(POLICIES[policy]))
        v = velocity(x, torch.tensor([700.0, 30.0]), torch.arange(2))
        v.square().mean().backward()
        return {"v": v.detach(), "x": x.grad, "text": text.grad, **gradients(model)}

    assert_close(*with_and_without_all_padding(run), 1e-12)


def test_samples_with_texts_of_several_lengths():
    """Padding of the batch itself is one token each; a sample gets what it gets alone."""
    config = long_text()
    model = tiny_model(config).double()
    batch = random_batch(config, 3, tokens=GIVEN, dtype=torch.float64)
    for b, n in enumerate((1, 30)):
        batch.text[b, n:] = 0
    t = torch.full((3,), 400.0)
    with torch.no_grad():
        together = bind(model, batch)(batch.latent, t, torch.arange(3))
        for b, n in enumerate((1, 30, GIVEN)):
            alone = batch._replace(latent=batch.latent[b : b + 1], text=batch.text[b : b + 1, :n])
            got = bind(model, alone)(alone.latent, t[:1], torch.arange(1))
            assert relative(got[0], together[b]) < 1e-13


def test_low_rank_updates():
    config = long_text()

    def run():
        model = lora.attach(tiny_model(config).double(), LoraConfig(rank=2))
        torch.manual_seed(0)
        for name, p in lora.parameters(model).items():
            if name.endswith("lora_B"):
                p.data = torch.randn_like(p)
        assert model.blocks[0].cross_attn.fused
        batch = random_batch(config, 2, tokens=GIVEN, dtype=torch.float64)
        sft_loss(model, batch, torch.randn_like(batch.latent), torch.tensor([0.3, 0.8])).sum().backward()
        return gradients(model)

    assert_close(*with_and_without_all_padding(run), 1e-12)


def test_rewards_and_their_gradients():
    """Reward model and generator, windows that add up the gradient of the context."""
    config = long_text()
    schedule = flow.make_schedule("unipc", 6, 5.0)

    def run():
        model, reward = tiny_model(config).double(), tiny_reward(config).double().freeze()
        torch.manual_seed(0)
        batch = random_batch(config, 2, tokens=GIVEN, dtype=torch.float64)
        noise, indices = torch.randn_like(batch.latent), torch.tensor([[1, 2], [4, 3]])
        logits = []
        for window in graded_windows(model, reward, schedule, batch, noise, indices, ChainConfig(2)):
            logits.append(window.logit.detach())
            window.backward(reward_loss(window.logit, LossConfig()).mean())
        return {"logits": torch.stack(logits), **gradients(model)}

    assert_close(*with_and_without_all_padding(run), 1e-9)


@pytest.mark.parametrize("kernels", ["reference", ""])
def test_float32_on_plain_torch_and_on_the_default_kernels(kernels):
    """As right as with all of the padding, whose equal tokens are summed one by one."""
    config = long_text()

    def run(dtype=torch.float32):
        model = tiny_model(config).to(dtype)
        torch.manual_seed(0)
        batch = random_batch(config, 2, tokens=GIVEN)
        noise = torch.randn_like(batch.latent).to(dtype)
        batch = batch._replace(latent=batch.latent.to(dtype), text=batch.text.to(dtype))
        sft_loss(model, batch, noise, torch.tensor([0.3, 0.8])).sum().backward()
        return gradients(model)

    dispatch.configure(kernels)
    try:
        got, want = with_and_without_all_padding(run)
        exact = run(torch.float64)
    finally:
        dispatch.configure("")
    for name, a in exact.items():
        assert a.any(), name
        assert_as_right(got[name], a, want[name], rounding(WHOLE, alike=True), name)


@torch.no_grad()
def test_fp8_blocks():
    """What goes into the last projection of cross-attention, in bfloat16; behind it values of e4m3 flip."""
    config = long_text(dim=128, num_heads=2, num_layers=1)
    model = tiny_model(config)
    cross, held = model.blocks[0].cross_attn, []
    attend = type(cross).attend
    cross.attend = lambda *a: held.append(attend(cross, *a)) or held[-1]
    blocks, text = Fp8Blocks(model), torch.randn(2, 10, config.text_dim)
    blocks.follow()
    tokens, e = torch.randn(2, 30, config.dim), 0.3 * torch.randn(2, 6, config.dim)

    def run():
        context = model.embed_context(text)
        return blocks(model.blocks, tokens, e, context, model.repeats(context), (2, 3, 5))

    with_and_without_all_padding(run)
    assert held[0].dtype == torch.bfloat16 and relative(*held) < 2**-8


def test_rollouts_and_what_their_graphs_are_recorded_for():
    """Prompts have recordings of their own where contexts differ in the number of tokens."""
    config = long_text()
    model, schedule = tiny_model(config), flow.make_schedule("unipc", 4, 5.0)
    record, index = FakeRecorder(), torch.tensor([3])
    rollout = Rollout(model, RolloutConfig(steps=4), schedule, record)
    batch = random_batch(config, 1, tokens=GIVEN)
    noise = torch.randn_like(batch.latent)

    @torch.no_grad()
    def visited(batch):
        stretch = rollout.stretches(batch, model.embed_context(batch.text))
        way = chain.Chain(None, schedule, noise, stretch)
        way.advance_to(index, index)
        return way.at(index, torch.arange(1)).x

    found = []
    for tokens in (GIVEN, 10, GIVEN + 20):
        one = batch._replace(text=torch.randn(1, tokens, config.text_dim))
        found.append(one)
        got, want = with_and_without_all_padding(lambda one=one: visited(one))
        assert relative(got, want) < 1e-5
    assert record.recorded == 3  # 128, 64 and 160 tokens
    assert all(torch.equal(visited(one), visited(one)) for one in found) and record.recorded == 3
