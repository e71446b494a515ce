"""train.compat=official against a loop in plain torch: which backward, clipping and update comes when."""

import pytest
import torch
import yaml
from helpers import LiteralUniPC, relative, tiny_model, write_run
from safetensors.torch import load_file
from training_runs import NAME, reward_run, run, values

from prfl_engine import flow
from prfl_engine import train as train_module
from prfl_engine import train_reward as reward_module
from prfl_engine.checks import check_prfl
from prfl_engine.config import Config, LossConfig, OptimConfig, RolloutConfig, TrainConfig, load_config
from prfl_engine.config_file import from_dict
from prfl_engine.data import Reader, read_lists
from prfl_engine.errors import UserError
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.official_yaml import OFFICIAL, compat
from prfl_engine.optim.optimizer import EMA, lr_factor
from prfl_engine.optim.updates import Updates
from prfl_engine.rollout import fresh as fresh_module
from prfl_engine.rollout.fresh import Fresh
from prfl_engine.seeds import Purpose, integers, noise_like

CYCLE, STEPS, CLIP, DECAY = 3, 2, 0.05, 0.8


def prfl(tmp_path, *more):
    """A configuration of PRFL by the official cycle, in float32."""
    path = write_run(
        tmp_path, data={"text_dropout": 0.0}, rollout={"steps": 5},
        optim={"lr": 1e-3, "clip": CLIP, "weight_decay": 0.1},
        train={"compat": "official", "accumulate": CYCLE, "steps": STEPS, "ema": DECAY},
        model={"latent_dtype": "float32"},
    )  # fmt: skip
    return path, load_config(path, more)


def by_hand(c):
    """(mean losses of every cycle, weights, average) by the official loop."""
    policy = load_transformer(c.model.path, torch.float32)
    reward = load_reward(c.reward.path, feature_layer=1).freeze()
    own = dict(policy.named_parameters())
    average = {k: p.detach().clone() for k, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), c.optim.lr, c.optim.betas, weight_decay=0.1)
    reader = Reader(policy.config, long_caption=c.data.long_caption)
    batches = MicroBatches(reader, read_lists(c.data.train, ""), 1, c.train.seed)
    sigmas = flow.make_schedule("unipc", 5, 5.0).sigmas.tolist()
    table, losses = flow.train_sigmas(5.0), []

    def backward(loss, key):
        (loss / CYCLE).backward()
        torch.nn.utils.clip_grad_norm_(own.values(), CLIP)
        if (key + 1) % CYCLE == 0:
            optimizer.step()
            optimizer.zero_grad()

    def velocity(x, t, batch):
        return policy(x, torch.tensor([float(int(t))]), policy.embed_context(batch.text))

    for key in range(CYCLE * STEPS):
        batch, at = batches[key], (c.train.seed, key)
        sigma = table[integers(1000, Purpose.SFT_LEVEL, *at, 1)].item()
        noise = noise_like(batch.latent, Purpose.SFT_NOISE, *at)
        v = velocity((1 - sigma) * batch.latent + sigma * noise, 1000 * sigma, batch)
        sft = (v - (noise - batch.latent)).square().mean()
        backward(sft, key)

        x, sampler = noise_like(batch.latent, Purpose.ROLLOUT_NOISE, *at), LiteralUniPC(sigmas)
        index = Fresh(None, c).indices(key, 1).item()
        for i in range(index + 1):
            with torch.set_grad_enabled(i == index):
                x = sampler.step(x, velocity(x, 1000 * sigmas[i], batch))
        logit = reward(x, torch.tensor([float(int(1000 * sigmas[index + 1]))]), batch.text)
        loss = 0.1 * (2 - logit.sigmoid()).relu().mean()
        backward(loss, key)
        for k, a in average.items():
            a.mul_(DECAY).add_(own[k].detach(), alpha=1 - DECAY)
        losses.append([sft.item(), loss.item()])
    means = torch.tensor(losses).unflatten(0, (-1, CYCLE)).mean(1)
    return means, {k: p.detach() for k, p in own.items()}, average


def change(after, before):
    return torch.cat([(after[k] - before[k]).flatten() for k in before])


