"""Every kind of file that a user names: what is no such file is refused in one line that names it."""

import argparse
import json
import os
import re
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import one_line, tiny_config, tiny_model, write_data, write_run
from safetensors.torch import load_file, save_file

from prfl_engine import inputs
from prfl_engine.cli import _parser, main
from prfl_engine.data import Reader, read_lists
from prfl_engine.errors import UserError, named
from prfl_engine.model.checkpoint import load_reward, load_transformer, save_transformer
from prfl_engine.model.layout import name_layout
from prfl_engine.model.names import to_diffusers
from prfl_engine.planner import plan, rates
from prfl_engine.seeds import Purpose, seeded

WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "blocks.0.ffn.0.weight"
READERS = {
    "lines": lambda path: inputs.read_lines(path, "lines"),
    "JSON": lambda path: inputs.read_json(path, "JSON"),
    "array": lambda path: inputs.read_array(path, (1,), "array"),
    "tensors": inputs.read_tensors,
    "pickle": inputs.load_pickle,
    "rates": rates.read,
    "costs": plan.read_costs,
}
ODD = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a loop": lambda path: path.symlink_to(path.name),
    "below a file": lambda path: path.parent.rmdir() or path.parent.write_text(""),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00\x93PK"),
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_bytes(b"\x80\x02" + b"(" * 3000),
    "zip": lambda path: path.write_bytes(b"PK\3\4 and no more"),
}


TEXT = ("empty", "zip")  # files that are lines of text


@pytest.mark.parametrize("reader, kind", [(r, k) for r in READERS for k in ODD if (r, k) not in
                                          [("lines", k) for k in TEXT]])  # fmt: skip
def test_what_is_no_file_of_the_kind(reader, kind, tmp_path):
    path = tmp_path / "d" / "x\x1b\n"
    path.parent.mkdir()
    ODD[kind](path)
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    assert re.match(rf"(--rates: |model\.costs: )?{path.parent}/x\\x1b\\n", str(caught.value))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "\ud800", "a/" * 3000])
def test_names_that_no_file_has(name):
    for read in READERS.values():
        with pytest.raises(UserError):
            read(name)


@pytest.mark.parametrize("text", [
    b"[" * 10**5, b'{"a":' * 10**5, b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"null", b"3", b'"a"', b"{", b"\0",
    b"\xff\xff", b"{} {}",
], ids=range(11))  # fmt: skip
def test_json_that_is_no_object(text, tmp_path):
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(UserError, match="x: .*want JSON"):
        inputs.read_json(tmp_path / "x", "JSON")


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
ARRAYS = {
    "complex128": lambda a: a.astype(complex), "<U3": lambda a: np.full(a.shape, "abc"),
    "bool": lambda a: a > 0, "datetime64": lambda a: np.zeros(a.shape, "M8[s]"),
    "'a', '<f4'": lambda a: np.zeros(a.shape, [("a", "<f4")]), "int64": lambda a: a.astype(int),
    r"bits of bfloat16": lambda a: a.astype("u2"), "bfloat16 as numpy": lambda a: a.astype("f2").view("V2"),
    "float128": lambda a: a.astype(np.longdouble), r"\[1, 2, 0\]": lambda a: a[:, :, :0],
    r"\[3\]": lambda a: a[0, 0], "zip archive": lambda a: None,
    "object": lambda a: a.astype(object),
}  # fmt: skip


@pytest.mark.parametrize("want", ARRAYS)
def test_arrays_of_other_kinds(want, tmp_path):
    path, array = tmp_path / "x.npy", ARRAYS[want](np.ones((1, 2, 3), np.float32))
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3)) if array is None else np.save(file, array, allow_pickle=True)
    with pytest.raises(UserError, match=rf"x\.npy: .*{want}"):
        inputs.read_array(path, (1, None, None), "latent")


