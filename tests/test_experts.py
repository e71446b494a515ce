"""Experts of Wan2.2 A14B: their files, and one alone, which is used in a part of the noise levels only."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (
    LiteralUniPC,
    model_and_batch,
    one_line,
    relative,
    tiny_config,
    tiny_model,
    tiny_reward,
    write_run,
)
from training_runs import assert_equal, content, reward_run, run, values

from prfl_engine import flow
from prfl_engine import train_reward as train_reward_module
from prfl_engine.checks import check_prfl
from prfl_engine.config import ChainConfig, Config, LoraConfig, ModelConfig, RolloutConfig
from prfl_engine.errors import UserError
from prfl_engine.model import checkpoint
from prfl_engine.model.checkpoint import load_transformer, save_reward, save_transformer
from prfl_engine.model.sources import read_config
from prfl_engine.model.wan import PRESETS, WanTransformer
from prfl_engine.objectives import graded_windows, index_range, schedule_of, start_of, train_levels


@pytest.mark.parametrize("kind, parameters", [("t2v", 14_288_491_584), ("i2v", 14_288_901_184)])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_sizes_of_the_presets(kind, parameters, expert):
    """14.289 B an expert; with a CLIP branch an I2V model has 16.4 B."""
    with torch.device("meta"):
        model = WanTransformer(PRESETS[f"{kind}-a14b-{expert}"])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not [k for k in model.state_dict() if "img" in k]


@pytest.mark.parametrize("kind", ["t2v", "i2v-a14b"])
def test_a_native_folder_in_bfloat16_shards(kind, tmp_path, monkeypatch):
    """As the official folders are; what is saved is read again, and has their config.json."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    model = tiny_model(tiny_config(kind)).bfloat16()
    save_transformer(model, tmp_path / "high_noise_model")
    assert len(list((tmp_path / "high_noise_model").glob("*-of-*.safetensors"))) > 1
    assert '"clip"' not in (tmp_path / "high_noise_model/config.json").read_text()
    back = load_transformer(tmp_path / "high_noise_model")
    assert back.config == model.config == read_config(tmp_path / "high_noise_model")
    own = model.state_dict()
    assert back.state_dict().keys() == own.keys()
    assert all(torch.equal(a, own[k]) and a.dtype == own[k].dtype for k, a in back.state_dict().items())


# One expert alone.

T2V, I2V = {"steps": 40, "shift": 12.0}, {"steps": 40, "shift": 5.0}


@pytest.mark.parametrize("chain, levels, steps, mean", [
    (T2V, (0.875, 1.0), range(26), 12.5), (T2V, (0.0, 0.875), range(26, 39), 6.0),
    (I2V, (0.9, 1.0), range(15), 7.0), (I2V, (0.0, 0.9), range(15, 39), 11.5),
    (T2V, (0.0, 1.0), range(39), 19.0),
])  # fmt: skip
def test_the_steps_of_an_expert_are_those_of_the_official_code(chain, levels, steps, mean):
    """By its formula: the high-noise expert where the whole timestep is at least boundary * 1000. The last
    step of a chain is never graded. `mean` is that of the steps before a graded one."""
    u = [0.999 * (1 - i / chain["steps"]) for i in range(chain["steps"] - 1)]
    t = [math.floor(1000 * chain["shift"] * a / (1 + (chain["shift"] - 1) * a)) for a in u]
    low, high = levels
    assert list(steps) == [i for i, a in enumerate(t) if low * 1000 <= a < high * 1000 + (high == 1)]
    rollout = RolloutConfig(sigma_range=levels, **chain)
    assert index_range(rollout) == (steps[0], steps[-1])
    begun = replace(rollout, start="data") if high < 1 else rollout
    first, last = index_range(begun)
    assert (first, len(schedule_of(begun))) == (0, 40 - steps[0])
    assert sum(range(first, last + 1)) / len(steps) == mean
    drawn = train_levels(rollout).sigmas.double()
    assert ((drawn >= low) & ((drawn < high) | (high == 1))).all()
    assert len(train_levels(replace(rollout, start="noise")).sigmas) == {
        (0.875, 1.0): 632, (0.0, 0.875): 368, (0.9, 1.0): 358, (0.0, 0.9): 642, (0.0, 1.0): 1000,
    }[levels]  # fmt: skip


def test_every_level_of_a_range_is_at_a_timestep_of_its_expert():
    """In float32, in which an expert is chosen."""
    for shift, boundary in ((3.0, 0.875), (6.0, 0.9), (12.0, 0.875), (5.0, 0.9)):
        low, high = flow.Levels(shift, high=boundary), flow.Levels(shift, low=boundary)
        assert len(low.sigmas) + len(high.sigmas) == 1000
        assert low.timestep(low.sigmas).max() < 1000 * boundary <= high.timestep(high.sigmas).min()
    whole = flow.Levels(12.0, whole=True, low=0.9005)
    assert whole.timestep(whole.sigmas).min() == 901


