"""The choice of attention on a CPU by what its processor has, with the probe played both ways."""

import pytest
import torch
from fused import error, normal, outputs_and_gradients

from prfl_bench.timing import machine
from prfl_kernels import dispatch, extension, processor
from prfl_kernels.attention import repeats as repeated
from prfl_kernels.attention.op import RECORDS, attention, attention_with_lse

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
AMX = frozenset({"avx512f", "amx_tile", "amx_bf16"})
why = extension.absence("cpu", "cpu")
built = pytest.mark.skipif(why is not None, reason="the C++ kernels are not built")


def test_a_machine_is_named_by_its_processor(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    told = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: Some CPU @ 3 GHz \nflags\t\t: a b\n"
    file.write_text(f"{told}\nprocessor\t: 1\n")
    monkeypatch.setattr(processor, "Path", lambda _: file)
    for known in (processor.name, processor.flags, processor.vendor):
        known.cache_clear()
    try:
        assert processor.name() == "Some CPU @ 3 GHz" and processor.flags() == {"a", "b"}
        assert processor.vendor() == "AuthenticAMD"
        assert machine("cpu").startswith("Some CPU @ 3 GHz (")
    finally:
        for known in (processor.name, processor.flags, processor.vendor):
            known.cache_clear()


@pytest.fixture
def play(monkeypatch):
    """A function that sets the processor's flags and the environment's limit."""

    def set_up(flags, **limits):
        monkeypatch.setattr(processor, "flags", lambda: flags)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in limits.items():
            monkeypatch.setenv(name, value)

    dispatch.configure("")
    yield set_up
    dispatch.configure("")


@pytest.mark.parametrize(
    "flags, limits, why",
    [
        (AMX, {}, None),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, None),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "avx512_core_amx"}, None),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX10_1_512_AMX_FP16"}, None),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "no such set"}, None),  # oneDNN takes it for no limit
        (AMX, {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, None),  # the first counts
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}, "ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 forbids AMX"),
        (AMX, {"DNNL_MAX_CPU_ISA": "avx2"}, "DNNL_MAX_CPU_ISA=AVX2 forbids AMX"),
        (AMX - {"amx_bf16"}, {}, "the processor has no AMX"),
        (frozenset(), {}, "the processor has no AMX"),
    ],
)
def test_whether_torchs_products_use_amx(play, flags, limits, why):
    play(flags, **limits)
    assert processor.amx_absence() == why


def test_without_onednn_nothing_uses_amx(play, monkeypatch):
    play(AMX)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert processor.amx_absence() == processor.bfloat16_absence() == "torch has no oneDNN"


@pytest.mark.parametrize(
    "flags, limit, why",
    [
        (AMX, "", None),
        ({"avx512_bf16"}, "", None),
        ({"avx512_bf16"}, "avx512_core_bf16", None),
        (AMX, "AVX10_1_512_AMX", None),
        ({"avx512_bf16"}, "ALL", None),
        ({"avx512_bf16"}, "AVX512_CORE_VNNI", "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI forbids bfloat16"),
        (AMX, "avx512_core", "ONEDNN_MAX_CPU_ISA=AVX512_CORE forbids bfloat16"),
        (AMX, "AVX2_VNNI", "ONEDNN_MAX_CPU_ISA=AVX2_VNNI forbids bfloat16"),
        ({"avx512f", "avx2"}, "", "the processor has neither AVX512-BF16 nor AMX"),
    ],
)
def test_whether_bfloat16_products_are_fast(play, flags, limit, why):
    play(frozenset(flags), ONEDNN_MAX_CPU_ISA=limit)
    assert processor.bfloat16_absence() == why


@built
def test_with_amx_torchs_own_attention_runs_in_bfloat16(play):
    play(AMX)
    for head_dim in (33, 128, 512):
        assert dispatch.default("attention", "cpu", BF16, head_dim) == ("sdpa", {})
    assert dispatch.default("attention", "cpu", F32, 128) == ("cpu", {})
    assert dispatch.default("attention", "cpu", F16)[0] == "sdpa"
    assert dispatch.default("attention", "cpu", torch.float64)[0] == "reference"
    play(AMX, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    assert dispatch.default("attention", "cpu", BF16, 128) == ("cpu", {})


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="the table names what runs on the GPU")
def test_doctor_gives_the_choice_and_its_reason(play):
    rows = {}
    for flags in (AMX, frozenset()):
        play(flags)
        (rows[flags],) = [row[1:] for row in dispatch.choices() if row[0] == "attention"]
    name, reason = rows[AMX]
    assert name == "sdpa" and reason.endswith("torch's bfloat16 products use AMX; in float32 cpu")
    name, reason = rows[frozenset()]
    assert name == "cpu" and reason.endswith("products do not use AMX: the processor has no AMX")


@pytest.mark.parametrize("repeats", [1, 449])
def test_forward_and_backward_run_what_was_chosen(play, monkeypatch, repeats):
    """On both sides, and the last key is not laid out."""
    play(AMX)
    seen, sdpa = [], RECORDS["sdpa"]

    def watched(run):
        return lambda *a: seen.append(a[1].shape[1]) or run(*a)

    watchers = dict(forward=watched(sdpa.forward), backward=watched(sdpa.backward))
    monkeypatch.setitem(RECORDS, "sdpa", sdpa._replace(**watchers))
    monkeypatch.setattr(repeated, "laid_out", None)
    q, k, v = (normal(2, n, 2, 32, dtype=BF16).cpu() for n in (80, 70, 70))
    got = outputs_and_gradients(lambda *a: attention_with_lse(*a, repeats=repeats), [q, k, v])
    assert len(seen) == 2 and seen[0] == 70
    dispatch.configure("attention=reference")
    exact = outputs_and_gradients(
        lambda *a: attention_with_lse(*a, repeats=repeats), [a.double() for a in (q, k, v)]
    )
    for a, b in zip(sum(got, []), sum(exact, []), strict=True):
        assert error(a, b) < 0.02  # roundings of 8 bits


def test_the_choice_is_made_under_compile_too(play):
    play(AMX)
    inputs = [normal(1, 9, 2, 16, dtype=BF16).cpu() for _ in range(3)]
    torch.compiler.reset()
    run = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*inputs), attention(*inputs))
