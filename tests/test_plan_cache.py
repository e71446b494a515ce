"""The cache of `prfl plan`: an entry is found again, and never where anything has changed."""

import pytest
import yaml
from helpers import write_data, write_run

from prfl_engine import cli
from prfl_engine.model.sources import read_config
from prfl_engine.planner import outputs
from prfl_engine.planner.command import Options


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A configuration, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_run(tmp_path, eval={"every": 0})


@pytest.fixture
def counted(monkeypatch):
    """How often a prediction is made."""
    found, predict = [], outputs.predict

    def made(*given):
        found.append(given)
        return predict(*given)

    monkeypatch.setattr(outputs, "predict", made)
    return found


def test_a_plan_is_made_once(path, counted, capsys):
    printed = []
    for given in ([], [], ["--json"], ["--no-cache"], ["rollout.steps=4"], ["--price", "2"]):
        assert cli.main(["plan", str(path), *given]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[3] != printed[4]
    assert len(counted) == 5
    assert len(list(outputs.folder().iterdir())) == 4


def test_whatever_changes_a_plan_changes_its_key(path, tmp_path, monkeypatch):
    def key(overrides=(), searching=False, **options) -> str:
        return outputs.key(str(path), overrides, Options(**options), searching)

    found = [key(), key(("train.seed=1",)), key(gpus=1), key(gpu="h200"), key(searching=True), key(budget=3)]
    config = read_config(tmp_path / "policy")
    write_data(tmp_path / "data", config, 4, [(16, 1, 16, 8)])  # other latents under the same names
    found.append(key())
    monkeypatch.setattr(outputs, "sources", lambda: "other code")
    found.append(key())
    monkeypatch.setattr(outputs.torch, "__version__", "9.9")
    found.append(key())
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"data": values["data"] | {"batch_size": 2}}))
    found.append(key())
    assert len(set(found)) == len(found)


def test_a_cache_that_cannot_be_written_is_said(path, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["plan", str(path)]) == 0
    printed = capsys.readouterr()
    assert "the plan is not cached" in printed.err and "memory of a GPU" in printed.out


def test_old_entries_go(path, monkeypatch):
    monkeypatch.setattr(outputs, "KEEP", 1)
    for steps in (4, 5):
        assert cli.main(["plan", str(path), f"rollout.steps={steps}"]) == 0
    assert len(list(outputs.folder().iterdir())) == 1
