"""Training and evaluating the reward model, by the command line on tiny models."""

import json

import numpy as np
import pytest
import torch
from helpers import SHAPE, one_line, tiny_config, write_data
from safetensors.torch import load_file
from training_runs import NAME, STATE, assert_equal, content, interrupt, reward_run, run, values

from prfl_engine import train_reward as train_reward_module
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import load_reward, load_transformer
from prfl_engine.seeds import Purpose, noise_like


@pytest.mark.parametrize("loss", ["ce", "bt"])
def test_reward_training_learns_to_tell_good_from_poor(loss, tmp_path, capsys):
    config = reward_run(tmp_path, loss, train={"steps": 40})
    run("train-reward", config)
    out = tmp_path / "run"
    logged = list(values(out).values())
    assert np.mean([v["train/loss"] for v in logged[-5:]]) < 0.5 * logged[0]["train/loss"]
    assert np.mean([v["train/accuracy"] for v in logged[-5:]]) > 0.75
    model = load_reward(out / "checkpoint-40", feature_layer=1).freeze()
    reader = Reader(model.transformer.config, "motion_quality")

    def logits(name):
        (batch,) = fixed_batches(
            reader, read_lists([str(tmp_path / name / "all.list")], name), 12, "cpu"
        )
        x = 0.8 * batch.latent + 0.2 * noise_like(batch.latent, Purpose.SAMPLE, 0, 0)
        return model(x, torch.full((12,), 200.0), batch.text)

    assert (logits("win") > logits("lose")).float().mean() > 0.9
    if loss == "ce":
        capsys.readouterr()
        run("eval-reward", config, f"reward.path={out / 'checkpoint-40'}")
        accuracy = [float(s.split()[-1]) for s in capsys.readouterr().out.splitlines()]
        assert accuracy[0] > 0.9


def test_reward_training_starts_from_the_generator(tmp_path):
    config = reward_run(tmp_path, "ce")
    run("train-reward", config, "train.steps=1", "optim.lr=0", "optim.weight_decay=0")
    policy, trunk = (
        load_file(tmp_path / "policy" / NAME),
        load_file(tmp_path / "run/checkpoint-1" / NAME),
    )
    assert trunk.keys() == {k for k in policy if not k.startswith(("head.", "blocks.1."))}
    assert_equal(trunk, {k: policy[k] for k in trunk})


def test_reward_validation(tmp_path):
    config = reward_run(tmp_path, "ce", train={"steps": 2})
    run("train-reward", config, "eval.every=1")
    for logged in values(tmp_path / "run", "eval").values():
        accuracies = [logged[f"eval/accuracy_t{t}"] for t in (201, 400, 600, 800, 1000)]
        assert logged["eval/score"] == pytest.approx(np.mean(accuracies[:-1]))  # at 1000 there is noise alone
    best = load_reward(tmp_path / "run/best", feature_layer=1)
    assert len(best.transformer.blocks) == 1


def test_eval_reward_prints_every_accuracy_and_their_mean(tmp_path, capsys):
    config = reward_run(tmp_path, "ce")
    run("eval-reward", config, f"reward.path={tmp_path / 'reward'}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    accuracy = [float(s.split()[-1]) for s in lines]
    for t, line, value in zip((201, 400, 600, 800, 1000), lines, accuracy, strict=False):
        assert line.split()[2] == str(t)
        assert 0 <= value <= 1
        assert 12 * value == pytest.approx(round(12 * value), abs=1e-3)
    assert lines[-1].startswith("mean")
    assert accuracy[-1] == pytest.approx(np.mean(accuracy[:4]), abs=1e-4)


@pytest.mark.parametrize("start", ["generator", "reward"])
def test_lora_trains_updates_and_heads(start, tmp_path, capsys):
    """What is saved is the adapter and, with it in the weights, a reward model for every reader."""
    given = {"path": str(tmp_path / "reward")} if start == "reward" else {}
    config = reward_run(tmp_path, "ce", reward=given, train={"steps": 2}, lora={"rank": 2, "alpha": 8.0})
    run("train-reward", config, "eval.every=2", "optim.lr=1e-2")
    saved = tmp_path / "run/checkpoint-2"
    updates, _ = lora.read(saved / "adapter")
    assert len(updates) == 10 and all(low.scale == 4 and low.up.any() for low in updates.values())
    folder = tmp_path / ("policy" if start == "generator" else "reward")
    base = load_transformer(folder, trunk=True, blocks=1)
    want = lora.merge(base, saved / "adapter").state_dict()
    found = load_file(saved / NAME)
    assert found.keys() == want.keys() and all(a.dtype == torch.float32 for a in found.values())
    assert_equal(found, {k: want[k] for k in found})
    capsys.readouterr()
    run("eval-reward", config, f"reward.path={saved}")
    mean = float(capsys.readouterr().out.splitlines()[-1].split()[-1])
    assert mean == pytest.approx(values(tmp_path / "run", "eval")[2]["eval/score"], abs=1e-4)
    if start == "generator":
        data = f"data.train=[{tmp_path}/data/all.list]"
        run("train", config, f"reward.path={saved}", f"train.out={tmp_path}/prfl", "lora.rank=0", data)


def test_a_stopped_run_with_lora_goes_on_to_the_bit(tmp_path, monkeypatch):
    config = reward_run(
        tmp_path, "ce", train={"steps": 4, "save_every": 2, "ema": 0.9}, lora={"rank": 2},
        model={"weights_dtype": "bfloat16"},
    )  # fmt: skip
    run("train-reward", config, f"train.out={tmp_path}/whole")
    with monkeypatch.context() as patch:
        interrupt(patch, train_reward_module, "noisy_reward", 4)
        run("train-reward", config, code=130)
    run("train-reward", config, "train.resume=true")
    one, other = (content(tmp_path / name / "checkpoint-4") for name in ("run", "whole"))
    assert_equal(one, other)
    assert "ema/adapter/adapter_model.safetensors" in one and one[NAME].keys() == one[f"ema/{NAME}"].keys()
    assert values(tmp_path / "run") == values(tmp_path / "whole")
    start = load_reward(tmp_path / "run/checkpoint-2", feature_layer=1, num_heads=8).mlp.fc1.weight
    assert not torch.equal(start, load_reward(tmp_path / "run/checkpoint-4", feature_layer=1).mlp.fc1.weight)


def test_an_adapter_without_lora_is_refused(tmp_path, capsys):
    run("train-reward", reward_run(tmp_path, "ce"), "lora.path=somewhere", code=2)
    assert "lora.path: got 'somewhere', want null with lora.rank 0" in one_line(capsys)
    assert not (tmp_path / "run").exists()


EMBEDDINGS = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "img_emb.")


