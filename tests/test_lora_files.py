"""Adapter files of other programs: names, strengths, mistakes; and the file that other programs read."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import one_line, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_lora import model
from torch.utils._pytree import tree_leaves

from prfl_engine.cli import main
from prfl_engine.config import LoraConfig
from prfl_engine.errors import UserError
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.model.layers import Linear
from prfl_engine.model.lora_files import SHARED, read

RANK, ALPHA = 4, 2.0
ALL = ("q", "k", "v", "o", "k_img", "v_img", "ffn.0", "ffn.2", "text_embedding.0", "text_embedding.2",
       "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "img_emb.proj.1",
       "img_emb.proj.3")  # fmt: skip
# The names of diffusers 0.42 (scripts/convert_wan_to_diffusers.py and WanTransformer3DModel).
RENAMED = (
    ("self_attn", "attn1"), ("cross_attn", "attn2"), (".q", ".to_q"), (".k_img", ".add_k_proj"),
    (".v_img", ".add_v_proj"), (".k", ".to_k"), (".v", ".to_v"), (".o", ".to_out.0"),
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"), ("head.head", "proj_out"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
)  # fmt: skip


def diffusers_name(name):
    for native, other in RENAMED:
        if name.endswith(native):
            name = name.removesuffix(native) + other
    return name.replace("self_attn", "attn1").replace("cross_attn", "attn2")


def adapter(kind):
    """{module: (A, B)} for every linear layer of a tiny model."""
    g, made = torch.Generator().manual_seed(0), {}
    for name, m in tiny_model(tiny_config(kind)).named_modules():
        if isinstance(m, Linear):
            down = torch.randn(RANK, m.in_features, generator=g)
            made[name] = down, torch.randn(m.out_features, RANK, generator=g)
    return made


PEFT = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.use_dora": False})
PATTERNS = json.dumps({
    "r": 8, "lora_alpha": 8, "rank_pattern": {r"^blocks\.\d+\.attn[12]\.to_(q|k|v)": 4, ".*": 4},
    "alpha_pattern": {"condition_embedder.*": 2, ".*": 2.0},
})  # fmt: skip
AB, UP_DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DEFAULT = "lora_A.default.weight", "lora_B.default.weight"


def flat(name):
    return "lora_unet_" + name.replace(".", "_")


def in_pipeline(name):
    return "transformer." + diffusers_name(name)


# {format: (name of a module, ends of the two matrices, whether there are alphas, metadata)}
FORMATS = {
    "plain": (str, AB, False, {}),
    "diffsynth": (str, DEFAULT, False, {}),
    "diffsynth, whole pipeline": ("pipe.dit.{}".format, DEFAULT, False, {}),
    "comfyui": ("diffusion_model.{}".format, AB, False, {}),
    "comfyui, alpha": ("diffusion_model.{}".format, AB, True, {}),
    "comfyui, up and down": ("diffusion_model.{}".format, UP_DOWN, True, {"ss_network_alpha": "64"}),
    "comfyui, metadata": ("diffusion_model.{}".format, AB, False, {"lora_alpha": "2"}),
    "comfyui, all agree": ("diffusion_model.{}".format, AB, True, {
        "lora_adapter_metadata": PEFT, "ss_network_alpha": "2.0", "lora_alpha": "2", "alpha": "2"}),
    "kohya": (flat, UP_DOWN, True, {}),
    "kohya, alpha noted": (flat, UP_DOWN, False, {"ss_network_alpha": "2.0"}),
    "kohya on diffusers": (lambda name: flat(diffusers_name(name)), UP_DOWN, True, {}),
    "diffusers": (in_pipeline, AB, False, {}),
    "diffusers, metadata": (in_pipeline, AB, False, {"lora_adapter_metadata": PEFT}),
    "diffusers, patterns": (in_pipeline, AB, False, {"lora_adapter_metadata": PATTERNS}),
    "peft in one file": ("base_model.model.{}".format, AB, False, {}),
    "kohya of HY-Video-PRFL": (lambda name: "lora_" + name.replace(".", "_"), UP_DOWN, False, {}),
    "peft on comfyui": ("base_model.model.diffusion_model.{}".format, AB, False, {}),
}  # fmt: skip


def write(file, form, made):
    name, ends, alpha, header = FORMATS[form]
    tensors = {}
    for module, pair in made.items():
        tensors |= {f"{name(module)}.{end}": a for end, a in zip(ends, pair, strict=True)}
        if alpha:
            tensors[f"{name(module)}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, file, {"format": "pt"} | header)


@pytest.mark.parametrize("form", FORMATS)
def test_names_and_strengths_of_every_format(tmp_path, form):
    made = adapter("i2v")
    write(tmp_path / "lora.safetensors", form, made)
    updates, own = read(tmp_path / "lora.safetensors")
    assert updates.keys() == made.keys() and len(made) == 2 * 12 + 8 and not own
    _, _, alpha, header = FORMATS[form]
    for name, (down, up, scale) in updates.items():
        assert torch.equal(down, made[name][0]) and torch.equal(up, made[name][1])
        assert scale == (ALPHA / RANK if alpha or header else 1)


def test_alphas_in_the_file_may_differ(tmp_path):
    write(tmp_path / "lora.safetensors", "kohya", adapter("t2v"))
    tensors = load_file(tmp_path / "lora.safetensors")
    tensors["lora_unet_blocks_1_ffn_2.alpha"] = torch.tensor(3)  # an integer is one too
    save_file(tensors, tmp_path / "lora.safetensors")
    updates, own = read(tmp_path / "lora.safetensors")
    assert updates["blocks.1.ffn.2"].scale == 0.75 and updates["blocks.1.ffn.0"].scale == 0.5
    assert own == updates.keys()


def as_diffusers(tensors):
    """{layer of WanTransformer3DModel: its update B A}, by the rules of diffusers 0.42
    (_convert_non_diffusers_wan_lora_to_diffusers): alphas in blocks alone, nothing may be left over."""
    left = {k.removeprefix("diffusion_model."): a for k, a in tensors.items()}
    assert len(left) == len(tensors) and all(k.startswith("diffusion_model.") for k in tensors)
    found = {}
    for name in {k.rpartition(".lora_")[0] for k in left if ".lora_" in k}:
        down, up = left.pop(f"{name}.lora_A.weight"), left.pop(f"{name}.lora_B.weight")
        scale = left.pop(f"{name}.alpha").item() / len(down) if name.startswith("blocks.") else 1.0
        found[diffusers_name(name)] = up @ down * scale
    assert not left
    return found


def as_comfyui(tensors, model):
    """{weight of the model: its update}, by the rules of ComfyUI (comfy/lora.py, weight_adapter/lora.py)."""
    found, used = {}, set()
    for key in (k for k in model.state_dict() if k.endswith(".weight")):
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        if f"{name}.lora_B.weight" in tensors:
            up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
            alpha = tensors.get(f"{name}.alpha")
            found[key] = up @ down * (1.0 if alpha is None else alpha.item() / len(down))
            used |= {f"{name}.lora_B.weight", f"{name}.lora_A.weight", f"{name}.alpha"}
    assert used >= tensors.keys()
    return found


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_comfyui_and_diffusers_find_every_layer_at_its_strength(tmp_path, kind):
    targets = ALL if kind == "i2v" else ALL[:-2]
    trained = model(tiny_config(kind), LoraConfig(rank=3, alpha=6.0, targets=targets))
    lora.save(trained, tmp_path)
    tensors, plain = load_file(tmp_path / SHARED), model(tiny_config(kind), None)
    layers = {k: m for k, m in trained.named_modules() if isinstance(m, Linear)}
    want = {k: m.lora_scale * m.lora_B @ m.lora_A for k, m in layers.items()}
    read_by = (as_comfyui(tensors, plain), "{}.weight".format), (as_diffusers(tensors), diffusers_name)
    for got, rename in read_by:
        assert got.keys() == {rename(k) for k in want}
        for k, a in want.items():
            torch.testing.assert_close(got[rename(k)], a)
    from_shared, from_peft = read(tmp_path / SHARED)[0], read(tmp_path)[0]
    for k, a in want.items():  # PEFT's files are those read of a folder
        low = from_shared[k]
        torch.testing.assert_close(low.scale * low.up @ low.down, a)
        assert from_peft[k].scale == 2.0 and torch.equal(from_peft[k].up, layers[k].lora_B)


A = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
ALPHA_OF_A = A.replace("lora_A.weight", "alpha")


def other(end, *shape):
    """One more tensor in the place of A."""
    return lambda t: t.update({A.replace("lora_A.weight", end): torch.zeros(shape)})


def alpha(value):
    return lambda t: t.update({ALPHA_OF_A: torch.tensor(value)})


def same(t):
    pass


@pytest.mark.parametrize(
    "change, header, message",
    [
        (other("diff_b", 2), {}, "differences of whole weights.*LightX2V"),
        (other("diff", 2, 2), {}, "differences of whole weights.*LightX2V"),
        (other("dora_scale", 2, 1), {}, "holds a DoRA adapter"),
        (other("hada_w1_a", 2, 1), {}, "holds a LoHa adapter"),
        (other("lokr_w1", 2, 1), {}, "holds a LoKr adapter"),
        (other("lora_B.bias", 2), {}, "holds updates of biases"),
        (lambda t: t.update({"lora_te_x.lora_up.weight": torch.zeros(2, 1)}), {}, "of a text encoder"),
        (lambda t: t.update({A.removeprefix("diffusion_model."): torch.zeros(4, 32)}), {},
         "is one of two tensors for lora_A of blocks.0.self_attn.q"),
        (lambda t: t.update({A: t[A] * float("nan")}), {}, "lora_A.weight holds NaN or infinity"),
        (lambda t: t.update({A: t[A].int()}), {}, "int32, want a float dtype"),
        (alpha(float("nan")), {}, "q.alpha holds NaN or infinity"),
        (alpha(0.0), {}, "alpha of blocks.0.self_attn.q: got 0.0, want a positive number"),
        (other("alpha", 2), {}, r"q.alpha \[2\], want"),
        (alpha(2.0), {"lora_alpha": "4"}, "attn.q is 0.5 by its alpha, but 1 by lora_alpha in"),
        (same, {"lora_alpha": "4", "lora_adapter_metadata": PEFT}, "1 by lora_alpha .* 0.5 by lora_adapter_"),
        (same, {"lora_alpha": "nan"}, "lora_alpha: got 'nan', want a positive number"),
        (same, {"alpha": "two"}, "alpha: got 'two', want a positive number"),
        (same, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata: not JSON"),
        (same, {"lora_adapter_metadata": "[]"}, "lora_adapter_metadata: got a JSON list, want PEFT"),
    ],
)  # fmt: skip
def test_what_is_no_plain_adapter_is_refused_in_one_line(tmp_path, change, header, message):
    file = tmp_path / "lora.safetensors"
    write(file, "comfyui", adapter("t2v"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"} | header)
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("lora_alpha", float("nan"), "lora_alpha: got nan, want a positive number"),
        ("lora_alpha", float("inf"), "lora_alpha: got inf"),
        ("lora_alpha", 10**400, "lora_alpha: got 1000"),
        ("lora_alpha", "6", "lora_alpha: got '6'"),
        ("lora_alpha", True, "lora_alpha: got True"),
        ("r", "3", "r: got '3', want a positive integer"),
        ("r", 0, "r: got 0"),
        ("use_rslora", "yes", "use_rslora: got 'yes', want true or false"),
        ("peft_type", "LOHA", "peft_type: got 'LOHA', want 'LORA'"),
        ("lora_bias", True, "lora_bias: got True, want False"),
        ("modules_to_save", ["head"], r"modules_to_save: got \['head'\], want None"),
        ("rank_pattern", ["q"], r"rank_pattern: got \['q'\], want an object"),
        ("rank_pattern", {"q": 2.5}, "rank_pattern 'q': got 2.5, want a positive integer"),
        ("rank_pattern", {"(a+)+": 2}, r"rank_pattern: got '\(a\+\)\+', want a name or a regular"),
        ("rank_pattern", {r"(([a-z0-9_]+)*\.?)*X": 2}, "rank_pattern: got .* want a name or a regular"),
        ("rank_pattern", {".*.*.*.*X": 2}, "rank_pattern: got .* at most 3"),
        ("alpha_pattern", {"[z-a]": 2}, "alpha_pattern: .* is no regular expression"),
    ],
)
def test_settings_of_peft_that_cannot_be_right_are_refused(tmp_path, field, value, message):
    lora.save(model(), tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {field: value}))
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and "adapter_config.json" in str(error.value)


def test_no_other_file_stands_in_for_weights_that_cannot_be_read(tmp_path):
    """A folder of ours has the adapter in two files."""
    lora.save(model(), tmp_path)
    peft = tmp_path / "adapter_model.safetensors"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    kinds = {Path.mkdir: "is a folder", os.mkfifo: "is a pipe", lambda p: p.symlink_to(p): "levels of"}
    for make, message in kinds.items():
        peft.rmdir() if peft.is_dir() else peft.unlink()
        make(peft)
        with pytest.raises(UserError, match=f"{peft}: .*{message}"):
            read(tmp_path)


def test_an_adapter_of_an_image_model_is_refused_for_one_without(tmp_path):
    lora.save(model(tiny_config("i2v")), tmp_path)
    for use in (lora.merge, lora.apply):
        with pytest.raises(UserError, match="blocks.0.cross_attn.k_img is no linear layer of the model"):
            use(model(lora_config=None), tmp_path)


def test_a_pattern_that_matches_nothing_changes_nothing(tmp_path):
    """With as many repeats as are taken, where trying all ways to match would take longest."""
    lora.save(model(), tmp_path)
    before = tree_leaves(read(tmp_path))
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"rank_pattern": {".*.*.*X": 2}}))
    for a, b in zip(before, tree_leaves(read(tmp_path)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_merging_refuses_before_it_writes(tmp_path, capsys):
    base, good = tmp_path / "base", tmp_path / "adapter"
    save_transformer(model(lora_config=None), base)
    lora.save(model(), good)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    folder = tmp_path / "config-is-a-folder"
    lora.save(model(), folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    broken = model(lora_config=None)
    broken.blocks[0].norm3.weight.data[0] = float("nan")
    save_transformer(broken, tmp_path / "broken")
    before = sorted(tmp_path.iterdir())
    for args, message in (
        ((base, good, "dangling"), "--out: .*dangling exists, want a new name"),
        ((base, good, "file/out"), "--out: .*file is a file, want a folder"),
        ((base, folder, "out"), "adapter_config.json: is a folder"),
        ((tmp_path / "broken", good, "out"), "broken/.*: blocks.0.norm3.weight holds NaN or infinity"),
        ((base, tmp_path / "file", "out"), "file: not a safetensors file"),
    ):
        assert main(["merge-lora", str(args[0]), str(args[1]), "--out", str(tmp_path / args[2])]) == 2
        assert re.search(message, one_line(capsys))
        assert sorted(tmp_path.iterdir()) == before
