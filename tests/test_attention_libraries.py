"""Which implementation attention and its backward get, and what the libraries' versions return."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_cases import BF16, CPU, literal, qkv
from fused import assert_as_good_as_torch, needs_triton, outputs_and_gradients

from prfl_kernels import dispatch, jit, processor
from prfl_kernels.attention import libraries
from prfl_kernels.attention.op import RECORDS, attention, attention_with_lse
from prfl_kernels.attention.reference import backward as reference_backward
from prfl_kernels.attention.reference import forward as reference_forward


@pytest.fixture(autouse=True)
def default_table():
    yield
    dispatch.configure("")
    libraries._missing.cache_clear()


# The libraries, played by plain torch


def flash(q, k, v, softmax_scale=None):
    return reference_forward(q, k, v, softmax_scale)


def into(buffers, dout, q, k, v, out, lse, scale):
    for buffer, a in zip(buffers, reference_backward(dout, None, q, k, v, out, lse, scale), strict=True):
        buffer.copy_(a)


def fa3(new):
    def func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        made = flash(q, k, v, softmax_scale)
        return made if return_attn_probs else made[0]

    def old_func(q, k, v, softmax_scale=None, causal=False):
        return flash(q, k, v, softmax_scale)

    def backward(
        dout, q, k, v, out, softmax_lse, cu_q=None, cu_k=None, sequed_q=None, sequed_k=None, max_q=None,
        max_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, deterministic=False,
    ):  # fmt: skip
        assert (cu_q, cu_k, sequed_q, sequed_k, max_q, max_k, is_causal) == (*[None] * 6, False)
        into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)

    return {
        "flash_attn_interface": {
            "flash_attn_func": func if new else old_func, "_flash_attn_backward": backward
        }
    }  # fmt: skip


def fa4(extra):
    def func(q, k, v, softmax_scale=None, return_lse=False):
        assert return_lse
        return flash(q, k, v, softmax_scale)

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, deterministic=False):
        made = reference_backward(dout, None, q, k, v, out, lse, softmax_scale)
        return (*made, None) if extra else made

    return {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": func},
        "flash_attn.cute.interface": {"_flash_attn_bwd": backward},
    }


def fa2():
    def func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        assert return_attn_probs
        return (*flash(q, k, v, softmax_scale), None)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)

    return {
        "flash_attn": {"flash_attn_func": func},
        "flash_attn.flash_attn_interface": {"_flash_attn_backward": backward},
    }


def xformers(padded):
    """The CUTLASS kernel pads lse to a multiple of 32 queries and the backward pads it again."""

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None):
        out, lse = flash(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32)) if padded else lse

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None):
        assert lse.shape[2] == query.shape[1]
        return reference_backward(grad, None, query, key, value, output, lse, scale)

    return {
        "xformers": {},
        "xformers.ops": {
            "memory_efficient_attention_forward_requires_grad": forward,
            "memory_efficient_attention_backward": backward,
        },
    }


def install(monkeypatch, modules):
    libraries._missing.cache_clear()
    for name, attributes in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


LIBRARIES = {
    "fa3": [fa3(True), fa3(False)],
    "fa4": [fa4(True), fa4(False)],
    "fa2": [fa2()],
    "xformers": [xformers(True), xformers(False)],
}


@pytest.mark.parametrize(
    "name, modules", [(name, form) for name, forms in LIBRARIES.items() for form in forms]
)
@pytest.mark.parametrize("repeats", [1, 5])
def test_libraries_in_every_form(name, modules, repeats, monkeypatch):
    """Values, gradients and the gradient of lse, which these libraries do not have themselves."""
    install(monkeypatch, modules)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    probe = RECORDS[name].probe  # as on a GPU
    backend = RECORDS[name]._replace(probe=lambda *_: probe("cuda", BF16))
    monkeypatch.setitem(RECORDS, name, backend)
    dispatch.configure(f"attention={name}")
    torch.manual_seed(6)
    inputs = [a.cpu() for a in qkv(2, 37, 21, 2, 16)]
    run, exact = partial(attention_with_lse, repeats=repeats), literal(repeats)
    assert_as_good_as_torch(run, inputs, exact)
    assert_as_good_as_torch(lambda *a: run(*a)[0], inputs, lambda *a: exact(*a)[0], [0, 1])


def on_cuda(monkeypatch, major=9):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    libraries._missing.cache_clear()


def test_the_default_on_cuda_is_the_first_that_runs(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(jit, "triton", jit)
    name, passed = dispatch.default("attention", "cuda", BF16)
    assert name == "triton" and list(passed) == ["fa3", "fa4", "cudnn", "fa2"]
    assert "flash_attn_interface" in passed["fa3"] and passed["cudnn"] == "torch has no cuDNN"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert dispatch.default("attention", "cuda", BF16)[0] == "cudnn"
    install(monkeypatch, fa4(True))
    assert dispatch.default("attention", "cuda", BF16)[0] == "fa4"
    install(monkeypatch, fa3(True))
    assert dispatch.default("attention", "cuda", BF16)[0] == "fa3"
    assert dispatch.default("attention", "cuda", torch.float32)[0] == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    name, passed = dispatch.default("attention", "cuda", BF16)
    assert (name, passed) == ("fa4", {"fa3": "needs capability 9.0, got 10.0"})


def test_the_default_backward_of_the_cuda_forward_is_the_first_that_runs(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(jit, "triton", jit)
    x = SimpleNamespace(dtype=BF16, device=torch.device("cuda"), shape=(1, 9, 2, 128))
    assert dispatch.backward_of("attention", x, "cuda") == "triton"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert dispatch.backward_of("attention", x, "cuda") == "cudnn"
    install(monkeypatch, fa3(True))
    assert dispatch.backward_of("attention", x, "cuda") == "fa3"
    assert dispatch.backward_of("attention", x) == dispatch.implementation("attention", x) == "fa3"
    assert all(dispatch.backward_of("attention", x, name) == name for name in RECORDS if name != "cuda")
    dispatch.configure("attention=cuda,attention_backward=triton")
    assert dispatch.backward_of("attention", x, "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    assert row[1] == "cuda" and "backward by triton" in row[2]


@needs_triton
def test_without_any_backward_that_fits_the_cuda_forward_is_refused(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(jit, "INTERPRETED", False)
    monkeypatch.setattr(jit, "triton", None)
    x = SimpleNamespace(dtype=BF16, device=torch.device("cuda"), shape=(1, 9, 2, 128))
    want = "kernels: attention_backward got triton on cuda: it triton is not installed"
    with pytest.raises(ValueError, match=want):
        dispatch.backward_of("attention", x, "cuda")


@needs_triton
@pytest.mark.parametrize("forward", ["reference", "triton", CPU, "sdpa"])
@pytest.mark.parametrize("backward", ["reference", "triton", CPU, "sdpa"])
def test_any_backward_follows_any_forward(forward, backward, monkeypatch):
    """The gradients of out and lse, by the backward that was chosen and no other; and under compile."""
    if torch.cuda.is_available():
        pytest.skip("torch's flash attention on a GPU has no float32")
    seen, run = [], RECORDS[backward].backward
    watched = RECORDS[backward]._replace(backward=lambda *a: seen.append(backward) or run(*a))
    monkeypatch.setitem(RECORDS, backward, watched)
    dispatch.configure(f"attention={forward},attention_backward={backward}")
    torch.manual_seed(10)
    inputs = qkv(1, 37, 21, 2, 16)
    assert_as_good_as_torch(partial(attention_with_lse, repeats=3), inputs, literal(3))
    assert seen
    seen.clear()
    torch.compiler.reset()
    outputs_and_gradients(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs)
    assert seen


def test_a_backward_is_chosen_by_name():
    with pytest.raises(ValueError, match="^kernels: got 'cuda' for attention_backward, want one of ref"):
        dispatch.configure("attention_backward=cuda")
    q, k, v = qkv(1, 3, 4, 1, 16)
    with pytest.raises(ValueError, match="^attention: got backward 'cuda', want one of reference, "):
        torch.ops.prfl.attention(q, k, v, 0.25, "reference", 1, "cuda")
    if not torch.cuda.is_available():
        dispatch.configure("attention_backward=fa3")
        with pytest.raises(ValueError, match="attention_backward got fa3 on cpu: it needs a cuda device"):
            dispatch.check("cpu")


def test_the_default_on_the_cpu(monkeypatch):
    monkeypatch.setattr(processor, "amx_absence", lambda: "the processor has no AMX")
    why = dispatch.absence("attention", "cpu", "cpu")
    assert dispatch.default("attention", "cpu", BF16) == (("sdpa", {"cpu": why}) if why else ("cpu", {}))
    assert dispatch.default("attention", "cpu", torch.float16)[0] == "sdpa"
    assert dispatch.default("attention", "cpu", torch.float64)[0] == "reference"


def test_a_reason_is_kept_and_named(monkeypatch):
    """Broken builds and versions that do not fit, asked once."""
    on_cuda(monkeypatch)
    install(monkeypatch, {"flash_attn_interface": {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="attention got fa3 on cuda: it flash_attn_interface: .*attn_func"):
        dispatch.configure("attention=fa3")
        dispatch.check("cuda")
    install(monkeypatch, fa3(True))
    dispatch.check("cuda")
    calls = []
    libraries._missing.cache_clear()
    monkeypatch.setattr(
        libraries, "import_module", lambda name: calls.append(name) or SimpleNamespace()
    )
    for _ in range(3):
        assert dispatch.absence("attention", "fa3", "cuda", BF16)
    assert calls == ["flash_attn_interface"]


def test_what_was_chosen_and_cannot_run_raises():
    if not torch.cuda.is_available():
        for name in ("fa3", "cudnn", "xformers"):
            dispatch.configure(f"attention={name}")
            with pytest.raises(ValueError, match=f"attention got {name} on cpu: it needs a cuda device"):
                attention(*qkv(1, 3, 3, 1, 16))
    dispatch.configure("attention=sdpa")
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    assert row[1] == "sdpa" and row[2].endswith("chosen by configuration or PRFL_KERNELS")


def test_doctor_names_every_better_one_and_why_not(monkeypatch):
    on_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (row,) = [row for row in dispatch.choices() if row[0] == "attention"]
    for name in ("fa3", "fa4", "cudnn", "fa2"):
        assert f"; {name} " in row[2]
