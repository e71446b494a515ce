"""The transformer: official names and sizes, batching, text padding, recomputation, precision."""

import pytest
import torch
import torch.nn.functional as F
from fused import on_reference
from helpers import (
    SHAPE,
    model_and_batch,
    random_batch,
    randomize,
    relative,
    rows,
    tiny_config,
    tiny_model,
    under,
)
from rounding import assert_as_right, rounding

from prfl_engine.config import UserError
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.model.wan import PRESETS, WanTransformer, plain_blocks, sinusoid

BOTH = pytest.mark.parametrize("model_type", ["t2v", "i2v", "i2v-a14b"])

# The native names, written out from the official checkpoints.
BLOCK = {
    "modulation",
    "self_attn.q.weight", "self_attn.q.bias",
    "self_attn.k.weight", "self_attn.k.bias",
    "self_attn.v.weight", "self_attn.v.bias",
    "self_attn.o.weight", "self_attn.o.bias",
    "self_attn.norm_q.weight", "self_attn.norm_k.weight",
    "norm3.weight", "norm3.bias",
    "cross_attn.q.weight", "cross_attn.q.bias",
    "cross_attn.k.weight", "cross_attn.k.bias",
    "cross_attn.v.weight", "cross_attn.v.bias",
    "cross_attn.o.weight", "cross_attn.o.bias",
    "cross_attn.norm_q.weight", "cross_attn.norm_k.weight",
    "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
}  # fmt: skip
BLOCK_IMAGE = BLOCK | {
    "cross_attn.k_img.weight", "cross_attn.k_img.bias",
    "cross_attn.v_img.weight", "cross_attn.v_img.bias",
    "cross_attn.norm_k_img.weight",
}  # fmt: skip
REST = {
    "patch_embedding.weight", "patch_embedding.bias",
    "text_embedding.0.weight", "text_embedding.0.bias",
    "text_embedding.2.weight", "text_embedding.2.bias",
    "time_embedding.0.weight", "time_embedding.0.bias",
    "time_embedding.2.weight", "time_embedding.2.bias",
    "time_projection.1.weight", "time_projection.1.bias",
    "head.modulation", "head.head.weight", "head.head.bias",
}  # fmt: skip
REST_IMAGE = REST | {
    "img_emb.proj.0.weight", "img_emb.proj.0.bias",
    "img_emb.proj.1.weight", "img_emb.proj.1.bias",
    "img_emb.proj.3.weight", "img_emb.proj.3.bias",
    "img_emb.proj.4.weight", "img_emb.proj.4.bias",
}  # fmt: skip


def velocity(model, batch, t, run_blocks=plain_blocks):
    context = model.embed_context(batch.text, batch.clip)
    return model(batch.latent, t, context, batch.condition, run_blocks)


@BOTH
def test_native_names(model_type):
    config = tiny_config(model_type)
    image = model_type == "i2v"
    rest, block = (REST_IMAGE, BLOCK_IMAGE) if image else (REST, BLOCK)
    want = rest | {f"blocks.{i}.{k}" for i in range(2) for k in block}
    assert set(WanTransformer(config).state_dict()) == want
    trunk = WanTransformer(config, 1, head=False)
    assert set(trunk.state_dict()) == {k for k in want if not k.startswith(("head.", "blocks.1."))}


# A block of width C and FFN width F: 8 (C^2 + C) + 4 C + 2 C + 2 C F + F + C + 6 C parameters, and
# 2 (C^2 + C) + C more with image attention.
@pytest.mark.parametrize("model_type, block", [("t2v", 351_394_304), ("i2v", 403_838_464)])
def test_sizes_of_the_14b_presets(model_type, block):
    preset = {"t2v": "t2v-14b", "i2v": "i2v-14b-720p"}[model_type]
    with torch.device("meta"):
        model = WanTransformer(PRESETS[preset])
    assert round(size(model) / 1e9, 1) == {"t2v": 14.3, "i2v": 16.4}[model_type]
    assert size(model.blocks[0]) == block
    assert len(model.blocks) == 40
    assert PRESETS["i2v-14b-480p"] == PRESETS["i2v-14b-720p"]


