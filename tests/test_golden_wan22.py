"""Models of Wan2.2 give the numbers of the official code: a guided chain through both experts of A14B by the
official sampler, and TI2V in both modes. (That of its VAE: test_encoders.py.)"""

import importlib.util
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.model.experts import HIGH, LOW, Experts

ROOT = Path(__file__).parent


def script(name):
    """A script, which has written golden values of the official code."""
    spec = importlib.util.spec_from_file_location(name, ROOT.parent / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_every_value_is_that_of_the_official_code(kind):
    """Measured: 5e-7 at most. Both codes run in float32 and sum in other orders."""
    check = script("check_wan22")
    folder = ROOT / "golden/wan22" / kind
    want, given = load_file(folder / "expected.safetensors"), load_file(folder / "inputs.safetensors")
    experts = Experts(*(load_transformer(folder / name) for name in (HIGH, LOW)), check.KINDS[kind][0])
    steps = len(want["timesteps"])
    found = check.ours(experts, kind, given, steps)
    assert found.keys() == want.keys() and len(want) == 5 + steps
    asked = (want["timesteps"] >= experts.boundary).sum()
    assert 0 < asked < steps and len(set(map(float, want["timesteps"]))) == steps
    error, where = check.worst(found, want)
    assert error < 1e-5, where


@pytest.mark.parametrize("mode", ["text", "image"])
def test_velocity_and_gradients_of_ti2v_are_those_of_the_official_code(mode):
    """There with a timestep of every token. Measured: 9e-7 at most."""
    check, folder = script("check_ti2v"), ROOT / "golden/wan22/ti2v"
    want, given = load_file(folder / "expected.safetensors"), load_file(folder / "inputs.safetensors")
    model = load_transformer(folder)
    found = check.ours(model, given)
    assert found.keys() == want.keys()
    weights = [name for name, _ in model.named_parameters() if not name.endswith(".k.bias")]
    assert sum(k.startswith(mode) for k in want) == 2 + len(weights)
    error, where = check.worst(found, want, mode)
    assert error < 1e-5, where


@pytest.mark.parametrize("name", ["check_wan22", "check_ti2v", "check_encoders"])
def test_a_folder_of_golden_values_is_a_new_one(name, tmp_path, monkeypatch, capsys):
    """Known before anything is loaded; what is there stays."""
    (tmp_path / "expected.safetensors").write_bytes(b"old")
    monkeypatch.setattr(sys, "argv", [name, "nowhere", "--golden", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        script(name).main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"argument --golden: {tmp_path} exists, want a new name\n")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
