"""The files of a reward model: its settings are stored, all parts are of one step."""

import json

import pytest
import torch
from helpers import one_line, random_batch, tiny_config, tiny_reward, write_run
from training_runs import run

from prfl_engine.errors import UserError
from prfl_engine.model.checkpoint import load_reward, save_reward

SETTINGS = dict(num_heads=2, add_query=False, feature_layer=1)


def write(folder, step=7, **settings):
    model = tiny_reward(blocks=2, **(SETTINGS | settings)).freeze()
    save_reward(model, folder, step)
    return model


def logits(model):
    generator, config = torch.Generator().manual_seed(0), tiny_config()
    batch = random_batch(config)
    x = torch.randn(batch.latent.shape, generator=generator)
    return model(x, torch.tensor([400.0, 800.0]), torch.ones(2, 3, config.text_dim))


@pytest.mark.parametrize("settings", [{}, {"num_heads": 4, "add_query": True, "feature_layer": 2}])
def test_settings_come_back(settings, tmp_path):
    model = write(tmp_path, **settings)
    for given in ({}, SETTINGS | settings):
        assert torch.equal(logits(load_reward(tmp_path, **given).freeze()), logits(model))
    stored = json.loads((tmp_path / "reward.json").read_text())
    kind = "query" if settings else None
    assert stored == {
        "num_heads": model.pool.multihead_attn.num_heads, "feature_layer": model.feature_layer,
        "return_type": kind, "step": 7,
    }  # fmt: skip


def test_an_official_folder_has_the_official_settings_or_those_that_are_given(tmp_path):
    model = write(tmp_path)
    (tmp_path / "reward.json").unlink()
    assert torch.equal(logits(load_reward(tmp_path, **SETTINGS).freeze()), logits(model))
    plain = load_reward(tmp_path, feature_layer=2)
    assert plain.pool.multihead_attn.num_heads == 8 and plain.pool.add_query
    with pytest.raises(UserError, match="reward.feature_layer: got 8, want 1 to the 2 blocks"):
        load_reward(tmp_path)


@pytest.mark.parametrize("override, got", [
    ("num_heads=4", "4, want 2"), ("feature_layer=2", "2, want 1"),
    ("return_type=query", '"query", want null'),
])  # fmt: skip
def test_settings_that_contradict_are_refused(override, got, tmp_path, capsys):
    config = write_run(tmp_path, reward={"blocks": 2, "feature_layer": "auto"}, train={"steps": 1})
    write(tmp_path / "reward2")
    for command in ("train", "train-reward", "eval-reward"):
        run(command, config, f"reward.path={tmp_path / 'reward2'}", f"reward.{override}", code=2)
        line = one_line(capsys)
        assert f"reward.{override.split('=')[0]}: got {got}" in line and "reward.json" in line
    run("train", config, f"reward.path={tmp_path / 'reward2'}")


@pytest.mark.parametrize("text", [
    "", "[1]", '{"num_heads": 0}', '{"num_heads": true}', '{"feature_layer": 1.5}', '{"return_type": "mean"}',
    '{"step": "7"}',
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(text, tmp_path):
    write(tmp_path)
    (tmp_path / "reward.json").write_text(text)
    with pytest.raises(UserError, match="reward.json") as caught:
        load_reward(tmp_path)
    assert "\n" not in str(caught.value)


def test_all_parts_are_of_one_step(tmp_path):
    write(tmp_path, 20)
    write(tmp_path / "later", 100)
    both = [tmp_path / f"later/{name}_step_100.ckpt" for name in ("query_attention", "mlp")]
    for moved in both:  # one file of another step, then the transformer
        moved.rename(tmp_path / moved.name)
        with pytest.raises(UserError, match="step"):
            load_reward(tmp_path)
    heads = [tmp_path / f"{name}_step_20.ckpt" for name in ("query_attention", "mlp")]
    load_reward(transformer=tmp_path, query_attention=heads[0], mlp=heads[1])
    for query, mlp in ((heads[0], tmp_path / both[1].name), [tmp_path / path.name for path in both]):
        with pytest.raises(UserError, match="step"):
            load_reward(transformer=tmp_path, query_attention=query, mlp=mlp)
    (tmp_path / "reward.json").unlink()
    load_reward(tmp_path, **SETTINGS)
    (tmp_path / "mlp_step_100.ckpt").rename(tmp_path / "mlp_step_\u00b2.ckpt")  # a digit to str.isdigit
    with pytest.raises(UserError, match="mlp_step_20.ckpt: with query_attention_step_100.ckpt"):
        load_reward(tmp_path)
