"""prfl convert of adapters."""

import os

import pytest
import torch
from helpers import one_line, tiny_config, tiny_model
from safetensors.torch import load_file
from test_lora import model as with_updates
from test_lora_files import ALL, diffusers_name

from prfl_engine.cli import main
from prfl_engine.config import LoraConfig
from prfl_engine.convert import ADAPTERS, convert
from prfl_engine.model import lora, lora_files
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.model.layers import Linear
from prfl_engine.model.lora_files import read
from prfl_engine.resume import _digest

ENDS = {"lora_A.weight", "lora_B.weight"}


@pytest.fixture
def adapter(tmp_path):
    """(trained model, folder as PEFT writes it) with alpha / r = 2 in every linear layer, but 0.5 in one."""
    trained = with_updates(tiny_config("i2v"), LoraConfig(rank=3, alpha=6.0, targets=ALL))
    trained.blocks[1].ffn[0].lora_scale = 0.5
    lora.write(trained, tmp_path / "peft", None, lora_files.write_peft)
    return trained, tmp_path / "peft"


def updates(path):
    return {name: low.scale * low.up @ low.down for name, low in read(path)[0].items()}


def test_every_layout_from_every_layout_is_the_same_adapter(adapter, tmp_path):
    trained, folder = adapter
    layers = {k: m for k, m in trained.named_modules() if isinstance(m, Linear)}
    want = {k: m.lora_scale * m.lora_B @ m.lora_A for k, m in layers.items()}
    for i, to in enumerate((*ADAPTERS, *reversed(ADAPTERS), "comfyui", "peft", "kohya", "diffusers")):
        line = convert(folder, tmp_path / f"{i}", to)
        folder = tmp_path / f"{i}"
        got = updates(folder)
        assert got.keys() == want.keys() and f"{len(want)} updates" in line
        for k, a in want.items():
            torch.testing.assert_close(got[k], a)


def test_names_of_diffusers_and_kohya(adapter, tmp_path):
    _, folder = adapter
    convert(folder, tmp_path / "d", "diffusers")
    convert(folder, tmp_path / "k", "kohya")
    names = read(folder)[0].keys()
    held = load_file(tmp_path / "d/pytorch_lora_weights.safetensors")
    assert held.keys() == {f"transformer.{diffusers_name(n)}.{end}" for n in names for end in ENDS}
    held = load_file(tmp_path / "k/lora_kohya.safetensors")
    flat = {"lora_unet_" + n.replace(".", "_") for n in names}
    assert held.keys() == {f"{n}.{e}" for n in flat for e in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert held["lora_unet_blocks_1_ffn_0.alpha"] == 1.5 and held["lora_unet_blocks_0_ffn_0.alpha"] == 6


@pytest.mark.parametrize("image", [False, True])
def test_diffusers_loads_an_adapter_at_its_strength(image, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel

    config = tiny_config("i2v" if image else "t2v")
    trained = with_updates(config, LoraConfig(rank=3, alpha=6.0, targets=ALL if image else ALL[:-2]))
    lora.write(trained, tmp_path / "peft", None, lora_files.write_peft)
    convert(tmp_path / "peft", tmp_path / "made", "diffusers")
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=config.in_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
        image_dim=1280 if image else None, added_kv_proj_dim=config.dim if image else None,
    )  # fmt: skip
    theirs.load_lora_adapter(load_file(tmp_path / "made/pytorch_lora_weights.safetensors"))
    got = {
        k: m.scaling["default_0"] * m.lora_B["default_0"].weight @ m.lora_A["default_0"].weight
        for k, m in theirs.named_modules() if hasattr(m, "scaling")
    }  # fmt: skip
    want = updates(tmp_path / "peft")
    assert got.keys() == {diffusers_name(k) for k in want}
    for k, a in want.items():
        torch.testing.assert_close(got[diffusers_name(k)], a)


@pytest.mark.parametrize("more, needle", [
    (("--to", "native"), "--to: got 'native', want one of peft, diffusers, comfyui, kohya for an adapter"),
    (("--dtype", "bfloat16"), "--dtype: got torch.bfloat16, want none"),
    (("--shard", "2"), "--shard: got 2.0, want none"),
])  # fmt: skip
def test_what_an_adapter_cannot_be(more, needle, adapter, tmp_path, capsys):
    assert main(["convert", str(adapter[1]), "--out", str(tmp_path / "made"), "--to", "kohya", *more]) == 2
    assert needle in one_line(capsys)
    assert os.listdir(tmp_path) == ["peft"]


def test_another_model_in_a_pipeline_is_another_source(tmp_path):
    """For a resumed run."""
    found = []
    for seed in range(2):
        save_transformer(tiny_model(seed=seed), tmp_path / "pipeline/transformer")
        found.append(_digest([tmp_path / "pipeline"])["content"])
    assert found[0] != found[1]