@pytest.mark.parametrize("header", [
    HEADER % "(1, -1, 3)", HEADER % "(1, 99999999999, 3)", HEADER % f"(1, {'9' * 30}, 3)", "(" * 3000, "'''a",
    HEADER % "(1.0, 2, 3)", "{'descr': [('a',)], 'fortran_order': False, 'shape': (1,)}", "{[]: 1}",
], ids=range(8))  # fmt: skip
def test_arrays_with_damaged_headers(header, tmp_path):
    data = header.encode() + b" " * 16 + b"\n"
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(data)) + data + bytes(24)
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(UserError, match="x.npy: not a .npy array"):
        inputs.read_array(tmp_path / "x.npy", (1, None, None), "latent")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_arrays_of_floats_are_read(dtype, tmp_path):
    array = np.arange(6, dtype=dtype).reshape(1, 2, 3)
    np.save(tmp_path / "x.npy", np.asfortranarray(array))
    assert (inputs.read_array(tmp_path / "x.npy", (1, None, 3), "latent") == array).all()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_format(version, tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, array, version)
    if version == (3, 0):  # which numpy writes for names of fields alone
        with pytest.raises(UserError, match=r"x.npy: not a .npy array: version \(3, 0\)"):
            inputs.read_array(tmp_path / "x.npy", (1, None, 3), "latent")
    else:
        assert (inputs.read_array(tmp_path / "x.npy", (1, None, 3), "latent") == array).all()


@pytest.mark.parametrize("length", [0, 5, 11, 60, 130])
def test_an_array_that_is_cut(length, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 3), np.float32))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:length])
    with pytest.raises(UserError, match="x.npy: not a .npy array"):
        inputs.read_array(tmp_path / "x.npy", (1, None, 3), "latent")


@pytest.fixture
def sample(tmp_path):
    write_data(tmp_path, tiny_config(), 1)
    return tmp_path / "0.json"


@pytest.mark.parametrize("fields", [
    {"vae_latent_path": v} for v in ("", " ", 3, True, {}, ["a.npy"], "a\0b", "a" * 5000, "/", "\x1b[31m")
] + [{"textshort_path": ""}, {"textshort_path": 3}])  # fmt: skip
def test_a_path_of_a_sample_names_the_meta_file_and_its_key(fields, sample):
    sample.write_text(json.dumps(json.loads(sample.read_text()) | fields))
    with pytest.raises(UserError) as caught:
        Reader(tiny_config()).read(sample, seeded(Purpose.CAPTION, 0, 0))
    assert str(caught.value).startswith(f"{sample}: {[*fields][0]}: ")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("name", ["latent-0.npy", "short-0.npy"])
def test_numbers_that_are_not_finite_are_named(name, value, sample):
    array = np.load(sample.parent / name).astype(float)
    array.flat[3] = value
    np.save(sample.parent / name, array)
    with pytest.raises(UserError, match=f"{name}: (latent|text) holds NaN or infinity"):
        Reader(tiny_config()).read(sample, seeded(Purpose.CAPTION, 0, 0))


def test_the_null_prompt_is_read_before_it_is_needed(tmp_path):
    with pytest.raises(UserError, match="data.null_text: .*null.npy: no such file"):
        Reader(tiny_config(), null_text=str(tmp_path / "null.npy"), text_dropout=1e-9)


LISTS = {
    "UTF-16": "a.json\n".encode("utf-16"), "not UTF-8": b"0.json\n/caf\xe9/0.json\n",
    "NUL": b"0.json\n0.jso\0n\n", "JSON": b'0.json\n{"source_id": 0}\n', "too long": b"0.json\n" + b"a" * 300,
    "no such": b"0.json\nno.json\n", "a folder": b"0.json\n.\n",
}  # fmt: skip


@pytest.mark.parametrize("want", LISTS)
def test_lists_of_other_kinds_name_their_line(want, sample):
    path = sample.parent / "x.list"
    path.write_bytes(LISTS[want])
    with pytest.raises(UserError) as caught:
        read_lists([str(path)], "data.train")
    line = 1 if want == "UTF-16" else 2
    assert str(caught.value).startswith(f"data.train: {path}, line {line}: ") and want in str(caught.value)


def test_a_list_as_people_have_it(sample):
    path = sample.parent / "x.list"
    path.write_bytes(b"\xef\xbb\xbf0.json\r\n\r\n  0.json\t\r\n")
    assert read_lists([str(path)], "data.train") == [sample, sample]


def test_of_a_message_every_line_end_is_escaped():
    with pytest.raises(UserError, match=r"^a\\nb: c\\rd\\u2028e$"), named("a\nb"):
        raise UserError("c\rd\u2028e")


# Tensors.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, write_run(folder)


