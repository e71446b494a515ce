"""scripts/check_official.py: its limits tell the official cycle from ours; on a checkout if there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from prfl_engine.config import load_config

SCRIPT = Path(__file__).parents[1] / "scripts/check_official.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("check_official", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_limits_tell_ours_from_theirs(script, tmp_path):
    """Another cycle fails all three comparisons, the same one none."""
    script.write(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(script.official_config(tmp_path, 1, "fp32")))
    given, found = ["train.device=cpu", "train.tensorboard=false", "rollout.steps=4"], {}
    for compat in ("official", "null"):
        more = [*given, f"train.compat={compat}", f"train.out={tmp_path / compat}"]
        found[compat] = script.run_ours(load_config(path, more, "train"), reward=False)
    before = load_file(tmp_path / "policy" / script.WEIGHTS_FILE)
    same = script.distances(found["official"], found["official"], before)
    far = script.distances(found["null"], found["official"], before)
    limits = {"losses": script.LOSSES, "weights": script.WEIGHTS, "average": script.WEIGHTS}
    assert same == dict.fromkeys(limits, 0.0)
    assert all(far[name] > 3 * limit for name, limit in limits.items()), far


def test_a_folder_that_is_no_checkout_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="no such file, want a checkout of HY-Video-PRFL"):
        script.main(["--checkout", str(tmp_path), "--cycles", "1"])


@pytest.mark.skipif("HY_VIDEO_PRFL" not in os.environ, reason="HY_VIDEO_PRFL names no checkout")
def test_a_checkout():
    """In a process of its own: it leaves stand-ins for packages."""
    subprocess.run([sys.executable, SCRIPT, "--checkout", os.environ["HY_VIDEO_PRFL"]], check=True)
