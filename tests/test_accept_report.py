"""What an acceptance run reports: claims and their verdicts, README's tables, proposed constants."""

import json
import re
from pathlib import Path

import pytest

from prfl_bench.accept import claims, constants, readme, report
from prfl_bench.accept.results import Results, newest, read
from prfl_bench.accept.row import FAILED, RAN, REFUSED
from prfl_engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def timed(name: str, backend: str, ms: float, **more) -> dict:
    return {
        "op": "", "operation": "modulate", "pass": name, "backend": backend,
        "ms": {"median": ms, "least": ms, "most": ms}, "flops": 1,
        "tflop_per_s": 22_000 / ms, "gb_per_s": 2000 / ms, "roofline": 0.5, "peers": {},
    } | more  # fmt: skip


def gpu_results(cudnn=60.0, size=15e9, waits=0, graphs=1.5, product=8e14, persistent=3.0) -> Results:
    def result(name, state=RAN, **values):
        return {
            "name": name,
            "stage": name.split("/")[0],
            "state": state,
            "detail": "<b>",
            "seconds": 1.0,
            "values": values,
        }

    def self_attention(backend, ms):
        rows = [timed("forward", backend, ms), timed("backward", backend, 2 * ms)]
        return result(f"attention/self/14B/32760/{backend}", rows=rows)

    peers = {"compile": {"ms": 2.0, "ratio": 2.0}}
    made = [
        result("environment/machine", operations=[{"op": "attention", "implementation": "cudnn"},
               {"op": "modulate", "implementation": "triton"}], driver="580.1",
               attention={"forward": "cudnn", "backward": "cudnn"}),
        result("environment/rates", product=product, copy=4.2e12, fp8=1.5e15),
        result("correct/modulate/cuda/a", error=0.5), result("correct/modulate/triton/a", FAILED, error=2.0),
        self_attention("cudnn", cudnn), self_attention("triton", 50.0),
        result("memory/modulate/14B/32760", rows=[timed("forward", "triton", 1.0, peers=peers),
               timed("forward", "cuda", 0.9, peers=peers)]),
        result("tiles/norms/x", kernel="add_norm forward", key=[8192], default=[8, 528], best=[16, 264],
               timed=True),
        result("step/predicted/1.3B/attention", bytes=15.5e9, seconds=4.0, host=0),
        result("step/1.3B/attention", bytes=size, seconds=4.1, step=4.2, waits=waits),
        result("step/1.3B/persistent", bytes=15e9, seconds=persistent, step=3.1, waits=0),
        result("graphs/1.3B/1560", gain=graphs),
        result("sanitizer/memcheck", REFUSED),
    ]  # fmt: skip
    machine = {"device": "cuda", "name": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "sources": "abc"}
    return Results(machine, "2026-01-02", {r["name"]: r for r in made}, {"graphs/1.3B/32760": "no time left"})


def verdict_of(results: Results, text: str) -> str:
    (found,) = (v.verdict for v in claims.verdicts(results) if text in v.text)
    return found


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text[:40])
def test_claims_stand_where_they_are_said_to(claim):
    assert claim.text in " ".join((ROOT / claim.file).read_text().split())


@pytest.mark.parametrize(
    "text, change",
    [
        ("Attention is the first", dict(cudnn=40.0)), ("| 1.3B | 32,760", dict(size=20e9)),
        ("A step reads nothing", dict(waits=3)), ("rollout.cuda_graph`: for few", dict(graphs=0.9)),
        ("assumptions are printed below the table", dict(product=7e14)),
        ("costs no forward without gradient", dict(persistent=4.2)),
    ],
)  # fmt: skip
def test_a_claim_is_judged_by_what_was_measured(text, change):
    plain, other = verdict_of(gpu_results(), text), verdict_of(gpu_results(**change), text)
    assert {plain, other} == {claims.HOLDS, claims.FAILS}


def test_claims_without_a_measurement_say_so():
    assert verdict_of(gpu_results(), "LoRA of rank 128") == claims.UNKNOWN
    assert verdict_of(gpu_results(), "has run on a GPU yet") == claims.FAILS


def test_a_report_of_a_gpu_has_everything_and_can_be_read_again(tmp_path):
    page, held, proposals, _ = report.write(tmp_path, gpu_results())
    assert held.name == "2026-01-02-nvidia-h200.json" and read(held) == gpu_results()
    text = page.read_text()
    for part in (
        "NVIDIA H200", "What went wrong", "correct/modulate/triton/a", "does not hold", "Default back ends",
        "Tiles that beat the constants", "Not run (1)", "&lt;b&gt;", "<span class=bad>0/1</span>",
    ):  # fmt: skip
        assert part in text, part
    assert len(re.findall("<table", text)) == len(re.findall("<div class=box>", text))
    kept = json.loads(proposals.read_text())
    assert kept["choices"] == [{"kernel": "add_norm forward", "key": [8192], "choice": [16, 264]}]
    found = {d["op"]: (d["now"], d["best"]) for d in kept["defaults"]}
    assert found == {
        "attention forward": ("cudnn", "triton"), "attention backward": ("cudnn", "triton"),
        "modulate": ("triton", "cuda"),
    }  # fmt: skip
    assert constants.proposed(gpu_results())["gpu"] == "NVIDIA H200"


def test_readme_has_the_tables_of_the_newest_results(tmp_path):
    text = readme.README.read_text()
    assert text == readme.rewritten(text, newest())
    if newest() is None:
        assert "predicted" in readme.section(None) and "Measured" not in readme.section(None)
    report.write(tmp_path, gpu_results())
    made = readme.rewritten(text, newest(tmp_path))
    assert "Measured on one NVIDIA H200, torch 2.11, 2026-01-02." in made
    assert "| cudnn | 367 / 183 |" in made and "| modulate | 1 | 0.9 | 2 | 2,222 |" in made
    assert "| 1.3B/attention | 15 | 15.5 | 4.1 | 4 |" in made and "predicted from" not in made


def test_results_of_a_cpu_do_not_get_into_readme(tmp_path):
    results = gpu_results()
    report.write(tmp_path, results._replace(machine=results.machine | {"device": "cpu", "name": "CPU"}))
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match="got results of a CPU"):
        readme.main([str(tmp_path / "2026-01-02-cpu.json")])
