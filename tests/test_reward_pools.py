"""Pooling by mean and max, several feature layers, fixed timesteps, and what a validation measures."""

import json

import numpy as np
import pytest
import torch
from helpers import one_line, random_batch, relative, tiny_config, tiny_model, tiny_reward, under, write_run
from training_runs import NAME, assert_equal, content, reward_run, run, values

from prfl_engine import train_reward as module
from prfl_engine.config import RewardConfig
from prfl_engine.errors import UserError
from prfl_engine.model.checkpoint import load_reward, new_reward, save_reward
from prfl_engine.model.reward import TokenPool
from prfl_engine.train_reward import by_label


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pools_of_tokens_and_their_gradients(kind, dtype):
    x = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True)
    direction = torch.randn(3, 5, dtype=torch.float64)
    out = TokenPool(kind)(x)
    (got,) = torch.autograd.grad(out, x, direction.to(out.dtype))
    wide = x.detach().double().requires_grad_()
    # By the letter: token after token, the first of equal ones takes the gradient.
    want = wide[:, 0]
    for token in wide.unbind(1)[1:]:
        want = want + token if kind == "mean" else torch.where(token > want, token, want)
    want = want / 7 if kind == "mean" else want
    (slope,) = torch.autograd.grad(want, wide, direction)
    rough = 1e-12 if dtype == torch.float64 else 1e-2
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), want, rtol=rough, atol=rough)
    torch.testing.assert_close(got.double(), slope, rtol=rough, atol=rough)


class Ranks:
    """Parts of a sequence, one after another; every rank but this one is given."""

    def __init__(self, others):
        self.others = others

    def stack(self, own):
        return torch.stack([own, *self.others.pop(0)])


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pools_of_a_sequence_that_is_cut(kind):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    pool, rest = TokenPool(kind), x[:, 4:]
    want = pool(x)
    sums = [[rest.sum(1)], [torch.tensor([3.0], dtype=torch.float64)]]
    pool.sequence = Ranks(sums if kind == "mean" else [[rest.max(1).values]])
    torch.testing.assert_close(pool(x[:, :4]), want)


