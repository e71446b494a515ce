"""scripts/check_patch.py on a checkout that stands in for the official ones."""

import importlib.util
import sys
from pathlib import Path

import patch_twins as twins
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/check_patch.py"
STAND_IN = """
from patch_twins import Official

class WanModel(Official):
    def __init__(self, model_type, dim, ffn_dim, num_heads, num_layers, freq_dim, text_dim, in_dim, out_dim):
        super().__init__(
            model_type == "i2v", dim=dim, heads=num_heads, ffn_dim=ffn_dim, layers=num_layers,
            text_dim=text_dim, image_dim=1280,
        )

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None):
        made = super().forward(list(x), t, context, seq_len, clip_fea, y)
        return [u.reshape(16, *x.shape[2:]) for u in made]
"""
LATER = """
import torch
from patch_twins import Official

class WanModel(Official):
    def __init__(self, model_type, dim, ffn_dim, num_heads, num_layers, freq_dim, text_dim, in_dim, out_dim):
        super().__init__(
            dim=dim, heads=num_heads, ffn_dim=ffn_dim, layers=num_layers, text_dim=text_dim, tokenwise=True,
        )

    def forward(self, x, t, context, seq_len, y=None):
        if t.dim() == 1:
            t = t.expand(t.size(0), seq_len)
        with torch.amp.autocast("cuda", dtype=torch.float32):
            assert (self.head.weight @ self.head.weight.T).dtype == torch.float32
        return [u.reshape(16, *x.shape[2:]) for u in super().forward(list(x), t, context, seq_len)]
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("check_patch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    file = tmp_path / "wan/modules/model.py"
    file.parent.mkdir(parents=True)
    file.write_text(STAND_IN)
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "wan"]:
        del sys.modules[name]


def test_a_line_for_each_check(script, checkout, capsys, monkeypatch):
    monkeypatch.setattr(twins, "flash_attention", twins.attend)
    assert script.main([str(checkout)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("pass  ") for line in lines)
    assert lines[0].startswith("pass  text-to-video, float32: result, gradients ")


def test_a_checkout_of_wan22(script, checkout, capsys, monkeypatch):
    """Its autocast is that of CUDA; of a single sample it spreads the timestep over the tokens, which may
    have their own."""
    (checkout / "wan/modules/model.py").write_text(LATER)
    monkeypatch.setattr(twins, "flash_attention", twins.attend)
    assert script.main([str(checkout)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and sum("first frame at 0" in line for line in lines) == 2


def test_a_checkout_whose_packages_are_not_here(script, checkout, capsys, monkeypatch):
    """HY-Video-PRFL's file imports einops; what is not known is named, and not by an option of another
    script."""
    file = checkout / "wan/modules/model.py"
    monkeypatch.setattr(twins, "flash_attention", twins.attend)
    found, there = sys.meta_path[:], "einops" in sys.modules
    file.write_text("from einops import rearrange\n" + STAND_IN)
    assert script.main([str(checkout)]) == 0
    assert sys.meta_path == found and ("einops" in sys.modules) == there
    sys.modules.pop("wan.modules.model")
    file.write_text("import no_such_package\n")
    with pytest.raises(SystemExit, match=f"^{file} needs the package no_such_package, which is not inst"):
        script.main([str(checkout)])


def test_what_differs_fails(script, checkout, capsys, monkeypatch):
    """Attention that rounds to 16 bits, which the script does not find in this module."""
    assert script.main([str(checkout)]) == 1
    assert "FAIL  text-to-video, float32: result" in capsys.readouterr().out
    monkeypatch.setattr(twins.nn, "GELU", lambda *a: twins.nn.SiLU())
    assert script.main([str(checkout)]) == 1
    assert "FAIL  blocks.0: the original Block and ours differ" in capsys.readouterr().out


def test_a_folder_without_a_transformer(script, tmp_path):
    with pytest.raises(SystemExit, match="has none of diffusers_lite/wan/modules/model.py, wan/modules"):
        script.main([str(tmp_path)])
