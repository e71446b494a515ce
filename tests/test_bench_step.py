"""The benchmark of a whole step, on a tiny model."""

import sys
from pathlib import Path

import pytest
import torch

from prfl_kernels import table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = (
    "--width", "32", "--ffn", "48", "--heads", "2", "--blocks", "2", "--steps", "4", "--index", "2",
    "--latent", "1", "8", "8", "--repeat", "1", "--dtype", "float32",
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_step

    yield bench_step
    table.configure("")
    sys.modules.pop("bench_step")


def test_every_setting_has_a_row(bench, capsys):
    bench.main([*TINY, "--kernels", "reference", "--recompute", "none", "full", "--samples", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("gate:")]) == 4
    rows = {line[:44].strip(): line[44:].split() for line in lines if line.startswith("reference,")}
    assert len(rows) == 4
    for row in rows.values():
        *phases, total, gradient, mib = map(float, row)
        assert total > 0 and gradient <= total and mib > 0 and sum(phases) == pytest.approx(total, abs=0.01)
    kept, again = (rows[f"reference, recompute {mode}, 1 x 1 step"][-1] for mode in ("none", "full"))
    assert float(again) < float(kept)


def test_what_does_not_agree_gets_no_time(bench, monkeypatch, capsys):
    run = bench.Step.run

    def broken(self, setting, optimize=True):
        losses, seconds = run(self, setting, optimize)
        return [loss * (2 if setting.recompute == "full" else 1) for loss in losses], seconds

    monkeypatch.setattr(bench.Step, "run", broken)
    with pytest.raises(SystemExit, match="gate failed"):
        bench.main([*TINY, "--kernels", "reference", "--recompute", "none", "full"])
    assert "MiB" not in capsys.readouterr().out
    assert torch.is_grad_enabled()
