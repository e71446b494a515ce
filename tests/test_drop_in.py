"""docs/drop-in.md: every example runs, on diffusers' own models and on stand-ins for other codebases."""

import contextlib
import math
import re
import sys
import types
from pathlib import Path

import fastvideo_twin
import patch_twins as twins
import pytest
import torch
from helpers import randomize, relative
from torch import nn

from prfl_engine.model.reward import MLP
from prfl_engine.patch import fp8, report_of, restore

PAGE = (Path(__file__).parents[1] / "docs/drop-in.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
GRID = (2, 4, 6)  # of the latents; 12 tokens


@pytest.fixture(autouse=True)
def exact_attention(monkeypatch):
    monkeypatch.setattr(twins, "flash_attention", twins.attend)


@pytest.fixture
def offer(monkeypatch):
    """offer("a.b", C=...) makes `from a.b import C` work."""

    made = {}

    def add(name, **contents):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            parent = ".".join(parts[:i])
            module = made.setdefault(parent, types.ModuleType(parent))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, parent, module)
        vars(made[name]).update(contents)

    return add


def run(words, /, **names):
    """The names after the example that contains `words`."""
    (code,) = [code for code in EXAMPLES if words in code]
    exec(compile(code, "drop-in.md", "exec"), names)
    return names


class Model(twins.Official):
    """The official model with the results and features of its whole forward."""

    def __init__(self, dim=128, **more):
        super().__init__(dim=dim, ffn_dim=128, **more)

    @classmethod
    def from_pretrained(cls, path):
        assert path == "weights"
        return randomize(cls())

    def forward(self, x, t, context, seq_len, output_features=False, selected_layers=()):
        if output_features:
            made, hooks = [], []
            for n in selected_layers:
                hooks.append(self.blocks[n - 1].register_forward_hook(lambda *a: made.append(a[2])))
            super().forward(x, t, context, seq_len)
            for hook in hooks:
                hook.remove()
            return made
        f, h, w = (GRID[0], GRID[1] // 2, GRID[2] // 2)
        return [
            u.unflatten(0, (16, 2, 2)).unflatten(3, (f, h, w)).permute(0, 3, 4, 1, 5, 2).reshape(16, *GRID)
            for u in super().forward(x, t, context, seq_len)
        ]


def inputs(batch=False):
    latent, text = torch.randn(16, *GRID), torch.randn(512, 12)
    latents = latent[None] if batch else latent
    return dict(
        latent=latent, latents=latents, noisy=torch.randn_like(latents), noise=torch.randn_like(latents),
        text=text[None] if batch else text, t=torch.tensor([500.0]), tokens=math.prod(GRID) // 4, step=0.1,
        timesteps=torch.tensor([900.0, 899.0, 400.0]), checkpoint="weights", base_path="weights",
    )  # fmt: skip


def grads(model):
    return [name for name, p in model.named_parameters() if p.grad is None]


def test_there_is_one_example_of_each():
    texts = (
        "import WanTransformer3DModel\nfrom prfl_engine.patch import accelerate, restore", "diffusers_lite",
        "from wan.modules", "videox_fun", "LoraConfig", "fastvideo.", "chunk=8192", "fp8(", "step_cache",
        "FFNW", "from kernels",
    )  # fmt: skip
    assert [text for text in texts if len([code for code in EXAMPLES if text in code]) != 1] == []
    assert len(EXAMPLES) == len(texts)


def test_hy_video_prfl(offer, capsys):
    def query_attention(dim, return_type):
        return randomize(twins.Pool(dim, return_type=return_type))

    class Blocks(Model):
        def __init__(self):
            super().__init__(layers=8)

    offer("diffusers_lite.wan.modules.model", WanModel=Blocks)
    offer("diffusers_lite.utils.network", QueryAttention=query_attention, MLP=MLP)
    found = run("diffusers_lite", **inputs())
    assert capsys.readouterr().out.count("8 blocks Block (WanModel as Wan2.1") == 2
    assert report_of(found["transformer"]).calls == report_of(found["lrm"]).calls == 8
    assert "forward" in vars(found["query_attention"]) and found["query_attention"].queries.grad is not None
    assert not grads(found["transformer"]) and not report_of(found["transformer"]).fallbacks


@pytest.mark.parametrize("tokenwise", [False, True])
def test_wan(offer, capsys, tokenwise):
    class WanModel(Model):
        def __init__(self):
            super().__init__(layers=1, tokenwise=tokenwise)

    offer("wan.modules.model", WanModel=WanModel)
    given = inputs()
    found = run("from wan.modules", **given)
    assert "calls of blocks: 3 by our operations, 0 by the original" in capsys.readouterr().out
    want, model = given["latent"], found["model"]
    restore(model)
    with torch.no_grad():
        for t in given["timesteps"]:
            want = want - 0.1 * model([want], t[None], [given["text"]], given["tokens"])[0]
    assert relative(found["latent"], want) < 1e-5


def test_videox_fun(offer, capsys):
    class WanTransformer3DModel(Model):
        """Its blocks are told the dtype and the timesteps besides."""

        def forward(self, x, context, t, seq_len):
            note = dict(dtype=torch.float32, t=t)
            for block in self.blocks:
                block.register_forward_pre_hook(lambda m, a, k: (a, k | note), with_kwargs=True)
            return torch.stack(super().forward(list(x), t, context, seq_len))

    offer("videox_fun.models", WanTransformer3DModel=WanTransformer3DModel)
    given = inputs(batch=True)
    found = run("videox_fun", **given | dict(folder="weights", texts=[given["text"][0]]))
    assert not grads(found["transformer3d"])
    assert found["report"].policy.saved == {"input", "attention"} and not found["report"].fallbacks


def small(folder):
    diffusers = pytest.importorskip("diffusers")
    model = randomize(diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=12,
        freq_dim=16, ffn_dim=80, num_layers=1,
    ))  # fmt: skip
    model.save_pretrained(folder / "transformer")
    return inputs(batch=True) | dict(folder=folder)