@pytest.fixture
def generator(tmp_path):
    save_transformer(tiny_model(), tmp_path)
    return tmp_path, load_file(tmp_path / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats(dtype, generator):
    folder, state = generator
    save_file(state | {KEY: state[KEY].to(dtype)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"{WEIGHTS}: {KEY} is .*, want floating-point"):
        load_transformer(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_that_are_not_finite(dtype, value, generator):
    folder, state = generator
    state[KEY][1, 2] = value if dtype != torch.float8_e4m3fn else float("nan")
    save_file({k: v.to(dtype) for k, v in state.items()}, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"{WEIGHTS}: {KEY} holds NaN or infinity"):
        load_transformer(folder)


@pytest.mark.parametrize("data", [
    b"", b"no safetensors, text", b"\xff" * 20, struct.pack("<Q", 40000) + b"[" * 40000, None,
], ids=range(5))  # fmt: skip
def test_damaged_weights(data, generator):
    path = generator[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000] if data is None else data)
    with pytest.raises(UserError, match=f"{WEIGHTS}: not a safetensors file"):
        load_transformer(generator[0])


def test_more_blocks_in_the_configuration_than_in_the_files(generator):
    path = generator[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 9000}))
    with pytest.raises(UserError, match="config.json: num_layers: got 9000, want the 2 blocks"):
        load_transformer(generator[0])


