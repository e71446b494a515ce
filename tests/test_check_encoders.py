"""scripts/check_encoders.py on a checkout that stands in for the official ones: its text encoder."""

import importlib.util
import sys
from pathlib import Path

import pytest

for package in ("diffusers", "transformers"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parents[1] / "scripts/check_encoders.py"
STAND_IN = """
import torch
from encoder_cases import native_text
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

class T5Encoder(nn.Module):
    def __init__(self, vocab, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets, shared_pos):
        super().__init__()
        self.inner = UMT5EncoderModel(UMT5Config(
            vocab_size=vocab, d_model=dim, d_kv=dim_attn // num_heads, d_ff=dim_ffn, num_heads=num_heads,
            num_layers=num_layers, relative_attention_num_buckets=num_buckets,
        ))

    def state_dict(self):
        return native_text(self.inner.state_dict())

    def forward(self, ids, mask):
        return self.inner(ids, mask).last_hidden_state
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the script on a checkout with this t5.py; returns its exit code and what it says."""
    spec = importlib.util.spec_from_file_location("check_encoders", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["check_encoders.py", str(tmp_path)])

    def run(code: str) -> tuple[int, str]:
        (tmp_path / "wan/modules").mkdir(parents=True)
        (tmp_path / "wan/modules/t5.py").write_text(code)
        return script.main(), capsys.readouterr().out

    yield run
    for name in [n for n in sys.modules if n.split(".")[0] == "wan"]:
        del sys.modules[name]


def test_an_equal_encoder_passes(check):
    code, said = check(STAND_IN)
    assert code == 0 and said.startswith("text encoder: ")


def test_another_one_fails(check):
    code, _ = check(STAND_IN.replace("last_hidden_state", "last_hidden_state + 1e-3"))
    assert code == 1


def test_a_folder_without_encoders_is_refused(tmp_path, monkeypatch, check):
    monkeypatch.setattr(sys, "argv", ["check_encoders.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="has no encoder in"):
        check("")
