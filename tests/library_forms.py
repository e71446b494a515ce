"""Attention libraries played by plain torch, with the signatures of their sources, form by form.

Sources: Dao-AILab/flash-attention (hopper/flash_attn_interface.py, flash_attn/flash_attn_interface.py,
flash_attn/cute/interface.py) and facebookresearch/xformers (xformers/ops/fmha/__init__.py), by the dates of
the commits that changed a signature.
"""

import inspect
import sys
from types import ModuleType

import torch
from torch import Tensor

from prfl_kernels.attention import hub, libraries
from prfl_kernels.attention.reference import backward as reference_backward
from prfl_kernels.attention.reference import forward as reference_forward


def install(monkeypatch, modules):
    """Have `modules` {name: {attribute: value}} imported in place of what is installed."""
    libraries._missing.cache_clear()
    hub.flash_attention_3.cache_clear()
    for name, attributes in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def flash(q, k, v, scale):
    return reference_forward(q, k, v, scale)


def into(buffers, dout, q, k, v, out, lse, scale):
    for buffer, a in zip(buffers, reference_backward(dout, None, q, k, v, out, lse, scale), strict=True):
        buffer.copy_(a)
    return lse.clone()  # softmax_d


# FlashAttention-3


def _fa3_func(result):
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, sm_margin=0,
    ):  # fmt: skip
        return result(*flash(q, k, v, softmax_scale))

    return flash_attn_func


def _fa3_keyword_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    out, lse = flash(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out


def _fa3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    lengths = cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k
    assert (*lengths, causal) == (*[None] * 6, False)
    return dq, dk, dv, into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)


@torch.library.custom_op("prfl_fake_fa3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _fa3_operator(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    assert not is_causal
    return into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)


def _fa3_first_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
                    descale_q=None, descale_k=None, descale_v=None, gqa_parallel=False):  # fmt: skip
    return flash(q, k, v, softmax_scale)


def _fa3_first_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, window_size, deterministic=False
):
    return dq, dk, dv, into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)


def _fa3(func, backward):
    return {"flash_attn_interface": {"flash_attn_func": func, "_flash_attn_backward": backward}}


FA3 = {
    "2024-10": _fa3(_fa3_first_func, _fa3_first_backward),
    "2025-04": _fa3(_fa3_func(lambda out, lse: (out, lse)), _fa3_backward),
    "2025-07": _fa3(_fa3_func(lambda out, lse: out), _fa3_backward),
    "2025-08": _fa3(_fa3_keyword_func, _fa3_backward),
    "2025-12": _fa3(_fa3_keyword_func, _fa3_operator),
}


# FlashAttention-4


def _fa4_beta_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, full_block_cnt=None, full_block_idx=None,
    mask_block_cnt=None, mask_block_idx=None, block_size=None,
):  # fmt: skip
    return flash(q, k, v, softmax_scale)[0], None  # lse where the inputs require grad


def _fa4_lse_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, full_block_cnt=None, full_block_idx=None,
    mask_block_cnt=None, mask_block_idx=None, block_size=None, return_lse=False,
):  # fmt: skip
    assert return_lse
    return flash(q, k, v, softmax_scale)


def _fa4_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    assert return_lse and qv is gather_kv_indices is None
    return flash(q, k, v, softmax_scale)


def _fa4_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
    num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2,
    AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
    seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    return reference_backward(dout, None, q, k, v, out, lse, softmax_scale)


def _fa4_sink_bwd(*args, **options):
    return *_fa4_bwd(*args, **options), None


def _fa4(func, backward):
    return {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": func},
        "flash_attn.cute.interface": {"_flash_attn_bwd": backward},
    }


FA4 = {
    "2026-01": _fa4(_fa4_beta_func, _fa4_bwd),
    "2026-02": _fa4(_fa4_lse_func, _fa4_bwd),
    "2026-08": _fa4(_fa4_func, _fa4_bwd),
    "with more results": _fa4(_fa4_func, _fa4_sink_bwd),
}


# FlashAttention-2


def _fa2_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert return_attn_probs
    return *flash(q, k, v, softmax_scale), None


def _fa2_pair_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
    alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    return dq, dk, dv, into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    return into((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale)


_fa2_operator = torch.library.custom_op(
    "prfl_fake_fa2::_flash_attn_backward", _fa2_backward, mutates_args=("dq", "dk", "dv")
)


def _fa2(backward):
    return {
        "flash_attn": {"flash_attn_func": _fa2_func},
        "flash_attn.flash_attn_interface": {"_flash_attn_backward": backward},
    }


FA2 = {
    "2.6": _fa2(_fa2_pair_backward),
    "2.7": _fa2(_fa2_backward),
    "2.7, as an operator of torch": _fa2(_fa2_operator),
}


# xformers


def _xformers(padded):
    """Its CUTLASS kernel pads lse to a multiple of 32 queries and its backward pads it again."""

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        out, lse = flash(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32)) if padded else lse

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert lse.shape[2] == query.shape[1]
        return reference_backward(grad, None, query, key, value, output, lse, scale)

    return {
        "xformers": {},
        "xformers.ops": {
            "memory_efficient_attention_forward_requires_grad": forward,
            "memory_efficient_attention_backward": backward,
        },
    }


XFORMERS = {"padded lse": _xformers(True), "plain lse": _xformers(False)}


# Hugging Face's kernels


def hub_package(form, old=False):
    """The package `kernels` of which `get_local_kernel` imports a form of FlashAttention-3."""
    interface = form["flash_attn_interface"]
    (func,) = (value for name, value in interface.items() if name == "flash_attn_func")

    def get_local_kernel(repo_path, *, backend=None, trust_remote_code=False, user_agent=None):
        if not list(repo_path.glob("build/torch-*/__init__.py")):
            raise FileNotFoundError(f"Cannot find a build variant in {repo_path}:\n\nTorch version (2.9) ...")
        loaded, inside = ModuleType("_flash_attn3_build"), ModuleType(func.__module__)
        vars(inside).update(interface)
        sys.modules[func.__module__] = inside
        loaded.flash_attn_func = func
        return loaded

    def first_get_local_kernel(repo_path, package_name, backend=None):
        raise AssertionError("not to be called")

    get = first_get_local_kernel if old else get_local_kernel
    return {"kernels": {"__file__": "kernels/__init__.py", "get_local_kernel": get}}


# cuDNN through torch


def by_schema(operator, run):
    """`run` as a function with the arguments and defaults of one of torch's operators."""
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    schema = operator.default._schema
    signature = inspect.Signature([
        inspect.Parameter(
            a.name, kinds[a.kwarg_only],
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in schema.arguments
    ])  # fmt: skip

    def call(*args, **options):
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        return run(**bound.arguments)

    return call