DTYPES = {
    "float16": lambda k, v: v.half(), "fp8": lambda k, v: v.to(torch.float8_e4m3fn),
    "float64": lambda k, v: v.double(), "half a matrix": lambda k, v: v.half() if v.dim() == 2 else v,
    "fp8 matrices": lambda k, v: (
        v.to(torch.float8_e4m3fn) if v.dim() == 2 and k.endswith("weight")
        else v if "norm" in k else v.bfloat16()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_weights_of_every_float_dtype_are_sampled(name, run, tmp_path):
    """As if they had been converted to float32, which holds all of their values."""
    folder, config = run
    state, found = load_file(folder / "policy" / WEIGHTS), {}
    for kind in ("stored", "float32"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text((folder / "policy/config.json").read_text())
        cast = {k: DTYPES[name](k, v) for k, v in state.items()}
        cast = cast if kind == "stored" else {k: v.float() for k, v in cast.items()}
        save_file(cast, tmp_path / kind / WEIGHTS)
        out = tmp_path / f"{kind}-out"
        arguments = [f"model.path={tmp_path / kind}", "sample.count=1", "--out", str(out)]
        assert main(["sample", str(config), *arguments]) == 0
        found[kind] = np.load(out / "sample-00.npy")
    assert np.allclose(found["stored"], found["float32"], atol=1e-5)


@pytest.mark.parametrize("value", [
    3, None, "x", [1.0], torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1, 32, dtype=torch.complex64),
    torch.zeros(1, 32).to_sparse(), torch.zeros(1, 32, device="meta"), torch.full((1, 32), torch.nan),
    torch.zeros(1, 32).expand(2**33, 32), torch.zeros(0, 32), torch.tensor(1.0),
], ids=range(12))  # fmt: skip
def test_a_pooling_that_is_none(value, run, tmp_path):
    reward, path = run[0] / "reward", tmp_path / "query.ckpt"
    state = torch.load(reward / "query_attention_step_0.ckpt", weights_only=True)
    torch.save(state | {"queries": value}, path)
    with pytest.raises(UserError, match="query.ckpt: .*queries"):
        load_reward(transformer=reward, query_attention=path, mlp=reward / "mlp_step_0.ckpt", feature_layer=1)


# Generators that the engine does not run.


def wider(state, channels):
    weight = state["patch_embedding.weight"]
    return state | {"patch_embedding.weight": weight[:, :1].expand(-1, channels, -1, -1, -1).contiguous()}


LAYOUTS = {
    "scaled fp8": lambda s: s | {"blocks.0.ffn.0.scale_weight": torch.ones(1), "scaled_fp8": torch.ones(2)},
    "adapter": lambda s: {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(1, 32)},
    "wrapper": lambda s: {f"module.{k}": v for k, v in s.items()},
    "VACE": lambda s: s | {"vace_blocks.0.ffn.0.weight": s[KEY].clone()},
    "FLF2V": lambda s: s | {"img_emb.emb_pos": torch.ones(1)},
    "Wan FLF2V": lambda s: s | {"condition_embedder.image_embedder.pos_embed": torch.ones(1)},
    "scaled fp8 .*blocks.0.ffn.0.scale_weight": lambda s: {
        f"model.diffusion_model.{k}": v for k, v in LAYOUTS["scaled fp8"](s).items()},
    "Wan VACE": lambda s: {to_diffusers(k): v for k, v in s.items()} | {"vace_blocks.0.x": torch.ones(1)},
}


@pytest.mark.parametrize("want", LAYOUTS)
def test_a_generator_that_is_not_run_is_told_apart(want, generator):
    folder, state = generator
    save_file(LAYOUTS[want](state), folder / WEIGHTS)
    with pytest.raises(UserError, match=f"^{folder}: got .*{want}"):
        load_transformer(folder)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v-a14b", "ti2v"])
def test_a_generator_of_wan_is_run(kind):
    channels = dict(in_dim=48, out_dim=48) if kind == "ti2v" else {}
    state = tiny_model(tiny_config(kind, **channels)).state_dict()
    assert name_layout({k: tuple(v.shape) for k, v in state.items()}) is None


# What commands write.


def given(folder, config):
    """What every command that writes something new is given apart from --out, which is looked at first."""
    commands = {"sample": [str(config)], "merge-lora": [str(folder / "policy"), "x"], "golden": ["x"]}
    return commands | {"convert": ["x", "--to", "native"], "score": ["x"]}


@pytest.mark.parametrize("command", ["sample", "merge-lora", "golden", "convert", "score"])
@pytest.mark.parametrize(
    "out", ["file", "folder", "", " ", "link", "file/below", "none/..", "a" * 300, "a" * 252]
)
def test_an_output_that_is_there_or_cannot_be(out, command, run, tmp_path, capsys, monkeypatch):
    folder, config = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    assert main([command, *given(folder, config)[command], "--out", out]) == 2
    assert one_line(capsys).startswith("prfl: --out: ")
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "precious"


def places() -> Iterator[tuple[str, str, list[str]]]:
    """(command, option or argument that is a path, all that stands before its value)."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        before = [command]
        for action in parser._actions:
            if re.search("DIR|FILE|CONFIG|SOURCE|BASE|ADAPTER", action.metavar or "") and action.nargs != "*":
                yield command, (action.option_strings or [action.metavar])[0], before + action.option_strings
            before += [] if action.option_strings else ["x"]


@pytest.mark.parametrize("text", ["", " ", "\t\u3000", "a\0b", "a" * 5000])
def test_a_path_on_a_command_line_that_cannot_be_one(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set()
    for command, name, before in places():
        assert main([*before, text]) == 2
        assert one_line(capsys).startswith(f"prfl: {name}: got "), command
        names.add(name)
    assert main(["score", "x", text]) == 2
    assert one_line(capsys).startswith("prfl: samples: got ")
    assert len(names) > 15 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("out", ["file", "", " ", "link", "file/below"])
def test_a_demo_that_cannot_be_written(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    assert main(["demo", "--out", out]) == 2
    assert one_line(capsys).startswith("prfl: --out: ")


def test_an_output_where_nobody_can_write(run, capsys):
    """/proc says of itself that root may write there. Nothing is computed before it is tried."""
    folder, config = run
    commands = given(folder, config) | {"demo": [], "accept": []}
    for command, words in commands.items():
        assert main([command, *words, "--out", "/proc/prfl"]) == 2
        assert re.match("prfl: --out: /proc cannot be written to: ", one_line(capsys)), command
    assert main(["plan", str(config), "--picture", "/proc/prfl.png"]) == 2
    assert one_line(capsys).startswith("prfl: --picture: /proc cannot be written to: ")
    assert main(["train", str(config), "train.out=/proc/prfl"]) == 2
    assert one_line(capsys).startswith("prfl: train.out: /proc cannot be written to: ")


def test_a_full_disk_behind_what_is_printed(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["accept", "--list"]) == 1
    assert one_line(capsys) == "prfl: cannot write: No space left on device"


def test_a_reader_that_has_left(capsys, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as left:
        monkeypatch.setattr("sys.stdout", left)
        assert main(["accept", "--list"]) == 1
    assert capsys.readouterr().err == ""
