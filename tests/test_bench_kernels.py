"""The benchmark of the kernels, run on its small shapes: its numbers, its gates, its refusals."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fused import DEVICE, needs_triton

from prfl_bench import operations
from prfl_bench.ledger import cuda as ledger_cuda
from prfl_bench.ledger import table as ledger_rows
from prfl_kernels import dispatch, norm
from prfl_kernels.qk_norm_rope import op as qk_norm_rope

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAST = ("--small", "--repeat", "2")


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, in a hurry: as if caches were small, torch.compile without code. One
    thread, since two wait for each other where the cores are shared."""
    from prfl_bench import bench_kernels, timing

    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 18)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench_kernels
    torch.set_num_threads(threads)
    dispatch.configure("")


def run(bench, tmp_path, *options):
    """(exit code, what --json wrote)."""
    file = tmp_path / "found.json"
    code = bench.main([*FAST, *options, "--json", str(file)])
    return code, json.loads(file.read_text())


def test_every_operation_is_measured_beside_every_peer(bench, tmp_path, capsys):
    code, found = run(bench, tmp_path)
    assert code == 0
    entries = {entry.name: entry for entry in bench.ENTRIES}
    passed = {(g["op"], g["backend"]) for g in found["gates"] if g["gate"] == "passed"}
    assert passed >= {(name, "reference") for name in entries}
    assert {entry.op for entry in entries.values()} == set(dispatch.OPERATIONS)
    assert {(r["op"], r["backend"]) for r in found["rows"]} == passed
    absent = [g for g in found["gates"] if g["gate"] == "absent"]
    assert all(g["why"] for g in absent) and (DEVICE == "cuda" or absent)
    for row in found["rows"]:
        peers = {"eager", "compile"} | ({"sdpa"} if row["op"].startswith("attention") else set())
        assert row["peers"].keys() == peers
        assert all(p["ms"] > 0 and p["ratio"] > 0 for p in row["peers"].values())
        assert 0 < row["ms"]["least"] <= row["ms"]["median"] <= row["ms"]["most"]
        assert row["roofline"] > 0 and row["bound"] in ("memory", "compute")
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
    for name, entry in entries.items():
        passes = {r["pass"] for r in found["rows"] if r["op"] == name}
        assert passes == ({"forward", "backward"} if entry.wanted else {"forward"})
    assert found["limits"].keys() == {"copy", "product", "fp8"} and min(found["limits"].values()) > 1e9
    printed = capsys.readouterr().out.splitlines()
    assert any("limits: copy" in line for line in printed)
    assert len([line for line in printed if "eager" in line and "%" in line]) == len(found["rows"])


