"""`prfl plan --rates`: what `prfl accept` has measured takes the place of what is assumed."""

import json
from pathlib import Path

import pytest
from helpers import one_line, write_run
from test_accept_report import gpu_results

from prfl_bench.accept import report
from prfl_engine import cli
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.machine import MACHINES


@pytest.fixture
def measured(tmp_path):
    """The file that a report on an H200 writes."""
    *_, path = report.write(tmp_path, gpu_results(product=400e12))
    assert path.name == "rates.json"
    return str(path)


def test_measured_rates_are_used_and_shown_beside_those_assumed(measured, tmp_path):
    path = str(write_run(tmp_path, eval={"every": 0}))
    plain, found = (predict(path, (), Options("h200", rates=r)) for r in (None, measured))
    rates = MACHINES["h200"].rates
    assert found.gpu.rates == rates._replace(
        products=400e12, memory=4.2e12, products_fp8=1.5e15, attention=440e12, attention_backward=220e12
    )
    before, now = (next(r for r in p.times.rows if r.phase == "graded step") for p in (plain, found))
    assert now.seconds > 1.01 * before.seconds and found.memory.phases == plain.memory.phases
    text = found.text()
    assert "measured on NVIDIA H200, 2026-01-02" in text and "host link" in found.gpu.basis
    lines = {line.split("  ")[1]: line.split() for line in text.splitlines() if "  " in line[:3]}
    assert lines["products, TFLOP/s"][-3:] == ["785", "400", "0.51"]
    assert lines["step/1.3B/attention"][-4:] == ["15.00", "15.50", "4.10", "4.00"]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "seconds predicted, FLOPs and GB received counted; rates: measured on" in text
    told = found.values()
    assert told["how"]["rates"] == "measured" and plain.values()["how"]["rates"] == "assumed"
    assert told["measured"]["rates"]["products"] == 400e12


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda held: held["rates"].update(speed=1.0), "--rates: {path}: got rates"),
        (lambda held: held["rates"].update(memory=0.0), "--rates: {path}: got rates"),
        (lambda held: held.pop("rates"), "--rates: {path}: KeyError('rates'), want the rates.json"),
        (lambda held: held.update(gpu="NVIDIA H100"), "--rates: got rates of 'NVIDIA H100', want those of"),
    ],
)
def test_other_files_are_refused(measured, tmp_path, capsys, change, message):
    held = json.loads(Path(measured).read_text())
    change(held)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(held))
    given = [str(write_run(tmp_path)), "--gpu", "h200", "--rates", str(path)]
    assert cli.main(["plan", *given]) == 2
    assert message.format(path=path) in one_line(capsys)
