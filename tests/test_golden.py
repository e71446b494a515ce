"""`prfl golden` gives the numbers that the official model code gave."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import one_line, relative
from safetensors.torch import load_file, save_file

from prfl_engine.cli import main
from prfl_engine.tools.golden import FILES

FOLDER = Path(__file__).parent / "golden" / "dev_t2v"


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "out.safetensors"
    assert main(["golden", str(FOLDER), "--out", str(out)]) == 0
    return load_file(out)


# Both codes run in float32 and sum in other orders. Measured: 2e-7 at most in values, 4e-6 in
# gradients, which cancel; the bounds are those that the golden data come with.
def test_every_value_is_that_of_the_official_code(computed):
    expected = load_file(FOLDER / "expected.safetensors")
    assert expected.keys() <= computed.keys()
    wrong = {}
    for key, want in expected.items():
        assert computed[key].shape == want.shape, key
        error = relative(computed[key], want)
        if not error <= (1e-3 if "_grad" in key else 1e-4):
            wrong[key] = error
    assert not wrong


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name, tmp_path, capsys):
    folder = tmp_path / "golden"
    shutil.copytree(FOLDER, folder, ignore=lambda *_: {name, "expected.safetensors"})
    assert main(["golden", str(folder), "--out", str(tmp_path / "out.safetensors")]) == 2
    assert str(folder / name) in one_line(capsys)
    assert not (tmp_path / "out.safetensors").exists()


def test_missing_output_folder_is_named(tmp_path, capsys):
    assert main(["golden", str(FOLDER), "--out", str(tmp_path / "no/out.safetensors")]) == 2
    assert str(tmp_path / "no") in one_line(capsys)


def set_in(section, field, value):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        values[section] = value if field is None else values[section] | {field: value}
        (folder / "config.json").write_text(json.dumps(values))

    return change


def tensor(name, key, change):
    def apply(folder):
        state = load_file(folder / name)
        old = state.pop(key)
        save_file(state if change is None else state | {key: change(old)}, folder / name)

    return apply


DAMAGE = {
    "rollout.solver": set_in("rollout", "solver", "heun"), "rollout: got None": set_in("rollout", None, None),
    "rollout.mid_index": set_in("rollout", "mid_index", 7), "num_steps": set_in("rollout", "num_steps", 1),
    "rollout.shift": set_in("rollout", "shift", 0), "reward.num_heads": set_in("reward", "num_heads", 3),
    "reward.num_blocks": set_in("reward", "num_blocks", 0), "2 blocks": set_in("reward", "num_blocks", 10**9),
    "reward.feature_layer": set_in("reward", "feature_layer", 3), "sft.sigma": set_in("sft", "sigma", 2),
    "model: dim": set_in("model", "dim", -1), "forward_timestep": set_in("forward_timestep", None, "x"),
    "got a JSON list": lambda folder: (folder / "config.json").write_text("[]"),
    "inputs.safetensors: latent": tensor("inputs.safetensors", "latent", torch.Tensor.int),
    "inputs.safetensors: noise": tensor("inputs.safetensors", "noise", lambda x: x[:, :, :0]),
    "inputs.safetensors: text_states": tensor("inputs.safetensors", "text_states", None),
    "policy.safetensors: not a": lambda folder: (folder / "policy.safetensors").write_bytes(b"text, not it"),
    "mlp.ckpt: not a safe": lambda folder: (folder / "mlp.ckpt").write_bytes(b"text, no pickle"),
    "query_attention.ckpt: got": lambda folder: torch.save([1], folder / "query_attention.ckpt"),
}


@pytest.mark.parametrize("want", DAMAGE)
def test_a_damaged_folder_is_named(want, tmp_path, capsys):
    folder = tmp_path / "golden"
    shutil.copytree(FOLDER, folder, ignore=lambda *_: {"expected.safetensors"})
    DAMAGE[want](folder)
    assert main(["golden", str(folder), "--out", str(tmp_path / "out.safetensors")]) == 2
    line = one_line(capsys)
    assert line.startswith(f"prfl: {folder}") and want in line
    assert not (tmp_path / "out.safetensors").exists()
