"""Experts of Wan2.2 A14B: their files."""

import pytest
import torch
from helpers import tiny_config, tiny_model

from prfl_engine.model import checkpoint
from prfl_engine.model.checkpoint import load_transformer, save_transformer
from prfl_engine.model.sources import read_config
from prfl_engine.model.wan import PRESETS, WanTransformer


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