def test_size_of_the_1_3b_preset():
    with torch.device("meta"):
        model = WanTransformer(PRESETS["t2v-1.3b"])
    assert round(size(model) / 1e9, 1) == 1.4
    assert model.patch_embedding.weight.shape == (1536, 16, 1, 2, 2)
    assert model.head.head.weight.shape == (64, 1536)
    assert model.time_projection[1].weight.shape == (6 * 1536, 1536)


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_a_new_model_predicts_zero_velocity():
    config = tiny_config()
    model = WanTransformer(config).init_weights(torch.Generator().manual_seed(0))
    again = WanTransformer(config).init_weights(torch.Generator().manual_seed(0))
    batch = random_batch(config)
    assert not velocity(model, batch, torch.tensor([1.0, 500.0])).any()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_sinusoid_is_cosines_then_sines_of_real_timesteps():
    got = sinusoid(torch.tensor([999.5]), 8)[0]
    angles = [999.5 / 10000 ** (j / 4) for j in range(4)]
    want = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(got, torch.cat([want.cos(), want.sin()]), rtol=1e-12, atol=1e-12)


# Float64, so that what is left is the order of sums inside a matrix product.
@BOTH
def test_a_batch_is_its_samples(model_type):
    model, batch = model_and_batch(model_type, 2, dtype=torch.float64)
    t = torch.tensor([900.0, 113.0])
    together = velocity(model, batch, t)
    assert together.shape == (2, *SHAPE)
    for b in range(2):
        alone = velocity(model, rows(batch, slice(b, b + 1)), t[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-10, atol=1e-10)
    assert relative(together[1], together[0]) > 0.1


def test_padding_of_the_text_is_attended_to():
    model, batch = model_and_batch(tokens=4, dtype=torch.float64)
    t = torch.tensor([500.0, 500.0])
    padded = batch._replace(text=F.pad(batch.text, (0, 0, 0, 2)))
    got = velocity(model, batch, t)
    assert torch.equal(got, velocity(model, padded, t))
    shorter = WanTransformer(tiny_config(text_len=4)).double()
    shorter.load_state_dict(model.state_dict())
    assert relative(velocity(shorter, batch, t), got) > 1e-3


@BOTH
def test_every_input_matters(model_type):
    model, batch = model_and_batch(model_type, 1, dtype=torch.float64)
    t = torch.tensor([500.0])
    base = velocity(model, batch, t)
    for name in ("latent", "text", "clip", "condition"):
        value = getattr(batch, name)
        if value is not None:
            other = batch._replace(**{name: value + torch.randn_like(value)})
            assert relative(velocity(model, other, t), base) > 1e-4, name
    assert relative(velocity(model, batch, t + 0.5), base) > 1e-6


def test_i2v_context_puts_image_tokens_first():
    model, batch = model_and_batch("i2v", 1)
    context = model.embed_context(batch.text, batch.clip)
    assert context.shape == (1, 257 + model.config.text_len, model.config.dim)
    changed = model.embed_context(batch.text + 1, batch.clip)
    assert torch.equal(changed[:, :257], context[:, :257])
    assert not torch.equal(changed[:, 257:], context[:, 257:])


def test_patchify_is_the_strided_convolution():
    model = tiny_model().double()
    x = torch.randn(2, 16, 3, 4, 6, dtype=torch.float64)
    context = model.embed_context(torch.randn(2, 1, 12, dtype=torch.float64))
    got = model.features(x, torch.zeros(2), context, blocks=0)
    want = model.patch_embedding(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_unpatchify_puts_every_patch_back():
    """With a head that copies pixels out of the tokens, the velocity is the latent again."""
    config = tiny_config(dim=64, num_layers=0)
    model = WanTransformer(config).double()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(1, 16, 2, 4, 6, dtype=torch.float64)
    # Token channels in the order (row, column, channel) of the official head.
    weight = torch.zeros(64, 16, 1, 2, 2, dtype=torch.float64)
    for row in range(2):
        for column in range(2):
            for c in range(16):
                weight[(row * 2 + column) * 16 + c, c, 0, row, column] = 1
    model.patch_embedding.weight.data = weight
    model.head.head.weight.data = torch.eye(64, dtype=torch.float64)
    out = model(x, torch.zeros(1), torch.zeros(1, 6, 64, dtype=torch.float64))
    # What the head's LayerNorm does to a patch is undone with the patch's mean and deviation.
    tokens = model.patch_embedding(x)
    mean = tokens.mean(1, keepdim=True).repeat_interleave(2, 3).repeat_interleave(2, 4)
    variance = tokens.var(1, keepdim=True, unbiased=False)
    deviation = (variance + config.eps).sqrt().repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(out * deviation + mean, x, rtol=1e-10, atol=1e-10)


MEMORY = [("none", k) for k in ("all", "projections", "attention", "nothing")]
MEMORY += [("attention", "all"), ("full", "all")]


@BOTH
def test_what_is_kept_changes_no_gradient(model_type):
    config = tiny_config(model_type)
    batch, t = random_batch(config), torch.tensor([700.0, 30.0])
    gradients = []
    for recompute, keep in MEMORY:
        model = tiny_model(config)
        velocity(model, batch, t, under(recompute, keep)).square().mean().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][k], g) for k, g in other.items())
    assert all(g.any() for k, g in gradients[0].items())