def test_work_is_that_of_one_rank(bench, tmp_path):
    options = ("--ops", "gated_add", "attention", "--backends", "reference", "--peers", "--tokens", "720")
    _, found = run(bench, tmp_path, *options, "--sp", "1", "4", "8")
    rows = {(r["op"], r["pass"], r["sp"]): r for r in found["rows"]}
    width, heads, tokens, text = 512, 4, 720, 64
    for sp in (1, 4, 8):
        row = rows["gated_add", "forward", sp]
        assert row["shape"] == [1, tokens // sp, width] and row["flops"] == 0
        # The stream in float32 in and out, y in bfloat16; the gate in float32.
        assert row["bytes"] == tokens // sp * width * (4 + 2 + 4) + width * 4
        # d x' is d x, so it is read for dy and dgate, beside y; and both are written, and d x.
        assert rows["gated_add", "backward", sp]["bytes"] == (
            tokens // sp * width * (4 + 2 + 2 + 4) + 2 * width * 4
        )
    for sp in (1, 4):
        product = 2 * tokens * heads // sp * 128
        assert rows["attention, self", "forward", sp]["flops"] == 2 * product * tokens
        assert rows["attention, cross", "forward", sp]["flops"] == 2 * product * text
        assert rows["attention, self", "backward", sp]["flops"] == 5 * product * tokens
        assert rows["attention, self", "forward", sp]["shape"] == [1, tokens, heads // sp, 128]
    assert ("attention, self", "forward", 8) not in rows  # four heads do not go to eight ranks


BREAKS = {
    "value": lambda y: y * 1.01,
    "gradient": lambda y: y.detach() + 1.01 * (y - y.detach()),
    "NaN": lambda y: torch.where(y > 1, torch.nan, y),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_fails_its_gate_gets_no_time(bench, tmp_path, capsys, monkeypatch, broken):
    right = norm.gated_add
    monkeypatch.setattr(norm, "gated_add", lambda x, y, gate: right(x, BREAKS[broken](y), gate))
    code, found = run(bench, tmp_path, "--ops", "gated_add", "rms_norm", "--peers", "eager")
    assert code == 1
    assert {r["op"] for r in found["rows"]} == {"rms_norm"}
    (gate,) = [g for g in found["gates"] if (g["op"], g["backend"]) == ("gated_add", "reference")]
    assert gate["gate"] == "failed" and "want at most" in gate["why"]
    printed = capsys.readouterr().out
    assert "no times, since the gate failed: gated_add by reference" in printed
    assert not [line for line in printed.splitlines() if line.startswith("gated_add") and "%" in line]


def test_what_raises_fails_its_gate_and_the_rest_goes_on(bench, tmp_path, monkeypatch):
    def broken(x, weight, eps):
        raise RuntimeError("CUDA error: in a test\nmore lines")

    monkeypatch.setattr(qk_norm_rope, "rms_norm", broken)
    code, found = run(bench, tmp_path, "--ops", "gated_add", "rms_norm", "--peers", "eager")
    assert code == 1 and {r["op"] for r in found["rows"]} == {"gated_add"}
    gates = [g for g in found["gates"] if g["op"] == "rms_norm" and g["gate"] == "failed"]
    assert {g["why"] for g in gates} == {"RuntimeError: CUDA error: in a test"}


def test_nothing_is_timed_if_every_gate_fails(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(qk_norm_rope, "rms_norm", lambda x, weight, eps: x[:, :-1] * weight)
    monkeypatch.setattr(bench, "measure", None)
    code, found = run(bench, tmp_path, "--ops", "rms_norm")
    assert code == 1 and found["rows"] == []


@needs_triton
def test_predictions_are_labelled(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ledger_cuda, "collect", None)  # no CUDA kernel is compiled: none is asked for
    options = ["--predicted", "--ops", "modulate_fp8", "fp8_linear", "--model", "1.3B", "--tokens", "32760"]
    file = tmp_path / "found.json"
    assert bench.main([*options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert row["predicted"] is True and "peers" not in row and 0.5 < row["roofline"] <= 1
    assert (row["op"], row["backend"], row["shape"]) == ("modulate_fp8", "triton", [1, 32760, 1536])
    # A float32 stream in, e4m3 out with a float32 scale a token, and two vectors.
    assert row["bytes"] == 32760 * (1536 * (4 + 1) + 4) + 2 * 1536 * 4
    assert found["assumptions"] == ledger_rows.ASSUMPTIONS
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("modulate_fp8")]
    assert "predicted" in line and "Predicted for an H100 SXM, not measured" in printed
    assert "not in the ledger, which holds Triton kernels: fp8_linear" in printed


def test_the_ledger_knows_the_operations_by_these_names(bench):
    ops = {launch.op for launch in operations.LAUNCHES} - {"quantize_values"}  # a part of attention_fp8
    assert ops <= set(bench.ledger_names(bench.ENTRIES))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--ops", "nope"], "--ops: got nope, want one of modulate, layer_norm"),
        (["--backends", "cuda2"], "--backends: got cuda2, want one of"),
        (["--sp", "3"], "--sp: got 3, want one of 1, 2, 4, 8"),
        (["--no-small", "--tokens", "312"], "--tokens: got 312, want one of 32760, 75600"),
        (["--repeat", "0"], "--repeat: got 0, want 1 or more"),
        (["--predicted", "--sp", "2"], "--predicted: got --small, --sp or --dtype, want none"),
        (["--json", "nowhere/found.json"], "--json: got nowhere/found.json, want a file in a folder"),
    ],
)
def test_refusals_are_one_line(bench, capsys, options, words):
    assert bench.main(options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(words) and err.count("\n") == 1


def test_the_script_runs_by_itself():
    script = [sys.executable, str(BENCHMARKS / "bench_kernels.py"), "--ops", "nope"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("--ops: got nope")


def test_candidates_take_turns_and_may_run_out_of_memory(bench):
    from prfl_bench.timing import WARM_UP, measure

    order = []

    def candidate(name):
        def prepare():
            if name == "large":
                raise torch.OutOfMemoryError("in a test")
            return lambda: order.append(name)

        return prepare

    times = measure({name: candidate(name) for name in ("a", "large", "b")}, DEVICE, 3)
    assert order == ["a", "b"] * (WARM_UP + 3)
    assert times["large"] is None and times["a"].least <= times["a"].median <= times["a"].most