def test_parts_of_the_range_of_an_expert():
    found = {p: index_range(RolloutConfig(sigma_range=(0.875, 1), range=p, **T2V)) for p in (
        "early", "middle", "late", (3, 25),
    )}  # fmt: skip
    assert list(found.values()) == [(0, 8), (8, 17), (17, 25), (3, 25)]
    low = {"sigma_range": (0, 0.875), "start": "data"}
    assert index_range(RolloutConfig(range=(26, 30), **low, **T2V)) == (0, 4)


def watched(monkeypatch):
    """The timesteps that the generator is asked at, as they come."""
    seen, forward = [], WanTransformer.forward

    def told(model, x, t, *rest, **named):
        seen.extend(t.tolist())
        return forward(model, x, t, *rest, **named)

    monkeypatch.setattr(WanTransformer, "forward", told)
    return seen


@pytest.mark.parametrize("mode", ["fresh", "persistent"])
@pytest.mark.parametrize("levels, start", [("[0.875, 1]", "noise"), ("[0, 0.875]", "data")])
def test_an_expert_is_asked_nowhere_else(levels, start, mode, tmp_path, monkeypatch):
    """In rollouts, graded steps, flow matching and validation; a resumed pool goes on where it stood."""
    config = write_run(tmp_path, "i2v-a14b", samples=4, eval={"every": 2, "timesteps": [201]})
    seen = watched(monkeypatch)
    given = [
        "rollout.shift=12", "rollout.steps=10", f"rollout.sigma_range={levels}", f"rollout.start={start}",
        f"rollout.mode={mode}", "data.batch_size=2", "train.save_every=2",
    ]  # fmt: skip
    run("train", config, *given, "train.steps=4")
    first, last = min(seen), max(seen)
    assert (first >= 875 and last > 990) if start == "noise" else (0 < first < 300 and 800 < last < 875)
    scored = "eval/reward_t837" if start == "noise" else "eval/reward_t201"
    logged = values(tmp_path / "run", "eval")[4]
    assert logged.keys() == {"eval/sft_loss", scored, "eval/score"}
    assert logged["eval/score"] == logged[scored]
    cut = tmp_path / "cut"
    run("train", config, *given, "train.steps=2", f"train.out={cut}")
    run("train", config, *given, "train.steps=4", f"train.out={cut}", "train.resume=true")
    assert_equal(content(cut / "checkpoint-4"), content(tmp_path / "run/checkpoint-4"))


@pytest.mark.parametrize("given, line", [
    ("sigma_range=[0.5, 0.5]", "sigma_range: got [0.5, 0.5], want [low, high] with low < high"),
    ("sigma_range=[0.9995, 0.9996] start=data", "sigma_range: got [0.9995, 0.9996], want one with noise"),
    ("sigma_range=[0.4, 0.6] start=data", "sigma_range: got [0.4, 0.6], want one with some of the 2 steps"),
    ("sigma_range=[0, 0.875]", "start: got 'noise', want data"),
    ("sigma_range=[0.5, 1] start=data", "start: got 'data', want noise"),
    ("sigma_range=[0.875, 1] range=[0, 1]", "range: got [0, 1], want [first, last] within 0..0"),
])  # fmt: skip
def test_a_range_without_steps_is_refused(given, line, tmp_path, capsys):
    config = write_run(tmp_path, rollout={"steps": 3, "shift": 1.0})
    run("train", config, *(f"rollout.{field}" for field in re.split(" (?=[a-z])", given)), code=2)
    assert one_line(capsys).startswith(f"prfl: rollout.{line}")
    assert not (tmp_path / "run").exists()


def test_an_expert_alone_makes_no_sample(tmp_path, capsys):
    run("sample", write_run(tmp_path), "rollout.sigma_range=[0.875, 1]", "--out", str(tmp_path / "x"), code=2)
    assert "rollout.sigma_range: got [0.875, 1.0], want [0, 1]" in one_line(capsys)


