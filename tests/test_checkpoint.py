"""Official files are read and written to the bit, and broken ones are refused in one line."""

import json
import os
import pickle

import pytest
import torch
from helpers import random_batch, tiny_config, tiny_model, tiny_reward
from safetensors.torch import load_file, save_file

from prfl_engine.errors import UserError
from prfl_engine.inputs import load_pickle
from prfl_engine.model import checkpoint
from prfl_engine.model.checkpoint import (
    load_reward,
    load_transformer,
    new_reward,
    save_reward,
    save_transformer,
)

NAME = "diffusion_pytorch_model.safetensors"
BOTH = pytest.mark.parametrize("model_type", ["t2v", "i2v"])


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(*needles, load, **arguments):
    """The load raises a UserError of one line that holds the needles."""
    with pytest.raises(UserError) as caught:
        load(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert str(needle) in message, message
    return message


@BOTH
def test_round_trip(model_type, tmp_path):
    model = tiny_model(tiny_config(model_type))
    save_transformer(model, tmp_path / "new/folder")
    assert sorted(os.listdir(tmp_path / "new/folder")) == ["config.json", NAME]
    again = load_transformer(tmp_path / "new/folder")
    assert again.config == model.config
    assert equal(again, model)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_round_trip_in_shards(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_transformer(model, tmp_path)
    index = json.loads((tmp_path / f"{NAME}.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 2
    assert files == [
        f"diffusion_pytorch_model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)
    ]
    state = model.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in state.values())
    for name in files:
        held = load_file(tmp_path / name)
        assert {k for k, f in index["weight_map"].items() if f == name} == held.keys()
        assert len(held) == 1 or sum(v.nbytes for v in held.values()) <= 20_000
    assert equal(load_transformer(tmp_path), model)


def test_missing_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_transformer(tiny_model(), tmp_path)
    lost = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    lost.unlink()
    refused(lost, load=load_transformer, folder=tmp_path)


def test_dtype_is_kept_or_converted(tmp_path):
    save_transformer(tiny_model().to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in load_transformer(tmp_path).parameters()} == {torch.bfloat16}
    wide = load_transformer(tmp_path, torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(
        torch.equal(a.float(), b)
        for a, b in zip(load_transformer(tmp_path).parameters(), wide.parameters(), strict=True)
    )


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    model = tiny_model()
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    with open(tmp_path / NAME, "r+b") as file:
        file.write(b"\xff" * (tmp_path / NAME).stat().st_size)
    assert equal(loaded, model)


def test_trunk_of_a_whole_generator(tmp_path):
    model = tiny_model(tiny_config(num_layers=3))
    save_transformer(model, tmp_path)
    trunk = load_transformer(tmp_path, trunk=True, blocks=2)
    assert len(trunk.blocks) == 2
    assert trunk.head is None
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in trunk.state_dict().items())
    refused("3 blocks", "at least 4", load=load_transformer, folder=tmp_path, trunk=True, blocks=4)


def write_reward(folder, step=7, blocks=2, **fields):
    """An official reward folder; its config.json still says that it has all 40 blocks."""
    reward = tiny_reward(tiny_config(num_layers=3, **fields), blocks=blocks)
    save_reward(reward, folder, step)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 40}))
    return reward


def test_official_reward_folder(tmp_path):
    reward = write_reward(tmp_path)
    assert {"query_attention_step_7.ckpt", "mlp_step_7.ckpt"} < set(os.listdir(tmp_path))
    again = load_reward(tmp_path, feature_layer=2)
    assert len(again.transformer.blocks) == 2
    assert equal(again, reward)
    batch, t = random_batch(tiny_config()), torch.tensor([900.0, 201.0])
    with torch.no_grad():
        want = reward(batch.latent, t, batch.text)
        assert torch.equal(again(batch.latent, t, batch.text), want)


def test_reward_of_three_paths_and_of_the_newest_step(tmp_path):
    write_reward(tmp_path, 20)
    (tmp_path / "reward.json").unlink()  # an official folder has none
    newest = tiny_reward(tiny_config(num_layers=3), seed=5, blocks=2)
    torch.save(newest.mlp.state_dict(), tmp_path / "mlp_step_100.ckpt")
    torch.save(newest.pool.state_dict(), tmp_path / "query_attention_step_100.ckpt")
    again = load_reward(tmp_path, feature_layer=2)
    assert equal(again.mlp, newest.mlp)
    assert equal(again.pool, newest.pool)
    older = load_reward(
        transformer=tmp_path, query_attention=tmp_path / "query_attention_step_20.ckpt",
        mlp=tmp_path / "mlp_step_20.ckpt", feature_layer=2,
    )  # fmt: skip
    assert not equal(older.mlp, newest.mlp)


def test_state_dict_nested_in_the_mlp_file(tmp_path):
    reward = write_reward(tmp_path)
    torch.save({"state_dict": reward.mlp.state_dict(), "step": 7}, tmp_path / "mlp_step_7.ckpt")
    assert equal(load_reward(tmp_path, feature_layer=2).mlp, reward.mlp)


def test_several_queries_are_counted_from_the_file(tmp_path):
    reward = tiny_reward(num_queries=3)
    save_reward(reward, tmp_path, 0)
    assert equal(load_reward(tmp_path, feature_layer=1), reward)