def of_run(out):
    """(mean losses of every step, weights, average) of a run."""
    logged = list(values(out).values())
    losses = torch.tensor([[v["train/sft_loss"], v["train/reward_loss"]] for v in logged])
    saved = out / f"checkpoint-{len(logged)}"
    return losses, load_file(saved / NAME), load_file(saved / "ema" / NAME)


def test_the_cycle_is_that_of_the_official_script(tmp_path):
    path, config = prfl(tmp_path)
    want, before = by_hand(config), load_file(tmp_path / "policy" / NAME)
    run("train", path)
    got = of_run(tmp_path / "run")
    # Two orders of float32 sums; AdamW divides gradients by their own size, small ones too.
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert relative(change(a, before), change(b, before)) < 1e-3


@pytest.mark.parametrize("override", [
    "loss.split=false", "optim.clip_each=false", "train.ema_each=step", "rollout.whole_timesteps=false",
])  # fmt: skip
def test_every_setting_of_the_cycle_counts(override, tmp_path):
    """Without any of them the run is another one, by far more than the agreement above."""
    path, _ = prfl(tmp_path)
    before = load_file(tmp_path / "policy" / NAME)
    run("train", path)
    run("train", path, override, f"train.out={tmp_path / 'other'}")
    one, other = (of_run(tmp_path / name) for name in ("run", "other"))
    part = 2 if "ema" in override else 1
    assert relative(change(other[part], before), change(one[part], before)) > 1e-2


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    path, _ = prfl(tmp_path)
    run("train", path, "train.steps=3", f"train.out={tmp_path / 'whole'}")
    run("train", path, "train.steps=2")
    run("train", path, "train.steps=3", "train.resume=true")
    one, other = (load_file(tmp_path / name / "checkpoint-3" / NAME) for name in ("run", "whole"))
    assert all(torch.equal(a, other[k]) for k, a in one.items())
    one, other = (load_file(tmp_path / name / "checkpoint-3/ema" / NAME) for name in ("run", "whole"))
    assert all(torch.equal(a, other[k]) for k, a in one.items())


def test_the_rates_of_both_updates(tmp_path):
    """Two updates a step; a cosine ends at optim.horizon, of as many periods as asked for."""
    model = tiny_model()
    optim = OptimConfig(lr=1e-3, schedule="cosine", warmup=2, horizon=10, cycles=1)
    config = Config(optim=optim, train=TrainConfig(steps=3))
    optimizer = torch.optim.AdamW(
        [{"params": list(model.parameters()), "lr": 1e-3, "base_lr": 1e-3}], fused=True
    )
    updates, rates = Updates(optimizer, config, None, 1, split=True), []
    for step in range(3):
        updates.begin(step)
        for number in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            if number == 0:
                updates.after(number, True)
            else:
                updates.end()
            rates.append(updates.lr)
    assert rates == pytest.approx([1e-3 * lr_factor(i, 10, optim) for i in range(6)])
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3])
    assert rates[2:4] == pytest.approx([1e-3, 1e-3 * 0.5 * (1 + 2**-0.5)])  # 1 / 8 of a period
    assert lr_factor(20, 10, optim) == pytest.approx(1)


def test_the_average_moves_several_times_at_once():
    module = torch.nn.Linear(3, 2)
    one, other = EMA(module, 0.9), EMA(module, 0.9)
    module.weight.data += 1
    one.update(3)
    for _ in range(3):
        other.update()
    torch.testing.assert_close(one.average["weight"], other.average["weight"])


def test_a_turn_of_all_groups_shares_a_graded_step():
    fields = dict(rollout=RolloutConfig(one_index="turn"), train=TrainConfig(accumulate=6))
    alone = Fresh(None, Config(**fields), readers=1)
    drawn = [alone.indices(key, 2) for key in range(40)]
    assert all((a == a[:, :1]).all() for a in drawn) and len({a[0, 0].item() for a in drawn}) > 15
    three = Fresh(None, Config(**fields), readers=3)
    found = torch.cat([three.indices(key, 1) for key in range(60)]).view(20, 3)
    assert (found == found[:, :1]).all() and len(set(found[:, 0].tolist())) > 10


