"""Attention libraries behind attention(): every form of their signatures, and which of them are refused."""

import os
import sys
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import SimpleNamespace

import library_forms
import pytest
import torch
from fused import assert_as_good_as_torch, laid_out, normal
from library_forms import FA2, FA3, FA4, XFORMERS, by_schema, hub_package, install

from prfl_kernels import dispatch
from prfl_kernels.attention import hub, libraries
from prfl_kernels.attention.op import RECORDS, attention_with_lse
from prfl_kernels.attention.reference import backward as reference_backward
from prfl_kernels.attention.reference import forward as reference_forward

BF16 = torch.bfloat16
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """The probes see an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    yield
    dispatch.configure("")
    libraries._missing.cache_clear()
    hub.flash_attention_3.cache_clear()


def formula(repeats):
    """(out, lse) as the definition says, of a last key laid out that often, differentiated by autograd."""

    def run(q, k, v):
        q, k, v = (a.transpose(1, 2) for a in (q, laid_out(k, repeats), laid_out(v, repeats)))
        s = (q @ k.mT) * q.shape[-1] ** -0.5
        return (s.softmax(-1) @ v).transpose(1, 2), s.logsumexp(-1)

    return run


def check(monkeypatch, name, repeats, backward=""):
    """Values, gradients and the gradient of lse, which the libraries do not have themselves."""
    for chosen in filter(None, (name, backward)):
        probe = RECORDS[chosen].probe
        as_on_a_gpu = RECORDS[chosen]._replace(probe=lambda *_, probe=probe: probe("cuda", BF16))
        monkeypatch.setitem(RECORDS, chosen, as_on_a_gpu)
    dispatch.configure(f"attention={name}" + (f",attention_backward={backward}" if backward else ""))
    torch.manual_seed(6)
    inputs = [normal(2, n, 2, 16).cpu() for n in (37, 21, 21)]
    run, exact = partial(attention_with_lse, repeats=repeats), formula(repeats)
    assert_as_good_as_torch(run, inputs, exact)
    assert_as_good_as_torch(lambda *a: run(*a)[0], inputs, lambda *a: exact(*a)[0], [0, 1])


RUN = [
    *(("fa3", FA3, form) for form in ("2025-08", "2025-12")),
    *(("fa4", FA4, form) for form in ("2026-02", "2026-08", "with more results")),
    *(("fa2", FA2, form) for form in ("2.7", "2.7, as an operator of torch")),
    *(("xformers", XFORMERS, form) for form in XFORMERS),
]


@pytest.mark.parametrize("name, forms, form", RUN, ids=[f"{name} {form}" for name, _, form in RUN])
@pytest.mark.parametrize("repeats", [1, 5])
def test_libraries_in_every_form(name, forms, form, repeats, monkeypatch):
    install(monkeypatch, forms[form])
    check(monkeypatch, name, repeats)


NO_LSE = "flash_attn_func has no return_attn_probs: it may return no lse"


@pytest.mark.parametrize(
    "name, form, why",
    [
        ("fa3", FA3["2024-10"], NO_LSE),
        ("fa3", FA3["2025-04"], NO_LSE),
        ("fa3", FA3["2025-07"], NO_LSE),
        ("fa4", FA4["2026-01"], "flash_attn_func has no return_lse: it may return no lse"),
        ("fa2", FA2["2.6"], "_flash_attn_backward has no window_size_left: want version 2.7 or later"),
    ],
)
def test_a_form_without_lse_or_of_another_backward_is_absent(name, form, why, monkeypatch):
    install(monkeypatch, form)
    assert why in dispatch.absence("attention", name, "cuda", BF16)


# Hugging Face's kernel hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with an older revision, a newer one, and one of which only the card was fetched."""
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    revisions = tmp_path / "kernels--kernels-community--flash-attn3" / "snapshots"
    for age, revision in enumerate(("newer", "older")):
        build = revisions / revision / "build" / "torch-stable-abi29-cu128-x86_64-linux"
        build.mkdir(parents=True)
        (build / "__init__.py").touch()
        os.utime(revisions / revision, (1000 - age, 1000 - age))
    (revisions / "card").mkdir()
    return revisions