def test_heads_stay_in_float32(tmp_path):
    write_reward(tmp_path)
    reward = load_reward(tmp_path, feature_layer=2, dtype=torch.bfloat16)
    assert {p.dtype for p in reward.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for m in (reward.pool, reward.mlp) for p in m.parameters()} == {torch.float32}


def test_a_new_reward_copies_the_first_blocks():
    model = tiny_model(tiny_config(num_layers=3))
    reward = new_reward(model, 2, feature_layer=2)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in reward.transformer.state_dict().items())
    reward.transformer.blocks[0].ffn[0].weight.data.zero_()
    assert model.blocks[0].ffn[0].weight.any()
    with pytest.raises(UserError, match="reward.blocks: got 4"):
        new_reward(model, 4, feature_layer=2)


# Broken files.


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_missing_key_is_named(tmp_path):
    save_transformer(tiny_model(), tmp_path)
    rewrite(tmp_path / NAME, lambda s: s.pop("blocks.1.ffn.2.bias"))
    refused(tmp_path, "blocks.1.ffn.2.bias", load=load_transformer, folder=tmp_path)


def test_unexpected_key_is_named(tmp_path):
    save_transformer(tiny_model(), tmp_path)
    rewrite(tmp_path / NAME, lambda s: s.update({"blocks.0.extra": torch.zeros(1)}))
    refused(tmp_path, "blocks.0.extra", load=load_transformer, folder=tmp_path)


def test_misshaped_key_is_named(tmp_path):
    save_transformer(tiny_model(), tmp_path)
    rewrite(tmp_path / NAME, lambda s: s.update({"norm": torch.zeros(1)}) or s.pop("norm"))
    rewrite(tmp_path / NAME, lambda s: s.update({"head.head.bias": torch.zeros(3)}))
    refused(tmp_path, "head.head.bias", "[3]", "[64]", load=load_transformer, folder=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_corrupt_safetensors_are_named(content, tmp_path):
    save_transformer(tiny_model(), tmp_path)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    refused(path, load=load_transformer, folder=tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"dim": "wide"}', '{"model_type": "v2v"}', '{"patch_size": 2}']
)
def test_broken_config_is_named(content, tmp_path):
    save_transformer(tiny_model(), tmp_path)
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, load=load_transformer, folder=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_transformer(tiny_model(), tmp_path)
    path = tmp_path / f"{NAME}.index.json"
    path.write_text(content)
    refused(path, load=load_transformer, folder=tmp_path)


def test_missing_config_or_weights_are_named(tmp_path):
    save_transformer(tiny_model(), tmp_path)
    (tmp_path / NAME).unlink()
    refused(tmp_path, "safetensors", load=load_transformer, folder=tmp_path)
    save_transformer(tiny_model(), tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path / "config.json", load=load_transformer, folder=tmp_path)


def test_two_files_with_one_key_are_refused(tmp_path):
    save_transformer(tiny_model(), tmp_path)
    (tmp_path / NAME).rename(tmp_path / "a.safetensors")
    save_file({"head.head.bias": torch.zeros(64)}, tmp_path / "b.safetensors")
    refused(
        "head.head.bias", "a.safetensors", "b.safetensors", load=load_transformer, folder=tmp_path
    )


@pytest.mark.parametrize("name", ["query_attention", "mlp"])
def test_missing_reward_file_is_named(name, tmp_path):
    write_reward(tmp_path)
    (tmp_path / f"{name}_step_7.ckpt").unlink()
    refused(tmp_path, name, load=load_reward, folder=tmp_path, feature_layer=2)


@pytest.mark.parametrize(
    "name, key",
    [
        ("query_attention", "multihead_attn.out_proj.bias"),
        ("query_attention", "queries"),
        ("mlp", "fc2.bias"),
    ],
)
@pytest.mark.parametrize("broken", ["missing", "shape"])
def test_broken_reward_file_is_named_with_its_key(name, key, broken, tmp_path):
    write_reward(tmp_path)
    path = tmp_path / f"{name}_step_7.ckpt"
    state = torch.load(path, weights_only=True)
    if broken == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(3)
    torch.save(state, path)
    refused(path, key, load=load_reward, folder=tmp_path, feature_layer=2)


@pytest.mark.parametrize(
    "state", [[1, 2], {"fc1.weight": 3}, {"state_dict": {"fc1.weight": "a"}}, 5]
)
def test_file_that_holds_no_tensors_is_named(state, tmp_path):
    write_reward(tmp_path)
    path = tmp_path / "mlp_step_7.ckpt"
    torch.save(state, path)
    refused(path, load=load_reward, folder=tmp_path, feature_layer=2)


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 torn zip"])
def test_corrupt_pickle_is_named(content, tmp_path):
    path = tmp_path / "mlp.ckpt"
    path.write_bytes(content)
    refused(path, load=load_pickle, path=path)
    refused(tmp_path / "no.ckpt", load=load_pickle, path=tmp_path / "no.ckpt")


class Code:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_pickle_is_not_run(plain, tmp_path):
    path, trap = tmp_path / "mlp.ckpt", tmp_path / "trap"
    state = {"fc1.weight": Code(trap)}
    path.write_bytes(pickle.dumps(state, protocol=2)) if plain else torch.save(state, path)
    refused(path, load=load_pickle, path=path)
    assert not trap.exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works