@pytest.mark.parametrize("model_type, recompute", [("t2v", "none"), ("t2v", "full"), ("i2v", "attention")])
def test_embeddings_are_frozen_unless_asked_for(model_type, recompute, tmp_path):
    """The others have the same gradients; the optimizer, and so the memory, knows nothing of the frozen."""
    config = reward_run(tmp_path, "ce", model_type, train={"steps": 1, "ema": 0.9})
    state, moments = {}, {}
    for frozen in (True, False):
        out = tmp_path / str(frozen)
        run(
            "train-reward", config, f"train.out={out}", f"reward.train_embeddings={not frozen}",
            f"model.recompute={recompute}", "optim.clip=null",
        )  # fmt: skip
        state[frozen] = load_file(out / "checkpoint-1" / NAME)
        held = torch.load(out / "checkpoint-1" / STATE, weights_only=True)["optimizer"]["state"]
        moments[frozen] = [held[i]["exp_avg"] for i in range(len(held))]
    before = load_file(tmp_path / "policy" / NAME)
    embeddings = [k for k in state[True] if k.startswith(EMBEDDINGS)]
    assert len({k.split(".")[0] for k in embeddings}) == (5 if model_type == "i2v" else 4)
    assert all(torch.equal(state[True][k], before[k]) for k in embeddings)
    assert not any(torch.equal(state[False][k], before[k]) for k in embeddings)
    others = state[True].keys() - set(embeddings)
    assert all(torch.equal(state[True][k], state[False][k]) for k in others)
    assert len(moments[False]) - len(moments[True]) == len(embeddings)


def test_reward_training_drops_no_prompt_unless_asked_to(tmp_path, capsys, monkeypatch):
    config, seen = reward_run(tmp_path, "ce", train={"steps": 1}), []
    make = train_reward_module.MicroBatches

    def watched(reader, *rest, **named):
        seen.append(reader.text_dropout)
        return make(reader, *rest, **named)

    monkeypatch.setattr(train_reward_module, "MicroBatches", watched)
    run("train-reward", config, "data.null_text=null")
    run("train-reward", config, "data.text_dropout=0.25", f"train.out={tmp_path / 'dropping'}")
    assert seen == [0, 0.25]
    capsys.readouterr()
    run("train-reward", config, "data.text_dropout=0.25", "data.null_text=null", code=2)
    assert "data.null_text" in one_line(capsys)


def labelled(tmp_path, **fields):
    """A list of six samples; fields are functions of their number."""
    return write_data(tmp_path, tiny_config(), 6, labels=lambda i: {k: f(i) for k, f in fields.items()})


def good(i):
    return 1


def mixed(i):
    return i % 2