def test_a_cached_build_of_the_hub_runs(cache, monkeypatch):
    install(monkeypatch, hub_package(FA3["2025-12"]))
    monkeypatch.setitem(sys.modules, library_forms.__name__, library_forms)  # restored after the fake
    assert hub._snapshot() == cache / "newer"
    check(monkeypatch, "fa3_hub", 3)


def test_the_order_on_cuda_has_the_hubs_build_after_the_own_package(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, library_forms.__name__, library_forms)
    install(monkeypatch, {**hub_package(FA3["2025-12"]), **FA3["2025-08"]})
    assert dispatch.default("attention", "cuda", BF16)[0] == "fa3"
    install(monkeypatch, FA3["2025-07"])
    assert dispatch.default("attention", "cuda", BF16)[0] == "fa3_hub"


def test_without_a_build_in_the_cache_it_says_how_to_get_one_and_fetches_nothing(tmp_path, monkeypatch):
    install(monkeypatch, hub_package(FA3["2025-12"]))
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    why = dispatch.absence("attention", "fa3_hub", "cuda", BF16)
    assert f"no build of {hub.REPOSITORY} in {tmp_path}" in why and "get_kernel" in why and "\n" not in why


def test_a_build_for_another_machine_or_an_old_package_is_absent(cache, monkeypatch):
    install(monkeypatch, hub_package(FA3["2025-12"], old=True))
    assert "too old, want 0.14" in dispatch.absence("attention", "fa3_hub", "cuda", BF16)
    for build in cache.glob("*/build/*"):
        build.rename(build.with_name("tvm-ffi"))
    install(monkeypatch, hub_package(FA3["2025-12"]))
    why = dispatch.absence("attention", "fa3_hub", "cuda", BF16)
    assert "Cannot find a build variant" in why and why.endswith("newer: Torch version (2.9) ...")


def test_this_projects_own_folder_is_not_taken_for_the_package(monkeypatch):
    """Python started in the checkout finds the folder kernels/ where the package is not installed."""
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    monkeypatch.setitem(sys.modules, "kernels", module_from_spec(spec))
    why = dispatch.absence("attention", "fa3_hub", "cuda", BF16)
    assert why.startswith(f"{hub.REPOSITORY}: not installed: pip install kernels")


# cuDNN


def fake_cudnn(monkeypatch):
    """torch's two operators for cuDNN, by their schemas, played by plain torch on [B, H, L, D]."""
    aten = torch.ops.aten

    def forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale, **_):
        assert attn_bias is None and compute_log_sumexp and not dropout_p and not is_causal
        out, lse = reference_forward(*(a.transpose(1, 2) for a in (query, key, value)), scale)
        return out.transpose(1, 2), lse[..., None], None, None, 0, 0, None, None, None

    def backward(grad_out, query, key, value, out, logsumexp, attn_bias, max_q, max_k, scale, **_):
        assert attn_bias is None and (max_q, max_k) == (query.shape[2], key.shape[2])
        q, k, v, out, dout = (a.transpose(1, 2) for a in (query, key, value, out, grad_out))
        made = reference_backward(dout, None, q, k, v, out, logsumexp[..., 0], scale)
        return [a.transpose(1, 2) for a in made]

    name = "_scaled_dot_product_cudnn_attention"
    runs = {name: forward, f"{name}_backward": backward}
    played = {name: by_schema(getattr(aten, name), run) for name, run in runs.items()}
    monkeypatch.setattr(libraries, "aten", SimpleNamespace(**played))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.mark.parametrize("repeats", [1, 5])
def test_cudnn_is_called_by_its_schema(repeats, monkeypatch):
    fake_cudnn(monkeypatch)
    check(monkeypatch, "cudnn", repeats, backward="cudnn")


def facts(dim=128):
    return SimpleNamespace(dtype=BF16, device=torch.device("cuda"), shape=(1, 9, 2, dim))