def test_diffusers(tmp_path, capsys):
    pytest.importorskip("peft")
    given = small(tmp_path)
    found = run("accelerate, restore", **given)
    assert "1 blocks WanTransformerBlock" in capsys.readouterr().out
    restore(found["transformer"])
    found = run("LoraConfig", **given)
    assert found["report"].calls == 2 and not found["report"].fallbacks  # once more in backward
    got = {k for k, p in found["transformer"].named_parameters() if p.grad is not None}
    assert got and all("lora" in k for k in got)


def test_the_step_cache(tmp_path, capsys):
    given = small(tmp_path)
    transformer = run("accelerate, restore", **given)["transformer"]
    capsys.readouterr()
    run("step_cache", **given | dict(torch=torch, transformer=transformer, step=1e-4))
    assert capsys.readouterr().out.split() == ["2", "1"]  # the second step hardly moves


def test_fastvideo(offer, capsys):
    class TransformerLoader:
        def load(self, folder, arguments):
            assert (folder, arguments) == ("weights", "arguments")
            model = randomize(fastvideo_twin.FastVideoTwin(later=True))
            forward = model.forward
            model.forward = lambda *a: forward(*a).unflatten(1, (16, 4)).reshape(1, 16, *GRID)
            return model

    entered = []

    @contextlib.contextmanager
    def set_forward_context(current_timestep, attn_metadata):
        entered.append(attn_metadata)
        yield

    offer("fastvideo.forward_context", set_forward_context=set_forward_context)
    offer("fastvideo.models.loader.component_loader", TransformerLoader=TransformerLoader)
    given = inputs(batch=True) | dict(folder="weights", fastvideo_args="arguments")
    found = run("fastvideo.", **given)
    assert entered == [None] and found["report"].calls == 2 and not found["report"].fallbacks
    assert not grads(found["transformer"])


def test_what_can_be_chosen():
    model = randomize(Model(layers=1))
    run("chunk=8192", model=model)
    assert report_of(model).chunk == 8192 and not report_of(model).policy.plain
    given = inputs()
    words = [given["latent"]], given["t"], [given["text"]], given["tokens"]
    (want,) = model(*words)
    (got,) = run("fp8(", torch=torch, inputs=words, model=model, fp8=fp8)["sample"]
    assert 1e-4 < relative(got, want.detach()) < 0.1


def test_an_operation_alone():
    ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU("tanh"), nn.Linear(32, 16))
    x, (shift, scale, gate) = torch.randn(2, 5, 16), torch.randn(3, 2, 16)
    n = nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    want = x + gate[:, None] * ffn(n)
    names = dict(torch=torch, ffn=ffn, x=x, shift=shift, scale=scale, gate=gate)
    assert relative(run("FFNW", **names)["x"], want) < 0.01


@pytest.mark.parametrize("eps", ["eps", "variance_epsilon"])
def test_a_layer_in_the_form_of_kernels(offer, eps):
    """A stand-in for `kernelize`, which checks of a layer what the package checks."""

    class TheirNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16))
            setattr(self, eps, 1e-3)

        def forward(self, hidden_states):
            return nn.functional.rms_norm(hidden_states, (16,), self.weight, 1e-3)

    known = {}

    def kernelize(model, mode, device):
        layer = known["RMSNorm"][device].load()
        assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) == {"can_torch_compile", "has_backward"}
        for m in model.modules():
            if type(m) is TheirNorm:
                m.forward = types.MethodType(layer.forward, m)
        return model

    x = torch.randn(2, 3, 4, 16, requires_grad=True)
    model = nn.Sequential(TheirNorm())
    want = torch.autograd.grad(model(x).sin().sum(), (x, *model.parameters()))
    mode = types.SimpleNamespace(TRAINING=1)
    offer("kernels", Mode=mode, kernelize=kernelize, register_kernel_mapping=known.update)
    model = run("from kernels", model=model)["model"]
    assert "forward" in vars(model[0])
    got = torch.autograd.grad(model(x).sin().sum(), (x, *model.parameters()))
    assert all(relative(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