def test_fp8_rollouts_and_two_updates_are_refused():
    with pytest.raises(UserError, match="rollout.precision: got 'fp8', want same with loss.split"):
        check_prfl(Config(rollout=RolloutConfig(precision="fp8"), loss=LossConfig(split=True)))


@pytest.mark.parametrize("fields, name", [
    ({"alternate": True}, "loss.alternate"), ({"sft_every": 2}, "loss.sft_every"),
    ({"weight": 0}, "loss.split"),
])  # fmt: skip
def test_what_contradicts_two_updates(fields, name):
    with pytest.raises(UserError, match=name):
        LossConfig(split=True, **fields)


# Rounded latents and timesteps.


def is_bfloat16(a):
    return torch.equal(a, a.bfloat16().float())


def test_states_of_a_rollout_are_rounded_and_predictions_are_not():
    schedule, x = flow.make_schedule("unipc", 4, 5.0, torch.bfloat16), torch.randn(1, 16, 1, 4, 4)
    plain, state = flow.make_schedule("unipc", 4, 5.0), flow.init_state(flow.rounded(x, torch.bfloat16))
    for i in range(3):
        v, index = torch.randn_like(x), torch.tensor([i])
        want, state = flow.step(plain, state, v, index), flow.step(schedule, state, v, index)
        assert torch.equal(state.x, want.x.bfloat16().float()) and not is_bfloat16(want.x)
        assert torch.equal(state.x_last, want.x_last.bfloat16().float())
        assert torch.equal(state.m0, want.m0) and not is_bfloat16(state.m0)


def test_samples_and_noise_are_rounded(tmp_path, monkeypatch):
    path, seen = write_run(tmp_path, "i2v", model={"latent_dtype": "bfloat16"}), []
    plain = train_module.sft_loss

    def sft(model, batch, noise, *rest, **named):
        seen.extend([*batch[:4], noise])
        return plain(model, batch, noise, *rest, **named)

    class Seen(fresh_module.Grading):
        def grade(self, way, index):
            window = super().grade(way, index)
            seen.extend(state.x for states in way.states for state in states if state is not None)
            return window

    monkeypatch.setattr(train_module, "sft_loss", sft)
    monkeypatch.setattr(fresh_module, "Grading", Seen)
    run("train", path, "train.steps=1", "eval.every=1")
    assert len(seen) > 8 and all(is_bfloat16(a) for a in seen)


def test_whole_timesteps_are_those_of_the_official_table():
    for shift in (1.0, 5.0):  # at 1, float32 makes 95 of them one less
        u = torch.linspace(1.0, 0, 1001)
        want = ((shift * u / (1 + (shift - 1) * u))[:-1] * 1000).long()
        levels = flow.Levels(shift, whole=True)
        assert torch.equal(levels.timestep(levels.sigmas).long(), want)
        assert torch.equal(levels.sigmas, (shift * u / (1 + (shift - 1) * u))[:-1])
    assert flow.Levels(5.0).timestep(torch.tensor([0.2015])).item() == pytest.approx(201.5)
    assert flow.Levels(5.0, True, torch.bfloat16).at(201, "t") == 0.201171875  # as its evaluation has it
    assert flow.Levels(5.0).at(201, "t") == pytest.approx(0.201)
    with pytest.raises(UserError, match="eval.timesteps: got 203, want timesteps of the schedule, such as"):
        flow.Levels(3.0, True).at(203, "eval.timesteps")


# Reward training.


def test_both_updates_are_clipped_where_the_heads_are_not(monkeypatch):
    config = Config(loss=LossConfig(split=True), optim=OptimConfig(clip_heads=False, clip=1.0))
    p, norms = torch.nn.Parameter(torch.zeros(4)), []
    optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0, "base_lr": 1.0}])

    def recorded(*_):
        norms.append(p.grad.norm())
        return norms[-1]

    monkeypatch.setattr("prfl_engine.optim.updates.update", recorded)
    both = Updates(optimizer, config, None, 1, split=True)
    both.begin(0)
    for number in (0, 1):
        p.grad = torch.full((4,), 50.0)
        both.after(number, last=True)
    assert both.end().item() == pytest.approx(100)  # before clipping
    assert [norm.item() for norm in norms] == pytest.approx([1, 1])


