"""prfl convert, and models read in the layouts of other programs."""

import json
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import one_line, random_batch, relative, tiny_config, tiny_model, write_run
from safetensors.torch import load_file, save_file

from prfl_engine import convert as module
from prfl_engine.cli import main
from prfl_engine.convert import SUMS, convert
from prfl_engine.errors import TrainingError, UserError
from prfl_engine.model.checkpoint import load_transformer, save_transformer
from prfl_engine.model.names import COMFYUI, to_comfyui, to_diffusers, to_native
from prfl_engine.model.sources import find, read_config
from prfl_engine.model.wan import sinusoid

BOTH = pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v-a14b"])
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "blocks.0.ffn.0.weight"


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def native(tmp_path):
    model = tiny_model()
    save_transformer(model, tmp_path / "native")
    return model, tmp_path / "native"


@BOTH
def test_a_model_is_the_same_in_every_layout(kind, tmp_path):
    model = tiny_model(tiny_config(kind)).bfloat16()
    save_transformer(model, tmp_path / "0")
    count = len(model.state_dict())
    for i, to in enumerate(("diffusers", "comfyui", "diffusers", "native", "comfyui", "native")):
        made, shard = tmp_path / f"{i + 1}", {} if to == "comfyui" else {"shard": 2e-5}
        assert f"{count} tensors" in convert(tmp_path / f"{i}", made, to, **shard)
        again = load_transformer(made)
        assert again.config == model.config and equal(again, model)
        sums = (made / SUMS).read_text()
        assert sums == (tmp_path / "1" / SUMS).read_text() and len(sums.splitlines()) == count
    index = json.loads((tmp_path / "6" / f"{WEIGHTS}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert sorted(os.listdir(tmp_path / "5")) == ["config.json", "diffusion_model.safetensors", SUMS]
    assert all(k.startswith(COMFYUI) for k in load_file(tmp_path / "5/diffusion_model.safetensors"))


@BOTH
def test_diffusers_reads_what_is_written_and_computes_the_same(kind, tmp_path, monkeypatch):
    """In float64, in which diffusers' own float32 parts (rope, norms, sinusoid) are made to compute too."""
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")  # diffusers reads no Wan without it
    from diffusers import WanTransformer3DModel
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = tiny_model(tiny_config(kind, text_len=512))
    save_transformer(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "made", "diffusers", shard=1e-4)
    theirs, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "made", output_loading_info=True
    )
    assert not any(report.values()), report
    assert {to_native(k): k for k in theirs.state_dict()} == {k: to_diffusers(k) for k in model.state_dict()}
    width, model, theirs = model.config.dim // model.config.num_heads, model.double(), theirs.double()
    batch = random_batch(model.config, shape=(16, 2, 4, 6), dtype=torch.float64)
    t = torch.tensor([900.5, 30.0], dtype=torch.float64)
    with torch.no_grad():
        want = model(batch.latent, t, model.embed_context(batch.text, batch.clip), batch.condition)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    theirs.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, model.config.freq_dim)
    parts = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
    tables = [
        get_1d_rotary_pos_embed(
            n, 1024, 10000.0, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
        ) for n in parts
    ]  # fmt: skip
    cos, sin = (torch.cat(a, 1).double() for a in zip(*tables, strict=True))
    theirs.rope.freqs_cos, theirs.rope.freqs_sin = cos, sin
    latent = batch.latent if batch.condition is None else torch.cat([batch.latent, batch.condition], 1)
    text = F.pad(batch.text, (0, 0, 0, 512 - batch.text.shape[1]))
    with torch.no_grad():
        got = theirs(latent, t, text, batch.clip, return_dict=False)[0]
    assert relative(got, want) < 1e-12
    # And back, from what diffusers itself saves.
    theirs.float()
    theirs.save_pretrained(tmp_path / "pipeline/transformer", max_shard_size="50KB")
    back = load_transformer(tmp_path / "pipeline", torch.float64)
    assert back.config == model.config and equal(back, model)