@pytest.mark.parametrize("pool", ["query", "mean", "max"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_several_layers_against_their_formula(pool, policy):
    """In float64, with every gradient: the mean of the pooled vectors, by max the largest values."""
    config = tiny_config(num_layers=3)
    model = tiny_reward(config, blocks=3, feature_layer=(1, 3), pool=pool).double()
    batch, t = random_batch(config, 2, dtype=torch.float64), torch.tensor([300.0, 800.0])
    named = dict(model.named_parameters())

    def gradients(logit):
        found = torch.autograd.grad(logit.sum(), list(named.values()), allow_unused=True)
        return {k: a for k, a in zip(named, found, strict=True) if a is not None}

    got = model(batch.latent, t, batch.text, run_blocks=under(policy))
    trunk = model.transformer
    context = trunk.embed_context(batch.text)
    one, three = (model.pool(trunk.features(batch.latent, t, context, None, n)) for n in (1, 3))
    vector = torch.maximum(one, three) if pool == "max" else (one + three) / 2
    h = vector
    for fc in (model.mlp.fc1, model.mlp.fc2):
        h = (h @ fc.weight.T + fc.bias).clamp(min=0)
    want = (h @ model.mlp.fc3.weight.T + model.mlp.fc3.bias)[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (a, b) = gradients(got), gradients(want)
    assert a.keys() == b.keys()
    whole = [torch.cat([g.flatten() for g in found.values()]) for found in (a, b)]
    assert relative(*whole) < 1e-10


def test_settings_of_a_pool_are_stored_and_read(tmp_path):
    made = new_reward(tiny_model(tiny_config(num_layers=3)), 3, feature_layer=(2, 3), pool="max")
    save_reward(made, tmp_path, 4)
    assert not list(tmp_path.glob("query_attention*"))
    stored = json.loads((tmp_path / "reward.json").read_text())
    assert stored == {"feature_layer": [2, 3], "step": 4, "pool": "max"}
    read = load_reward(tmp_path)
    assert read.layers == (2, 3) and read.feature_layer == 3 and read.pool.kind == "max"
    for given, needle in (
        ({"pool": "mean"}, 'reward.pool: got "mean", want "max"'),
        ({"feature_layer": (1, 3)}, "reward.feature_layer"),
        ({"num_heads": 4}, "reward.num_heads: got 4, want auto"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=needle):
            load_reward(tmp_path, **given)
    (tmp_path / "reward.json").unlink()  # as the official script leaves it
    assert load_reward(tmp_path, pool="mean", feature_layer=(1, 2)).layers == (1, 2)


@pytest.mark.parametrize("text", ['{"pool": "cls"}', '{"feature_layer": [2, 1]}', '{"feature_layer": []}'])
def test_settings_that_cannot_be_are_refused(text, tmp_path):
    save_reward(new_reward(tiny_model(), 2, pool="mean"), tmp_path, 1)
    (tmp_path / "reward.json").write_text(text)
    with pytest.raises(UserError, match="reward.json"):
        load_reward(tmp_path, pool=None)


@pytest.mark.parametrize("fields, needle", [
    ({"feature_layer": (3, 2)}, "reward.feature_layer"), ({"feature_layer": (2, 9)}, "reward.feature_layer"),
    ({"pool": "mean", "dropout": 0.1}, "reward.dropout"), ({"pool": "max", "num_heads": 4}, "num_heads"),
    ({"mlp": "x"}, "reward.path"),
    ({"path": "x", "query_attention": "x", "pool": "mean"}, "reward.query_attention"),
])  # fmt: skip
def test_what_contradicts_a_pool(fields, needle):
    with pytest.raises(UserError, match=needle):
        RewardConfig(**fields)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_training_saving_resuming_scoring_and_prfl_with_a_pool(pool, tmp_path, capsys):
    fields = {"pool": pool, "blocks": 2, "feature_layer": [1, 2], "timesteps": [600, 201]}
    path = reward_run(tmp_path, "ce", reward=fields, train={"steps": 3, "save_every": 1})
    run("train-reward", path, f"train.out={tmp_path / 'whole'}")
    run("train-reward", path, "train.steps=2")
    run("train-reward", path, "train.resume=true")
    one, other = (content(tmp_path / name / "checkpoint-3") for name in ("run", "whole"))
    assert_equal(one, other)
    saved = tmp_path / "run/checkpoint-3"
    run("eval-reward", path, f"reward.path={saved}")
    run("score", saved, f"{tmp_path}/mixed/all.list", "model.compute_dtype=float32")
    data = f"data.train=[{tmp_path}/data/all.list]"
    run("train", path, f"reward.path={saved}", f"train.out={tmp_path}/prfl", data, "reward.timesteps=[]")
    capsys.readouterr()
    given = f"reward.path={saved}", f"train.out={tmp_path}/plan", data, "model.recompute=auto:1"
    run("train", path, *given, code=2)
    assert f"reward.pool: got '{pool}', want query: the planner counts no other" in one_line(capsys)
    run("plan", path, f"reward.path={saved}", code=2)
    assert "the planner counts no other" in one_line(capsys)


def test_lora_and_a_pool_without_weights(tmp_path):
    path = reward_run(tmp_path, "ce", reward={"pool": "mean"}, lora={"rank": 2}, train={"steps": 2})
    run("train-reward", path, "train.save_every=1")
    run("train-reward", path, "train.steps=3", "train.resume=true")
    assert (tmp_path / "run/checkpoint-3" / NAME).is_file()


def test_fixed_timesteps_come_in_turn(tmp_path, monkeypatch):
    fields = {"timesteps": [600, 201]}
    path, seen = reward_run(tmp_path, "ce", reward=fields, train={"accumulate": 2, "steps": 3}), []
    plain = module.noisy_reward

    def noisy_reward(model, batch, noise, sigma, run_blocks, t):
        seen.append((sorted(set(t.tolist())), sorted(set(sigma.tolist()))))
        return plain(model, batch, noise, sigma, run_blocks, t)

    monkeypatch.setattr(module, "noisy_reward", noisy_reward)
    run("train-reward", path)
    assert [t for t, _ in seen] == [[600.0]] * 2 + [[201.0]] * 2 + [[600.0]] * 2
    assert seen[0][1] == [pytest.approx(0.6)] and seen[2][1] == [pytest.approx(0.201)]


def test_files_of_a_reward_model_in_two_folders(tmp_path):
    path = write_run(tmp_path, train={"steps": 1})
    plain = load_reward(tmp_path / "reward").mlp.fc1.weight
    other = tmp_path / "elsewhere.ckpt"
    (tmp_path / "reward/mlp_step_0.ckpt").rename(other)
    assert torch.equal(load_reward(tmp_path / "reward", mlp=other).mlp.fc1.weight, plain)
    run("train", path, f"reward.mlp={other}")
    run("eval-reward", path, f"reward.mlp={other}")
    run("train-reward", path, f"reward.mlp={other}", f"train.out={tmp_path / 'more'}")
    assert list((tmp_path / "more/checkpoint-1").glob("mlp_step_1.ckpt"))


def test_measures_against_counts():
    """Every pair of a logit's sign and a label, counted one by one in float64."""
    rng = np.random.default_rng(0)
    for labels in (rng.integers(0, 2, 50), np.zeros(6), np.ones(6)):
        logits = rng.standard_normal(len(labels))
        pairs = [(x > 0, y == 1) for x, y in zip(logits, labels, strict=True)]
        tp, fp, fn = (pairs.count(p) for p in ((True, True), (True, False), (False, True)))
        got = by_label(torch.tensor(logits), torch.tensor(labels).double())
        p = 1 / (1 + np.exp(-logits))
        want = {
            "accuracy": (tp + pairs.count((False, False))) / len(pairs),
            "precision": tp / (tp + fp) if tp + fp else 0.0, "recall": tp / (tp + fn) if tp + fn else 0.0,
            "loss": -np.mean(np.where(labels == 1, np.log(p), np.log(1 - p))),
        }  # fmt: skip
        both = want["precision"] + want["recall"]
        want["f1"] = 2 * want["precision"] * want["recall"] / both if both else 0.0
        assert got == pytest.approx(want, rel=1e-12)
    none = by_label(torch.tensor([-1.0, -2.0]).double(), torch.tensor([1.0, 0.0]).double())
    assert none["precision"] == none["recall"] == none["f1"] == 0


def test_measures_are_in_the_metrics(tmp_path):
    path = reward_run(tmp_path, "ce", train={"steps": 1})
    run("train-reward", path, "eval.every=1")
    logged = values(tmp_path / "run", "eval")[1]
    for t in (201, 400, 600, 800, 1000):
        a, p, r, f = (logged[f"eval/{name}_t{t}"] for name in ("accuracy", "precision", "recall", "f1"))
        assert 0 <= a <= 1 and f == pytest.approx(2 * p * r / (p + r) if p + r else 0)
        assert logged[f"eval/loss_t{t}"] > 0