@pytest.mark.parametrize("fields, needle", [
    ({}, "has 'physics_quality'"),
    ({"physics_quality": mixed}, "has 'human_quality'"),
    ({"physics_quality": lambda i: None, "human_quality": mixed}, "has 'physics_quality'"),
    ({"physics_quality": good, "human_quality": good}, "motion_quality is 1 in all of"),
    ({"physics_quality": mixed, "human_quality": lambda i: 1 - i % 2}, "motion_quality is 0 in all of"),
])  # fmt: skip
def test_labels_that_say_nothing_are_refused(fields, needle, tmp_path, capsys):
    config = reward_run(tmp_path, "ce")
    for field in ("data.train", "data.val"):
        found = labelled(tmp_path / field, **fields)
        run("train-reward", config, f"{field}={found}", "eval.every=1", code=2)
        line = one_line(capsys)
        assert "data.label: " in line and needle in line and field in line
    assert not (tmp_path / "run").exists()
    code = 0 if "in all of" in needle else 2  # on one class it is a recall, which may be asked for
    run("eval-reward", config, f"reward.path={tmp_path / 'reward'}", f"data.val={found}", code=code)
    assert needle in capsys.readouterr().err


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_pairs_at_once_are_trained_as_one_after_the_other(recompute, tmp_path, monkeypatch):
    """Noise, levels, losses and gradients are the same but for rounding; there is one forward."""
    model = {"recompute": recompute, "compute_dtype": "float32"}
    config = reward_run(tmp_path, "bt", train={"steps": 3}, model=model)
    sizes, forward = [], train_reward_module.noisy_reward

    def watched(model, batch, *rest):
        sizes.append(len(batch.latent))
        return forward(model, batch, *rest)

    monkeypatch.setattr(train_reward_module, "noisy_reward", watched)
    more = "reward.ce_weight=0.5", "data.text_dropout=0.5", "reward.train_embeddings=true"
    eps = "optim.eps=1e-2"  # or a gradient that is 0 but for rounding is as good as any
    ways = [eps, *more], [eps]
    for i, given in enumerate(ways):
        found = []
        for at_once in "false", "true":
            out = tmp_path / f"{i}-{at_once}"
            run("train-reward", config, *given, f"reward.pairs_at_once={at_once}", f"train.out={out}")
            found.append(values(out))
        assert found[0].keys() == found[1].keys() == {1, 2, 3}
        for step, want in found[0].items():
            for name in ("train/loss", "train/accuracy", "train/grad_norm"):
                assert found[1][step][name] == pytest.approx(want[name], rel=1e-4), (step, name)
    assert sizes == ([4] * 6 + [8] * 3) * 2


def test_a_mistyped_label_is_refused(tmp_path, capsys):
    config = reward_run(tmp_path, "ce")
    run("train-reward", config, "data.label=motion_qualty", code=2)
    assert "data.label: no sample of data.train has 'motion_qualty'" in one_line(capsys)


def test_pairs_are_validated_as_pairs(tmp_path, capsys):
    config = reward_run(tmp_path, "bt", train={"steps": 40, "save_every": 40})
    run("train-reward", config, "eval.every=40", code=2)
    assert "data.val_lose" in one_line(capsys)
    run("eval-reward", config, f"reward.path={tmp_path / 'reward'}", code=2)
    assert "data.val_lose" in one_line(capsys)
    pairs = [f"data.val={tmp_path / 'win/all.list'}", f"data.val_lose={tmp_path / 'lose/all.list'}"]
    run("train-reward", config, "eval.every=40", *pairs)
    found = values(tmp_path / "run", "eval")
    assert found[40]["eval/accuracy_t201"] > 0.9
    assert found[40]["eval/score"] == pytest.approx(
        np.mean([found[40][f"eval/accuracy_t{t}"] for t in (201, 400, 600, 800)])
    )
    assert json.loads((tmp_path / "run/best/score.json").read_text())["score"] == max(
        v["eval/score"] for v in found.values()
    )
    # Both sides changed: what was right is wrong, at any noise and whatever the batch.
    capsys.readouterr()
    swapped = [pairs[0].replace("win", "lose"), pairs[1].replace("/lose/", "/win/")]
    for size in (1, 5):
        path = f"reward.path={tmp_path / 'run/checkpoint-40'}"
        run("eval-reward", config, path, *swapped, f"eval.batch_size={size}")
        lines = capsys.readouterr().out.splitlines()
        assert float(lines[0].split()[-1]) == pytest.approx(1 - found[40]["eval/accuracy_t201"], abs=1e-4)


@pytest.mark.parametrize("broken", ["latent", "model"])
def test_an_accuracy_of_what_is_not_a_number_ends_the_run(broken, tmp_path, capsys):
    """Finite numbers that overflow; others are refused when they are read."""
    config = reward_run(tmp_path, "ce")
    reward, sample = tmp_path / "reward", tmp_path / "mixed/0.json"
    if broken == "latent":
        np.save(tmp_path / "mixed/latent-7.npy", np.full((1, *SHAPE), 3e38, np.float32))
        sample = tmp_path / "mixed/7.json"
        run("train-reward", config, "eval.every=1", f"data.train={tmp_path / 'win/all.list'}", code=2)
        assert "in all of data.train" in one_line(capsys)
        train = labelled(tmp_path / "other", physics_quality=mixed, human_quality=mixed)
        run("train-reward", config, "eval.every=1", f"data.train={train}", code=1)
        assert f"accuracy_t201: got nan on {sample}" in one_line(capsys)
        assert not (tmp_path / "run/best").exists()
    else:
        (path,) = reward.glob("mlp*")
        state = torch.load(path, weights_only=True)
        for name in ("fc1", "fc2", "fc3"):
            state[f"{name}.weight"] = torch.randn_like(state[f"{name}.weight"]) * 1e30
        torch.save(state, path)
    run("eval-reward", config, f"reward.path={reward}", code=1)
    assert f"accuracy_t201: got nan on {sample}" in one_line(capsys)