@BOTH
def test_one_file_needs_no_configuration(kind, tmp_path):
    """ComfyUI's, and those of torch.save."""
    config = tiny_config(kind, dim=256, ffn_dim=320, text_len=512)
    model = tiny_model(config)
    state = model.state_dict()
    save_file({f"diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "a.safetensors")
    save_file({to_diffusers(k): v for k, v in state.items()}, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c.pth")
    torch.save({"state_dict": {to_comfyui(k): v for k, v in state.items()}}, tmp_path / "d.pt")
    for name in ("a.safetensors", "b.safetensors", "c.pth", "d.pt"):
        assert read_config(tmp_path / name) == config
        assert equal(load_transformer(tmp_path / name), model)
    convert(tmp_path / "d.pt", tmp_path / "out", "native")
    assert equal(load_transformer(tmp_path / "out"), model)


def test_one_file_with_its_configuration(native, tmp_path):
    model, folder = native
    assert equal(load_transformer(folder / WEIGHTS), model)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS}: width: got 32, want a multiple of 128, or config.json"):
        load_transformer(folder / WEIGHTS)


@pytest.mark.parametrize("make, needle", [
    (lambda p: p.write_text("x"), "model.ckpt: not a safe state dict"),
    (lambda p: torch.save({"a": 3}, p), "model.ckpt: 'a' is a int, want a tensor"),
    (lambda p: torch.save({"a": torch.zeros(1)}, p), "model.ckpt: patch_embedding.weight is"),
    (lambda p: p.with_suffix(".gguf").write_text("x"), "model.gguf: got '.gguf', want a .safetensors"),
])  # fmt: skip
def test_a_file_that_is_no_generator(make, needle, tmp_path):
    make(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=needle):
        find(next(tmp_path.iterdir()))


def test_sampling_from_a_pipeline_of_diffusers_is_that_of_the_native_folder(tmp_path):
    config = write_run(tmp_path)
    convert(tmp_path / "policy", tmp_path / "pipeline/transformer", "diffusers")
    for name in ("policy", "pipeline"):
        out = ["sample.count=1", "--out", str(tmp_path / f"{name}-out")]
        assert main(["sample", str(config), f"model.path={tmp_path / name}", *out]) == 0
    made = [np.load(tmp_path / f"{name}-out/sample-00.npy") for name in ("policy", "pipeline")]
    assert (made[0] == made[1]).all()


def test_a_plan_for_a_pipeline_or_a_file_is_for_its_model(tmp_path, capsys):
    config, found = write_run(tmp_path), []
    convert(tmp_path / "policy", tmp_path / "pipeline/transformer", "diffusers")
    for path in ("policy", "pipeline", f"policy/{WEIGHTS}"):
        assert main(["plan", str(config), f"model.path={tmp_path / path}", "--json"]) == 0
        out = capsys.readouterr().out
        assert "not here" not in out
        found.append(json.loads(out.replace("pipeline", "policy").replace(WEIGHTS, "policy")))
    assert found[0] == found[1] == found[2]


def test_a_pipeline_with_two_generators_is_refused(tmp_path):
    for name in ("transformer", "transformer_2"):
        save_transformer(tiny_model(), tmp_path / name)
    with pytest.raises(UserError, match="two generators .*transformer_2"):
        load_transformer(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("num_attention_heads", None), ("attention_head_dim", 0), ("qk_norm", "rms_norm"), ("image_dim", 5),
    ("cross_attn_norm", False), ("ffn_dim", "x"),
])  # fmt: skip
def test_a_configuration_of_diffusers_that_is_not_wan(field, value, native, tmp_path):
    convert(native[1], tmp_path / "made", "diffusers")
    path = tmp_path / "made/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=f"config.json: {field}: got"):
        load_transformer(tmp_path / "made")


def test_a_key_in_two_layouts_is_refused(native):
    _, folder = native
    state = load_file(folder / WEIGHTS)
    save_file(state | {to_diffusers(KEY): state[KEY].clone()}, folder / WEIGHTS)
    with pytest.raises(UserError, match="in another layout"):
        load_transformer(folder)


def test_dtype(native, tmp_path):
    model, folder = native
    convert(folder, tmp_path / "made", "diffusers", torch.bfloat16)
    assert equal(load_transformer(tmp_path / "made"), model.bfloat16())


def spoiled(folder, value):
    state = load_file(folder / WEIGHTS)
    state[KEY][1, 2] = value
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize("value, more, needle", [
    (float("nan"), (), f"{KEY} holds NaN"),
    (1e30, ("--dtype", "float16"), f"{KEY} as float16 holds NaN or infinity"),
    (1, ("--to", "peft"), "--to: got 'peft', want one of native, diffusers, comfyui"),
    (1, ("--shard", "0"), "--shard: got 0.0, want"),
    (1, ("--to", "comfyui", "--shard", "1"), "--shard: got 1.0, want none"),
    (1, ("--out", "{}/native"), "--out: .*native exists"),
])  # fmt: skip
def test_a_conversion_that_cannot_be_leaves_nothing(value, more, needle, native, tmp_path, capsys):
    spoiled(native[1], value)
    given = ["--to", "diffusers", "--out", f"{tmp_path}/made", *(a.format(tmp_path) for a in more)]
    assert main(["convert", str(native[1]), *given]) == 2
    line = one_line(capsys)
    assert all(part in line for part in needle.split(".*")), line
    assert os.listdir(tmp_path) == ["native"]


def test_files_that_do_not_read_back_leave_nothing(native, tmp_path, monkeypatch):
    write = module.write_divided

    def bad(folder, *arguments):
        write(folder, *arguments)
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(module, "write_divided", bad)
    with pytest.raises(TrainingError, match="does not read back as it was written"):
        convert(native[1], tmp_path / "made", "native")
    assert os.listdir(tmp_path) == ["native"]


def test_one_tensor_is_in_memory_at_a_time(native, tmp_path, monkeypatch):
    alive, most, check = {}, [], module.check_finite

    def seen(value, *arguments):
        alive[id(value)] = weakref.ref(value)
        most.append(sum(ref() is not None for ref in alive.values()))
        check(value, *arguments)

    monkeypatch.setattr(module, "check_finite", seen)
    convert(native[1], tmp_path / "made", "diffusers", torch.bfloat16, shard=2e-5)
    # The last one written, one as it was read and as it is written.
    assert len(most) > 20 and max(most) <= 3
