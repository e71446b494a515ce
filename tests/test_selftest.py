"""The doctor's self-test: complete, at the sizes that matter, able to fail, and no failure ends it."""

import json

import pytest
import torch
from fused import needs_triton

from prfl_bench import selftest as module
from prfl_bench.selftest import FAILED, RAN, REFUSED, Row, case, cases, run, selftest, summary
from prfl_engine.cli import main
from prfl_kernels import dispatch, extension, jit
from prfl_kernels.attention import libraries
from prfl_kernels.attention.op import RECORDS

OPERATIONS = dict(dispatch.OPERATIONS)
SMALL = "attention-cross/sdpa/float32/128x376x257"
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes and dtypes of a CPU")


@pytest.fixture
def attention_alone(monkeypatch):
    """One operation in one size: every other one is run by the tests of its own."""
    monkeypatch.setattr(dispatch, "OPERATIONS", {"attention": OPERATIONS["attention"]})
    sizes = module._sizes
    monkeypatch.setattr(module, "_sizes", lambda *a: list(sizes(*a))[:1])
    monkeypatch.setattr(module, "DTYPES", ((torch.float32, torch.float32),))
    monkeypatch.setattr(module, "SOME_DTYPES", {"attention, low scores": ()})


@pytest.fixture
def hopper(monkeypatch):
    """A machine whose torch sees an H100 and that has every library and compiled part; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(jit, "INTERPRETED", False)
    monkeypatch.setattr(extension, "absence", lambda part, device: None if part == device else "other device")
    monkeypatch.setattr(libraries, "_missing", lambda *needs: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


def break_sdpa(monkeypatch, change):
    backend = RECORDS["sdpa"]

    def forward(*inputs):
        out, lse = backend.forward(*inputs)
        return change(out), lse

    monkeypatch.setitem(RECORDS, "sdpa", backend._replace(forward=forward))


def test_every_operation_has_a_case():
    assert {o.op for o in module.OPERATIONS.values()} == set(OPERATIONS)


def test_names_are_unique_and_find_their_case():
    found = cases()
    assert len({c.name for c in found}) == len(found)
    assert not any(set(c.name) & set(" \t,") for c in found)
    assert {(c.op, c.implementation) for c in found} == {
        (op, name) for op, own in OPERATIONS.items() for name in own if name != dispatch.REFERENCE
    }
    assert case(found[-1].name) == found[-1]
    with pytest.raises(ValueError, match="^selftest: got case 'attention', want one of "):
        case("attention")


@needs_triton
def test_on_a_gpu_the_cases_reach_what_the_kernels_are_made_for(hopper):
    """Both sm_90a attention kernels, with every backward; templates and clusters; all dtypes claimed."""
    found = cases("cuda")
    assert all(module._refusal(c) is None for c in found if c.implementation != "cpu")
    sizes = {}
    for c in found:
        sizes.setdefault((c.op, c.implementation), set()).add(c.name.split("/")[-1])
    own = {"128x376x376", "128x1784x1784", "128x4216x257", "128x4216x512"}
    assert sizes["attention_fp8", "cuda"] >= own
    for name in ("cuda", "fa3", "cudnn", "triton"):
        assert sizes["attention", name] >= own | {"128x376x192"}, name
    assert {c.backward for c in found if c.op == "attention" and c.implementation == "cuda"} == set(
        RECORDS["cuda"].backwards
    )
    pairs = {(c.implementation, c.backward) for c in found if c.operation == module.LOW}
    assert {("cudnn", ""), ("cuda", "triton"), ("cuda", "fa3")} < pairs  # without cuDNN's own, which errs
    assert not {("cudnn", "cudnn"), ("cuda", "cudnn")} & pairs
    for op in ("modulate", "gated_add_norm", "qk_norm_rope", "reward_pool"):
        assert sizes[op, "cuda"] == {"384x1784", "1536x1784", "3072x1784", "5120x1784"}
    for length in (376, 1784):  # what the sequence of 480p leaves of every tile
        assert all(length % tile == 32_760 % tile for tile in (64, 128, 176))
    dtypes = {(c.implementation, c.dtype) for c in found if c.op == "attention"}
    assert {name for name, dtype in dtypes if dtype == torch.float16} >= {"fa2", "fa3", "cudnn", "triton"}
    assert ("cuda", torch.float16) not in dtypes and "64x376x376" not in sizes["attention", "cuda"]
    assert not any(c.dtype == torch.float16 for c in found if c.implementation == "cuda")


@pytest.mark.parametrize(
    "capability, cuda, why",
    [
        ((9, 0), "13.0", None),
        ((9, 0), "12.9", None),
        ((9, 0), "12.8", "it needs torch built with CUDA 12.9 or newer for float32 results, got 12.8"),
        ((10, 0), "13.0", "it has float32 results on capability 9 alone, got 10"),
        ((8, 9), "13.0", "it has float32 results on capability 9 alone, got 8"),
    ],
)
def test_row_scales_with_float32_results_are_refused_by_version(hopper, monkeypatch, capability, cuda, why):
    """The case stays in the list and says why; bfloat16 runs everywhere, and the default is plain torch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    own = [c for c in cases("cuda") if (c.op, c.implementation) == ("fp8_linear", "scaled_mm")]
    assert {c.dtype for c in own if module._refusal(c) is None} >= {torch.bfloat16}
    float32 = [c for c in own if c.dtype == torch.float32]
    assert len(float32) == (1 if why else 4)
    default, _ = dispatch.default("fp8_linear", "cuda", torch.float32)
    assert default == (dispatch.REFERENCE if why else "scaled_mm")
    if why:
        row = run(float32[0])
        assert (row.state, row.detail) == (REFUSED, why)


