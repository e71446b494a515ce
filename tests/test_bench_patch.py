"""The benchmark of a patched diffusers model, on a tiny one."""

import json

import pytest

from prfl_bench import bench_patch, timing
from prfl_engine.patch import accelerate

pytest.importorskip("diffusers")
TINY = (
    "--width", "32", "--heads", "2", "--ffn", "48", "--blocks", "2", "--latent", "1", "8", "8",
    "--repeat", "1",
)  # fmt: skip


@pytest.mark.parametrize("dtype, shown", [("float32", ("original", "none", "full")), ("bfloat16", ("none",))])
def test_every_row_is_gated_and_has_a_time(capsys, monkeypatch, dtype, shown, tmp_path):
    monkeypatch.setattr(timing, "FLUSH", {"cpu": 0})
    bench_patch.main([*TINY, "--dtype", dtype, "--rows", *shown, "--out", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert dtype in content["machine"] and len(content["rows"]) == len(shown)
    assert all(row["bytes"] > 0 and row["seconds"]["median"] > 0 for row in content["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("gate:")]) == len(shown)
    found = (line for line in lines if line.startswith(("original", "patched")))
    rows = {line[:30].strip(): line[30:].split() for line in found}
    assert len(rows) == len(shown) and all(float(seconds) >= 0 for seconds, _ in rows.values())
    if len(shown) > 1:
        names = "patched, recompute full", "patched, recompute none", "original"
        again, kept, original = (float(rows[name][1]) for name in names)
        assert again < kept < original


def test_what_differs_gets_no_time(monkeypatch, capsys):
    def skewed(model, policy):
        for p in model.parameters():
            p.data *= 1.001

    monkeypatch.setattr(bench_patch, "accelerate", skewed)
    with pytest.raises(SystemExit, match="gate failed, want 1.0e-05 and 1.0e-05: no times are printed"):
        bench_patch.main([*TINY, "--dtype", "float32", "--rows", "none"])


def test_the_original_code_is_not_measured_as_ours(monkeypatch):
    def turned(model, policy):
        accelerate(model, policy)
        model.rope.freqs_cos[-1] += 1  # no token is there

    monkeypatch.setattr(bench_patch, "accelerate", turned)
    with pytest.raises(SystemExit, match="gate failed: none: .*another table of rotations"):
        bench_patch.main([*TINY, "--dtype", "float32", "--rows", "none"])
