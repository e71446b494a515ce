"""TI2V: text mode, and image mode, where the first frame is given and its tokens have timestep 0."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    random_batch,
    randomize,
    relative,
    tiny_config,
    tiny_model,
    tiny_reward,
    under,
    write_data,
    write_run,
)
from test_kernels import attention_formula, norm_formula, rms_formula, rope_formula

from prfl_engine import chain, cli, flow
from prfl_engine.batch import Batch
from prfl_engine.config import ChainConfig, LoraConfig, RolloutConfig, UserError
from prfl_engine.convert import convert
from prfl_engine.data import Reader
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import load_transformer, save_transformer
from prfl_engine.model.wan import PRESETS, WanTransformer, sinusoid
from prfl_engine.objectives import bind, fixed, graded_windows, sft_loss
from prfl_engine.rollout.accelerated import Rollout

F64 = torch.float64
SHAPE = (16, 3, 4, 6)  # 3 frames of 6 tokens
T = torch.tensor([731.5, 20.0], dtype=F64)


def model_and_batch(image=True, **fields):
    model = tiny_model(tiny_config("ti2v", **fields)).double()
    batch = random_batch(model.config, shape=SHAPE, dtype=F64)
    return model, batch._replace(condition=torch.randn(2, 16, 1, 4, 6, dtype=F64)) if image else batch


def per_token(model, x, t_BL, text):
    """The velocity with a timestep for every token, as the official code of Wan2.2 has it: [B, L, 6, C]
    vectors, plain torch, no fused operation."""
    c = model.config
    grid = tuple(n // p for n, p in zip(x.shape[2:], c.patch_size, strict=True))
    tokens = F.conv3d(x, model.patch_embedding.weight, model.patch_embedding.bias, c.patch_size)
    tokens = tokens.flatten(2).mT

    def linear(m, a):
        weight = m.weight if m.lora_A is None else m.weight + m.lora_scale * m.lora_B @ m.lora_A
        return F.linear(a, weight, m.bias)

    first, _, second = model.text_embedding
    text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
    context = linear(second, F.gelu(linear(first, text), approximate="tanh"))
    first, _, second = model.time_embedding
    e = sinusoid(t_BL.flatten(), c.freq_dim).view(*t_BL.shape, -1)
    e = linear(second, F.silu(linear(first, e)))
    e0 = linear(model.time_projection[1], F.silu(e)).unflatten(2, (6, c.dim))

    def heads(a):
        return a.unflatten(2, (c.num_heads, -1))

    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation[:, None] + e0).unbind(2)
        a, n = block.self_attn, norm_formula(tokens) * (1 + scale1) + shift1
        q = rope_formula(linear(a.q, n), a.norm_q.weight, grid, c.num_heads)
        k = rope_formula(linear(a.k, n), a.norm_k.weight, grid, c.num_heads)
        y = attention_formula(q, k, heads(linear(a.v, n))).flatten(2)
        tokens = tokens + gate1 * linear(a.o, y)
        a, n = block.cross_attn, norm_formula(tokens) * block.norm3.weight + block.norm3.bias
        q = heads(rms_formula(linear(a.q, n), a.norm_q.weight))
        k = heads(rms_formula(linear(a.k, context), a.norm_k.weight))
        tokens = tokens + linear(a.o, attention_formula(q, k, heads(linear(a.v, context))).flatten(2))
        n = norm_formula(tokens) * (1 + scale2) + shift2
        y = linear(block.ffn[2], F.gelu(linear(block.ffn[0], n), approximate="tanh"))
        tokens = tokens + gate2 * y
    shift, scale = (model.head.modulation[:, None] + e[:, :, None]).unbind(2)
    patches = linear(model.head.head, norm_formula(tokens) * (1 + scale) + shift)
    patches = patches.unflatten(2, (*c.patch_size, c.out_dim)).unflatten(1, grid)
    return torch.einsum("bfhwpqrc->bcfphqwr", patches).reshape(x.shape)


def official(model, batch, x, t):
    """Image mode as the official code has it: the frame in its place, timestep 0 for its tokens."""
    x = torch.cat([batch.condition, x[:, :, 1:]], 2)
    frame = math.prod(n // p for n, p in zip(x.shape[3:], model.config.patch_size[1:], strict=True))
    every = t[:, None].repeat(1, x.shape[2] * frame)
    every[:, :frame] = 0
    return per_token(model, x, every, batch.text)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


CASES = {
    "plain": dict(),
    "chunk": dict(chunk=10),  # of both samples: 5 tokens of each, so the boundary 6 is inside of a piece
    "recompute": dict(policy="full"),
    "attention": dict(policy="attention", keep="nothing"),
    "lora": dict(rank=3),
}


@pytest.mark.usefixtures("gates_both_ways")
@pytest.mark.parametrize("name", CASES)
def test_image_mode_is_that_of_a_timestep_for_every_token(name):
    case = CASES[name]
    model, batch = model_and_batch()
    if rank := case.get("rank"):
        lora.start(model, LoraConfig(rank=rank), 0, None)
        for name, p in model.named_parameters():
            if "lora" in name:
                randomize(torch.nn.ParameterList([p]))
        model.double()
    model.set_chunk(case.get("chunk"))
    run_blocks = under(case.get("policy", "none"), case.get("keep", "all"))
    x, direction = batch.latent.clone().requires_grad_(), torch.randn(2, *SHAPE, dtype=F64)
    direction[:, :, 0] = 0  # official code computes a velocity of the given frame and drops it
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    got = bind(model, batch, run_blocks=run_blocks)(x, T, torch.arange(2))
    want = official(model, batch, x, T)
    torch.testing.assert_close(got[:, :, 1:], want[:, :, 1:], rtol=1e-12, atol=1e-12)
    assert not got[:, :, 0].any()
    ours, theirs = (gradients((a * direction).sum(), *leaves) for a in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_text_mode_is_t2v():
    model, batch = model_and_batch(image=False)
    same = WanTransformer(replace(model.config, model_type="t2v")).double()
    same.load_state_dict(model.state_dict())
    got, want = (bind(m, batch)(batch.latent, T, torch.arange(2)) for m in (model, same))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    every = T[:, None].expand(2, 18)
    torch.testing.assert_close(got, per_token(model, batch.latent, every, batch.text), rtol=1e-12, atol=1e-12)


def test_flow_matching_leaves_out_the_given_frame():
    model, batch = model_and_batch()
    batch = batch._replace(condition=batch.latent[:, :, :1])
    noise, sigma = torch.randn_like(batch.latent), torch.tensor([0.3, 0.8], dtype=F64)
    got = sft_loss(model, batch, noise, sigma)
    x = flow.add_noise(batch.latent, noise, sigma)
    off = official(model, batch, x, 1000 * sigma) - (noise - batch.latent)
    torch.testing.assert_close(got, off[:, :, 1:].square().flatten(1).mean(1))


def repinned(model, batch, schedule, noise):
    """All states of a chain by the letter: the frame is put in its place after every step."""
    states = [flow.init_state(torch.cat([batch.condition, noise[:, :, 1:]], 2))]
    for i in range(len(schedule)):
        t = schedule.timesteps[i].double().expand(2)
        v = official(model, batch, states[-1].x, t)
        made = flow.step(schedule, states[-1], v, torch.tensor([i, i]))
        states.append(made._replace(x=torch.cat([batch.condition, made.x[:, :, 1:]], 2)))
    return states


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_chain_keeps_the_given_frame(solver):
    model, batch = model_and_batch()
    schedule, noise = flow.make_schedule(solver, 5, 5.0), torch.randn(2, *SHAPE, dtype=F64)
    with torch.no_grad():
        want = repinned(model, batch, schedule, noise)
        way = chain.Chain(bind(model, batch), schedule, fixed(model, batch, noise))
        way.advance_to(torch.tensor([5, 5]), torch.tensor([0, 0]))
    for i, state in enumerate(want):
        got = way.at(torch.tensor([i, i]), torch.arange(2)).x
        torch.testing.assert_close(got, state.x, rtol=1e-10, atol=1e-10)


def test_graded_window_has_the_gradient_of_the_repinned_chain():
    model, batch = model_and_batch()
    reward = tiny_reward(model.config).double().freeze()
    schedule, noise = flow.make_schedule("unipc", 4, 5.0), torch.randn(2, *SHAPE, dtype=F64)
    index = torch.tensor([[2, 2]])
    (window,) = graded_windows(model, reward, schedule, batch, noise, index, ChainConfig(window=3))
    window.backward(window.logit.sum())
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    state = repinned(model, batch, schedule, noise)[3]
    t = schedule.timesteps[3].double().expand(2)
    logit = reward(state.x, t, batch.text, None, batch.condition)
    torch.testing.assert_close(window.logit, logit.detach(), rtol=1e-9, atol=1e-9)
    logit.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("how", [{"cache": 1e-9}, {"precision": "fp8"}])
def test_accelerated_rollouts_have_both_timesteps(how):
    model, batch = model_and_batch(dim=128, num_heads=2, ffn_dim=256)
    model, batch = model.float(), Batch(*(None if a is None else a.float() for a in batch))
    schedule, active = flow.make_schedule("euler", 4, 5.0), torch.arange(2)
    rollout = Rollout(model, RolloutConfig(steps=4, **how), schedule)
    with torch.no_grad():
        velocity = rollout.stretches(batch, model.embed_context(batch.text))()
        got, want = (v(batch.latent, T.float(), active) for v in (velocity, bind(model, batch)))
        text = bind(model, batch._replace(condition=None))(batch.latent, T.float(), active)
    assert not got[:, :, 0].any()
    got, want, text = (a[:, :, 1:] for a in (got, want, text))
    assert relative(got, want) < (0.5 * relative(got, text) if "precision" in how else 1e-6)


def test_the_drift_of_a_guided_rollout_keeps_the_given_frame():
    model, batch = model_and_batch()
    model, batch = model.float(), Batch(*(None if a is None else a.float() for a in batch))
    guidance = Guidance(torch.randn(3, model.config.text_dim), *[Scales(3.0, 3.0, 0.0)] * 2)
    rollout = Rollout(
        model, RolloutConfig(steps=4, cache=0.1), flow.make_schedule("euler", 4, 5.0), guidance=guidance
    )
    assert 0 <= rollout.drift(batch, torch.randn_like(batch.latent), torch.tensor([3, 2])) < 1


SECTIONS = {
    "fresh": {"rollout": {"steps": 4}, "chain": {"window": 2}},
    "persistent": {"rollout": {"steps": 4, "mode": "persistent", "probe_every": 1}},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_training_keeps_the_first_frame_of_every_latent(name, tmp_path, monkeypatch):
    """Data, flow matching, graded steps, validation and sampling, and the states of persistent chains."""
    sections = SECTIONS[name] | {"data": {"first_frame": True}, "eval": {"every": 2}}
    path = write_run(tmp_path, "ti2v", shape=(16, 2, 4, 4), **sections)
    seen = []
    forward = WanTransformer.forward

    def look(self, x, t, context, condition=None, *rest):
        seen.append(condition is not None)
        return forward(self, x, t, context, condition, *rest)

    monkeypatch.setattr(WanTransformer, "forward", look)
    assert cli.main(["train", str(path), "loss.sft_weight=0"]) == 0
    assert seen and all(seen)
    assert cli.main(["sample", str(path), "--out", str(tmp_path / "samples")]) == 0
    for i in range(2):
        made = np.load(tmp_path / f"samples/sample-{i:02d}.npy")
        given = np.load(json.loads((tmp_path / f"val/{i}.json").read_text())["vae_latent_path"])
        assert (made[:, :, 0] == given[:, :, 0]).all() and (made[:, :, 1] != given[:, :, 1]).all()


def test_a_first_frame_needs_a_second(tmp_path):
    config = tiny_config("ti2v")
    write_data(tmp_path, config, 1)
    with pytest.raises(UserError, match="latent: got .16, 1, 4, 4., want 2 frames or more"):
        Reader(config, first_frame=True).read(tmp_path / "0.json", np.random.default_rng(0))


def test_preset_has_the_sizes_of_ti2v_5b():
    with torch.device("meta"):
        model = WanTransformer(PRESETS["ti2v-5b"])
    assert sum(p.numel() for p in model.parameters()) == 4_999_787_712
    assert model.config.dim // model.config.num_heads == 128


def test_misfits_are_refused(tmp_path):
    model, batch = model_and_batch()
    for frame in (batch.condition[:, :8], batch.latent):
        with pytest.raises(UserError, match=r"condition: got .*, want the first frame \[2, 16, 1, 4, 6\]"):
            bind(model, batch._replace(condition=frame))(batch.latent, T, torch.arange(2))
    with pytest.raises(UserError, match="in_dim: got 36, want out_dim, 16"):
        tiny_config("ti2v", in_dim=36)
    with pytest.raises(UserError, match="patch_size: got .*, want patches of one frame"):
        tiny_config("ti2v", patch_size=(2, 2, 2))
    with pytest.raises(UserError, match="data.first_frame: got true for a model of type t2v, want ti2v"):
        Reader(tiny_config(), first_frame=True)


def test_one_vector_pair_serves_all_tokens():
    """147 kB instead of 2 GB at 27,280 tokens: what a block gets does not grow with the video."""
    model, batch = model_and_batch()
    seen = []

    def look(blocks, tokens, e, context, repeats, grid):
        seen.append(tuple(e.shape))
        return tokens

    bind(model, batch, run_blocks=look)(batch.latent, T, torch.arange(2))
    assert seen == [(2, 2, 6, 32)]


@pytest.mark.parametrize("layout", ["native", "diffusers", "one file"])
def test_files_are_loaded_as_ti2v(layout, tmp_path):
    model = tiny_model(tiny_config("ti2v", dim=128, num_heads=1, in_dim=48, out_dim=48, text_len=512))
    save_transformer(model, tmp_path / "native")
    source = tmp_path / "native"
    if layout == "diffusers":
        source = tmp_path / "other"
        convert(tmp_path / "native", source, "diffusers")
    elif layout == "one file":
        source = tmp_path / "alone.safetensors"
        source.write_bytes((tmp_path / "native/diffusion_pytorch_model.safetensors").read_bytes())
    loaded = load_transformer(source, torch.float32)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