@on_cpu
def test_all_that_runs_here_is_run_and_good(attention_alone, monkeypatch):
    isas = extension.isas()[-2:] if extension.absence("cpu", "cpu") is None else [""]
    monkeypatch.setattr(extension, "isas", lambda: isas)
    rows = {row.implementation: row for row in selftest()}
    want = set(dispatch.OPERATIONS["attention"]) - {dispatch.REFERENCE, "cpu"}
    assert set(rows) == want | {f"cpu {isa}".strip() for isa in isas}
    assert rows["sdpa"].state == RAN and rows["sdpa"].error < 1, rows["sdpa"]
    assert all(row.state == (RAN if row.error is not None else REFUSED) for row in rows.values())
    assert not dispatch.configured()


@on_cpu
def test_what_does_not_run_says_why(attention_alone, monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: (None, "is not built: no compiler"))
    rows = {row.implementation: row for row in selftest()}
    assert rows["cpu"].state == REFUSED and "is not built: no compiler" in rows["cpu"].detail
    assert rows["fa3"].detail == rows["cuda"].detail == "it needs a cuda device"


@on_cpu
@pytest.mark.parametrize("change", [lambda a: a * 1.05, lambda a: a.roll(1, 1), lambda a: a * float("nan")])
def test_a_wrong_kernel_is_found(monkeypatch, change, capsys):
    break_sdpa(monkeypatch, change)
    row = run(case(SMALL))
    assert row.state == FAILED
    monkeypatch.setattr(module, "selftest", lambda: [row])
    assert main(["doctor", "--selftest"]) == 1
    assert f"{SMALL}  failed  error" in capsys.readouterr().out


@on_cpu
@pytest.mark.parametrize(
    "error",
    [RuntimeError("no image\nfor it"), AssertionError(), TypeError("no keyword"), ValueError("too few")],
)
def test_no_exception_ends_the_others(attention_alone, monkeypatch, error):
    def raises(*_):
        raise error

    break_sdpa(monkeypatch, raises)
    some = {name: RECORDS[name] for name in ("sdpa", "xformers", "fa3")}
    monkeypatch.setattr(dispatch, "OPERATIONS", {"attention": some})
    monkeypatch.setattr(dispatch, "_choice", "attention=reference")
    rows = {row.implementation: row for row in selftest()}
    assert dispatch.configured() == "attention=reference"
    message = (str(error).splitlines() or [""])[0]
    assert (rows["sdpa"].state, rows["sdpa"].detail) == (FAILED, f"{type(error).__name__}: {message}")
    assert rows["sdpa"].error is None and set(rows) == set(some)


def test_the_summary_counts_what_ran_and_names_what_failed():
    rows = [
        Row("a/x/1", "a", "x", RAN, "error 0.5 of the limit", 0.5, 1.0),
        Row("a/x/2", "a", "x", RAN, "error 0.25 of the limit", 0.25, 0.5),
        Row("a/x/3", "a", "x", FAILED, "TypeError: no", None, 0.1),
        Row("a/y/1", "a", "y", REFUSED, "it is not built", None, 0.0),
    ]
    assert summary(rows) == [
        ("a x", RAN, "2 cases, error 0.5 of the limit, 1.5 s"),
        ("a/x/3", FAILED, "TypeError: no"),
        ("a y", REFUSED, "it is not built"),
    ]


@on_cpu
def test_rows_are_plain_data(monkeypatch, capsys):
    rows = [run(case("attention-self/fa3/float32/128x376x376"))]
    monkeypatch.setattr(module, "selftest", lambda: rows)
    assert main(["doctor", "--selftest", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["selftest"]
    assert found == rows[0]._asdict() and found["state"] == REFUSED


def test_errors_are_relative_and_nan_is_infinite():
    a = torch.tensor([3.0, 4.0])
    assert module._error(a * 1.5, a) == 0.5
    assert module._error(a * float("nan"), a) == float("inf")
