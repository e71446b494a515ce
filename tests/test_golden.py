"""`prfl golden` gives the numbers that the official model code gave."""

import shutil
from pathlib import Path

import pytest
from helpers import one_line, relative
from safetensors.torch import load_file

from prfl_engine.cli import main
from prfl_engine.golden import FILES

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
