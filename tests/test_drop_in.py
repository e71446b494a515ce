"""docs/drop-in.md: every example runs, on stand-ins for the models that it names."""

import re
from pathlib import Path

import patch_twins as twins
import pytest
import torch
from helpers import randomize, relative
from torch import nn

from prfl_engine.patch import report_of, restore

PAGE = (Path(__file__).parents[1] / "docs/drop-in.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def exact_attention(monkeypatch):
    monkeypatch.setattr(twins, "flash_attention", twins.attend)


def run(code, names):
    exec(compile(code, "drop-in.md", "exec"), names)
    return names


def example(text):
    (code,) = [code for code in EXAMPLES if text in code]
    return code


def test_all_examples_are_here():
    texts = (
        "from_pretrained(folder", "LoraConfig", "fast_reward_pool(", "WanModel", "chunk=8192", "fp8(", "FFNW",
    )  # fmt: skip
    assert [example(text) for text in texts] == EXAMPLES


def test_diffusers_and_its_adapters(tmp_path, capsys):
    diffusers, _ = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    model = randomize(diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=12,
        freq_dim=16, ffn_dim=80, num_layers=1,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "transformer")
    names = run(example("from_pretrained(folder"), {"folder": tmp_path})
    assert "1 blocks WanTransformerBlock" in capsys.readouterr().out
    restore(names["transformer"])
    model = run(example("LoraConfig"), names)["transformer"]
    model.train()
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 12)
    model(*inputs).sample.sum().backward()
    assert report_of(model).calls == 2 and not report_of(model).fallbacks  # once more in backward
    assert any("lora_B" in k and p.grad is not None for k, p in model.named_parameters())


def official():
    return randomize(twins.Official(dim=128, ffn_dim=128, layers=1))


def test_the_official_scripts():
    lrm, pool = nn.ModuleDict({"trunk": official()}), twins.Pool(128)
    names = run(example("fast_reward_pool("), dict(transformer=official(), lrm=lrm, query_attention=pool))
    assert all(report_of(names[k]).blocks == 1 for k in ("transformer", "lrm"))
    assert "forward" in vars(pool)

    class WanModel:
        from_pretrained = staticmethod(lambda checkpoint: official())

    names = run(example("WanModel"), dict(WanModel=WanModel, checkpoint="weights"))
    assert report_of(names["model"]).policy.plain
    restore(names["model"])
    run(example("chunk=8192"), names)
    assert report_of(names["model"]).chunk == 8192 and not report_of(names["model"]).policy.plain
    inputs = [torch.randn(16, 1, 4, 4)], torch.tensor([500.0]), [torch.randn(9, 12)], 4
    (want,) = names["model"](*inputs)
    (got,) = run(example("fp8("), names | dict(torch=torch, inputs=inputs))["sample"]
    assert 1e-4 < relative(got, want.detach()) < 0.1


def test_an_operation_alone():
    ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU("tanh"), nn.Linear(32, 16))
    x, (shift, scale, gate) = torch.randn(2, 5, 16), torch.randn(3, 2, 16)
    n = nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    want = x + gate[:, None] * ffn(n)
    names = dict(torch=torch, ffn=ffn, x=x, shift=shift, scale=scale, gate=gate)
    assert relative(run(example("FFNW"), names)["x"], want) < 0.01