def test_the_transformer_alone_is_clipped(tmp_path):
    """One step against plain torch: the heads' gradients are as they are."""
    path = reward_run(tmp_path, "ce", train={"steps": 1})
    run("train-reward", path, "optim.clip_heads=false", "optim.clip=1e-3", "optim.weight_decay=0")
    run("train-reward", path, "optim.clip=null", "optim.weight_decay=0", f"train.out={tmp_path / 'free'}")
    moments = {}
    for name in ("run", "free"):
        state = torch.load(tmp_path / name / "checkpoint-1/training_state.pt", weights_only=True)["optimizer"]
        held = [state["state"][i]["exp_avg"] * 10 for i in range(len(state["state"]))]
        heads = len(state["param_groups"][1]["params"])
        moments[name] = (
            torch.cat([a.flatten() for a in held[:-heads]]), torch.cat([a.flatten() for a in held[-heads:]])
        )  # fmt: skip
    (trunk, heads), (free_trunk, free_heads) = moments["run"], moments["free"]
    assert trunk.norm().item() == pytest.approx(1e-3, rel=1e-4) and free_trunk.norm() > 2e-3
    torch.testing.assert_close(trunk, free_trunk * 1e-3 / free_trunk.norm(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(heads, free_heads)
    assert values(tmp_path / "run")[1]["train/grad_norm"] == pytest.approx(free_trunk.norm().item(), rel=1e-4)


def test_compat_fills_what_is_not_set_and_is_written_out(tmp_path):
    path = write_run(tmp_path, train={"compat": "official"}, loss={"split": False})
    config = load_config(path, ["optim.clip_each=false"])
    assert not config.loss.split and not config.optim.clip_each and config.rollout.one_index == "turn"
    other = tmp_path / "again.yaml"
    other.write_text(config.to_yaml())
    assert load_config(other) == config
    assert yaml.safe_load(config.to_yaml())["train"]["compat"] == "official"
    assert load_config(path, ["train.compat=null"]).rollout.one_index == 0


def test_compat_changes_every_field_that_it_names():
    sections = {"train": {"compat": "official"}}
    compat(sections)
    made, plain = from_dict(Config, sections, ""), Config()
    for name in OFFICIAL:
        section, _, field = name.partition(".")
        assert getattr(getattr(made, section), field) != getattr(getattr(plain, section), field), name


def test_all_held_out_samples_have_one_noise(tmp_path, monkeypatch):
    path, seen = reward_run(tmp_path, "ce"), []
    plain = reward_module.noisy_reward

    def noisy_reward(model, batch, noise, *rest, **named):
        seen.append(noise)
        return plain(model, batch, noise, *rest, **named)

    monkeypatch.setattr(reward_module, "noisy_reward", noisy_reward)
    run("eval-reward", path, f"reward.path={tmp_path / 'reward'}", "eval.one_noise=true")
    rows = torch.cat(seen)
    assert len(rows) == 60 and all(torch.equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize("fields", [
    {"model": {"weights_dtype": "bfloat16"}, "optim": {"offload": "states"}},
    {"lora": {"rank": 2, "targets": ["q", "ffn.0"]}},
    {"rollout": {"steps": 4, "samples": 2, "cache": 0.1, "max_drift": 9.0}},
], ids=["bfloat16", "lora", "samples"])  # fmt: skip
def test_the_cycle_goes_with_other_settings(fields, tmp_path):
    """Gradients are clipped and applied in every dtype, of adapters, and after several graded steps."""
    train = {"compat": "official", "accumulate": 2, "steps": 2}
    path = write_run(tmp_path, **{"train": train, "optim": {"clip": 1e-3}} | fields)
    run("train", path, "optim.clip=1e-3")
    run("train", path, "optim.clip=1e-3", "optim.clip_each=false", f"train.out={tmp_path / 'once'}")
    norms = [values(tmp_path / name)[2]["train/grad_norm"] for name in ("run", "once")]
    assert norms[0] != norms[1] and min(norms) > 0
