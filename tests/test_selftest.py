"""The doctor's self-test: complete, and able to fail."""

import pytest
import torch

from prfl_bench import selftest as module
from prfl_bench.selftest import selftest
from prfl_engine.cli import main
from prfl_kernels import dispatch, extension
from prfl_kernels.attention.op import RECORDS

OPERATIONS = dict(dispatch.OPERATIONS)


@pytest.fixture(autouse=True)
def attention_alone(monkeypatch):
    """One operation: every other one is run by the tests of its own."""
    monkeypatch.setattr(dispatch, "OPERATIONS", {"attention": OPERATIONS["attention"]})


def break_sdpa(monkeypatch, change):
    backend = RECORDS["sdpa"]

    def forward(*inputs):
        out, lse = backend.forward(*inputs)
        return change(out), lse

    monkeypatch.setitem(RECORDS, "sdpa", backend._replace(forward=forward))


def test_every_operation_has_a_case():
    assert set(module.OPERATIONS) == set(OPERATIONS)


def test_all_that_runs_here_is_run_and_good():
    rows = {row.implementation: row for row in selftest()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    isas = extension.isas() if extension.absence("cpu", device) is None else [""]
    want = set(dispatch.OPERATIONS["attention"]) - {dispatch.REFERENCE, "cpu"}
    assert set(rows) == want | {f"cpu {isa}".strip() for isa in isas}
    assert rows["sdpa"].state == "ok", rows["sdpa"]
    assert all(row.state != "FAILED" and row.detail for row in rows.values())
    assert not dispatch.configured()


def test_without_the_extension_its_kernels_are_absent(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: (None, "is not built: no compiler"))
    rows = {row.implementation: row for row in selftest()}
    if not torch.cuda.is_available():
        assert rows["cpu"].state == "absent" and "is not built: no compiler" in rows["cpu"].detail


@pytest.mark.parametrize("change", [lambda a: a * 1.05, lambda a: a.roll(1, 1), lambda a: a * float("nan")])
def test_a_wrong_kernel_is_found(monkeypatch, change, capsys):
    break_sdpa(monkeypatch, change)
    row = next(row for row in selftest() if row.implementation == "sdpa")
    assert row.state == "FAILED"
    monkeypatch.setattr(module, "selftest", lambda: [row])
    assert main(["doctor", "--selftest"]) == 1
    assert "attention sdpa  FAILED  error" in capsys.readouterr().out


def test_a_kernel_that_does_not_launch_is_found(monkeypatch):
    def launch(a):
        raise RuntimeError("no kernel image is available\nfor execution")

    break_sdpa(monkeypatch, launch)
    row = next(row for row in selftest() if row.implementation == "sdpa")
    assert row.state == "FAILED" and row.detail == "RuntimeError: no kernel image is available"


def test_errors_are_relative_and_nan_is_infinite():
    a = torch.tensor([3.0, 4.0])
    assert module._error(a * 1.5, a) == 0.5
    assert module._error(a * float("nan"), a) == float("inf")