def test_every_mode_keeps_less_than_the_one_before():
    """Bytes that live between forward and backward; recomputing blocks keeps under half."""
    config = tiny_config(num_layers=4)
    batch, t = random_batch(config), torch.tensor([700.0, 30.0])
    kept = []
    for recompute, keep in MEMORY:
        model = tiny_model(config)
        with LiveBytes() as live:
            live.add([*model.parameters(), batch.latent, batch.text, t])
            before = live.now
            out = velocity(model, batch, t, under(recompute, keep))
            kept.append(live.now - before)
        del out
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert kept[-2] < kept[0] / 2


@BOTH
def test_features_of_the_first_blocks_are_those_of_the_trunk(model_type):
    model, batch = model_and_batch(model_type, num_layers=3)
    trunk = WanTransformer(model.config, 2, head=False)
    trunk.load_state_dict({k: model.state_dict()[k] for k in trunk.state_dict()})
    context, t = model.embed_context(batch.text, batch.clip), torch.tensor([1000.0, 201.0])
    want = trunk.features(batch.latent, t, context, batch.condition)
    assert torch.equal(model.features(batch.latent, t, context, batch.condition, blocks=2), want)
    assert not torch.equal(model.features(batch.latent, t, context, batch.condition), want)


def test_i2v_without_its_condition_is_refused():
    model, batch = model_and_batch("i2v")
    with pytest.raises(UserError, match="got 16 channels .* want 36"):
        velocity(model, batch._replace(condition=None), torch.zeros(2))


def test_impossible_configurations_are_refused():
    with pytest.raises(UserError, match="model_type"):
        tiny_config(model_type="v2v")
    with pytest.raises(UserError, match="dim"):
        tiny_config(dim=33)


def test_precision_of_the_residual_stream():
    """Bfloat16 matrix products on a float32 stream lose less than on a bfloat16 stream."""
    config = tiny_config(dim=64, ffn_dim=128, num_layers=8)
    model = tiny_model(config)
    batch, t = random_batch(config, 2, (16, 2, 8, 8)), torch.tensor([900.0, 200.0])
    exact = tiny_model(config).double()
    want = velocity(exact, random_double(batch), t)
    error = {}
    for residual in (torch.float32, torch.bfloat16):
        model.set_precision(torch.bfloat16, residual)
        out = velocity(model, batch, t)
        assert out.dtype == torch.float32
        error[residual] = relative(out, want)
    # Measured with five seeds: 0.0039 to 0.0050, and 0.0069 to 0.0082; one
    # rounding is 2^-9 = 0.002 at most.
    assert 1e-3 < error[torch.float32] < 0.0065
    assert 1.2 * error[torch.float32] < error[torch.bfloat16] < 0.011
    model.set_precision(torch.float32)
    got = velocity(model, batch, t)
    assert_as_right(got, want, on_reference(velocity)(model, batch, t), rounding(128))


def random_double(batch):
    return batch._replace(latent=batch.latent.double(), text=batch.text.double())


def test_time_embedding_and_head_stay_in_float32():
    config = tiny_config()
    model = tiny_model(config).set_precision(torch.bfloat16, torch.float32)
    exact = tiny_model(config).double()
    seen = {}

    def watch(name):
        return lambda module, inputs, output: seen.update({name: (inputs, output)})

    model.time_projection.register_forward_hook(watch("time"))
    model.head.register_forward_hook(watch("head"))
    model.blocks[0].cross_attn.q.register_forward_hook(watch("q"))
    batch, t = random_batch(config), torch.tensor([900.5, 3.25])
    with torch.no_grad():
        velocity(model, batch, t)

    _, out = seen["time"]
    assert out.dtype == torch.float32
    # Two layers of float32 products; bfloat16 would be off by 4e-3.
    want = exact.time_projection(exact.time_embedding(sinusoid(t, config.freq_dim)))
    assert relative(out, want) < 2e-6
    inputs, out = seen["head"]
    assert out.dtype == torch.float32
    assert relative(out, exact.head(*(a.double() for a in inputs))) < 2e-6
    inputs, out = seen["q"]
    assert inputs[0].dtype == out.dtype == torch.bfloat16


def test_weights_in_bfloat16_still_give_a_float32_velocity():
    model = randomize(tiny_model()).to(torch.bfloat16)
    batch = random_batch(tiny_config())
    assert velocity(model, batch, torch.tensor([900.0, 3.0])).dtype == torch.float32