@pytest.mark.parametrize("window", [1, 2])
def test_a_chain_from_data_has_the_gradient_of_plain_code(window):
    """In float64: the literal sampler begins at the noised latent, without a history."""
    r = RolloutConfig(sigma_range=(0.0, 0.875), start="data", steps=16, shift=12.0)
    schedule, sigmas = schedule_of(r), flow.make_schedule("unipc", 16, 12.0).sigmas.tolist()
    model, batch = model_and_batch(size=1, dtype=torch.float64)
    reward = tiny_reward(model.config).double().freeze()
    noise, index = torch.randn_like(batch.latent), torch.tensor([[1]])
    first = next(i for i, s in enumerate(sigmas) if math.floor(1000 * s) < 875)
    x = (1 - sigmas[first]) * batch.latent + sigmas[first] * noise
    torch.testing.assert_close(start_of(r, schedule, batch.latent, noise), x, rtol=1e-12, atol=1e-12)
    given = model, reward, schedule, batch, x, index, ChainConfig(window)
    (graded,) = graded_windows(*given)
    graded.backward(graded.logit.sum())
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    literal = LiteralUniPC(sigmas[first:])
    for i in range(2):
        with torch.set_grad_enabled(i > 1 - window):
            t = torch.tensor([math.floor(1000 * sigmas[first + i])]).double()
            x = literal.step(x, model(x, t, model.embed_context(batch.text)))
    t = torch.tensor([math.floor(1000 * sigmas[first + 2])]).double()
    logit = reward(x, t, batch.text)
    torch.testing.assert_close(graded.logit, logit.detach(), rtol=1e-9, atol=1e-9)
    logit.sum().backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative(got, want) < 1e-10


@pytest.mark.parametrize("loss", ["ce", "bt"])
def test_a_reward_model_is_trained_in_the_range(loss, tmp_path, monkeypatch):
    config, levels = reward_run(tmp_path, loss), []
    noisy = train_reward_module.noisy_reward

    def noisy_reward(model, batch, noise, sigma, *rest):
        if torch.is_grad_enabled():
            levels.extend(sigma.tolist())
        return noisy(model, batch, noise, sigma, *rest)

    monkeypatch.setattr(train_reward_module, "noisy_reward", noisy_reward)
    run("train-reward", config, "rollout.sigma_range=[0, 0.875]", "rollout.shift=12", "train.steps=4")
    assert len(set(levels)) >= 13 and all(0 < sigma < 0.875 for sigma in levels)  # 16 draws of 368


# Reward models of other structure.


def test_a_narrower_t2v_reward_scores_a_wider_i2v_generator():
    """In float64: by the latent and the text; the first frame reaches the generator alone."""
    model, batch = model_and_batch("i2v-a14b", size=1, dtype=torch.float64)
    reward = tiny_reward(tiny_config(dim=16, ffn_dim=20)).double().freeze()
    schedule, noise = flow.make_schedule("unipc", 4, 5.0), torch.randn_like(batch.latent)
    (graded,) = graded_windows(model, reward, schedule, batch, noise, torch.tensor([[0]]))
    graded.backward(graded.logit.sum())
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    literal, t = LiteralUniPC(schedule.sigmas.tolist()), schedule.timesteps.double()
    x = literal.step(noise, model(noise, t[:1], model.embed_context(batch.text), batch.condition))
    logit = reward(x, t[1:2], batch.text)
    torch.testing.assert_close(graded.logit, logit.detach(), rtol=1e-9, atol=1e-9)
    logit.sum().backward()
    assert relative(got, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-9


REWARDS = {
    "t2v on i2v-a14b": None, "t2v on i2v": None, "i2v-a14b on i2v-a14b": None,
    "i2v-a14b on t2v": "reward.path: model_type is 'i2v', want the generator's 't2v'",
    "i2v on i2v-a14b": "reward.path: clip is True, want the generator's False",
    "wide t2v on t2v": "reward.path: in_dim is 24, want the generator's 16",
}


@pytest.mark.parametrize("case", REWARDS)
def test_which_rewards_fit_which_generators(case, tmp_path, capsys):
    *_, kind, _, generator = case.split()
    config, fields = write_run(tmp_path, generator), {"dim": 16, "ffn_dim": 20}
    fields |= {"in_dim": 24, "out_dim": 24} if case.startswith("wide") else {}
    shutil.rmtree(tmp_path / "reward")
    save_reward(tiny_reward(tiny_config(kind, **fields)), tmp_path / "reward", 0)
    line = REWARDS[case]
    run("train", config, "train.steps=1", "eval.every=1", code=0 if line is None else 2)
    if line is None:
        assert 0 < values(tmp_path / "run", "eval")[1]["eval/reward_t201"] < 1
    else:
        assert line in one_line(capsys)


def test_an_expert_that_is_trained_whole_does_not_wait_on_the_host():
    config = Config(model=ModelConfig(boundary=0.875, idle="host"))
    with pytest.raises(UserError, match="model.idle: got 'host', want device where both experts are trained"):
        check_prfl(config)
    check_prfl(replace(config, lora=LoraConfig(rank=2)))
    check_prfl(replace(config, rollout=RolloutConfig(sigma_range=(0.875, 1))))