@pytest.mark.parametrize(
    "capability, version, forward, backward",
    [
        ((9, 0), 91002, "triton", "triton"),
        ((9, 0), 91800, "cudnn", "triton"),
        ((9, 0), 92600, "cudnn", "triton"),
        ((8, 0), 91002, "cudnn", "cudnn"),
        ((10, 0), 91002, "cudnn", "cudnn"),
    ],
)
def test_cudnn_is_no_default_where_it_errs(capability, version, forward, backward, monkeypatch):
    """On Hopper: its backward in no version, its forward from 9.18 on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    triton = RECORDS["triton"]._replace(probe=dispatch.requires(head_dims=(128,)))
    monkeypatch.setitem(RECORDS, "triton", triton)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    libraries._missing.cache_clear()
    name, passed = dispatch.default("attention", "cuda", BF16, 128)
    assert name == forward and ("cudnn" in passed) == (forward == "triton")
    assert dispatch.backward_of("attention", facts(), name) == backward
    assert dispatch.backward_of("attention", facts(), "cudnn") == backward
    other = "sdpa" if backward == "triton" else "cudnn"
    assert dispatch.backward_of("attention", facts(80), "cudnn") == other
    dispatch.configure("attention=cudnn,attention_backward=cudnn")  # by name it runs everywhere
    assert dispatch.implementation("attention", facts()) == "cudnn"
    assert dispatch.backward_of("attention", facts()) == "cudnn"


# Our CUDA C++ forward, which has no backward of its own


@pytest.mark.parametrize("backward", ["fa3", "cudnn", "triton"])
def test_the_cuda_forward_pairs_with_the_backward_of_others(backward, monkeypatch):
    """Played by plain torch, in both directions the contract of the launchers."""
    install(monkeypatch, FA3["2025-12"])
    fake_cudnn(monkeypatch)
    cuda = RECORDS["cuda"]._replace(forward=reference_forward, probe=lambda *_: None)
    monkeypatch.setitem(RECORDS, "cuda", cuda)
    if backward == "triton":
        triton = RECORDS["triton"]._replace(backward=reference_backward, probe=lambda *_: None)
        monkeypatch.setitem(RECORDS, "triton", triton)
    seen, run = [], RECORDS[backward].backward
    watched = RECORDS[backward]._replace(backward=lambda *a: seen.append(a) or run(*a))
    monkeypatch.setitem(RECORDS, backward, watched)
    probe = RECORDS[backward].probe
    monkeypatch.setitem(RECORDS, backward, watched._replace(probe=lambda *_: probe("cuda", BF16)))
    dispatch.configure(f"attention=cuda,attention_backward={backward}")
    torch.manual_seed(6)
    inputs = [normal(2, n, 2, 16).cpu() for n in (37, 21, 21)]
    assert_as_good_as_torch(attention_with_lse, inputs, formula(1))
    assert seen


def test_the_default_backward_is_found_under_compile_too(monkeypatch):
    """fa3 and cudnn do not run on a CPU; what follows in the list does."""
    cuda = RECORDS["cuda"]._replace(forward=reference_forward, probe=lambda *_: None)
    seen = []
    triton = RECORDS["triton"]._replace(
        backward=lambda *a: seen.append(a) or reference_backward(*a), probe=lambda *_: None
    )
    monkeypatch.setitem(RECORDS, "cuda", cuda)
    monkeypatch.setitem(RECORDS, "triton", triton)
    dispatch.configure("attention=cuda")
    torch.compiler.reset()
    compiled = torch.compile(attention_with_lse, fullgraph=True, backend="aot_eager")
    assert_as_good_as_torch(compiled, [normal(1, n, 1, 16).cpu() for n in (5, 7, 7)], formula(1))
    assert seen


def test_the_doctor_shows_both_choices_with_their_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    monkeypatch.setitem(RECORDS, "triton", RECORDS["triton"]._replace(probe=lambda *_: None))
    install(monkeypatch, FA3["2025-07"])
    for name in ("flash_attn", "flash_attn.cute", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    assert row[1] == "cudnn" and f"; fa3 flash_attn_interface: {NO_LSE}" in row[2]
    shown = row[2].split("backward by ")[1]
    assert shown.startswith("triton (cudnn makes NaN of rows with an lse below -88.7 on Hopper")
    assert f"fa3 flash_attn_interface: {NO_LSE}" in shown
    dispatch.configure("attention=cudnn,attention_backward=cudnn")
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    assert "backward by cudnn (cudnn makes NaN" in row[2] and "chosen by configuration" in row[2]
