"""Attention by FlashAttention 2 to 4, cuDNN, xformers and torch's own (SDPA), by the contract in `op`.

None of them has a gradient of lse, and only torch's CPU kernel, by its mask, has a last key that counts
several times; both are added here. The caller gives rows of unit stride: torch's flash attention for the CPU
reads others as if they were.

Optional packages are imported when they are first asked for; a probe keeps the reason of a failure. A `Need`
says which form of a package is wanted, by an argument that older forms lack:

- FlashAttention-3 has had `return_attn_probs` since 2025-08-29. From 2025-07-11 on it returned `out` alone;
  before, out and lse, by the same signature. With that argument its backward takes the softmax scale and the
  causal flag as arguments 16 and 17, under two names.
- FlashAttention-4 has had `return_lse` since 2026-02-26. Without, it has no lse where autograd is off.
- FlashAttention-2 has had `window_size_left` in its backward since 2.7; older forms have a pair of numbers.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.attention import hub
from prfl_kernels.attention.repeats import backward_with_repeats, forward_with_repeats
from prfl_kernels.dispatch import Implementation, requires
from prfl_kernels.extension import device_type

HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


FA3, FA3_HUB = "flash_attn_interface", hub.REPOSITORY  # two sources of one module


def _module(name: str) -> ModuleType:
    return hub.flash_attention_3() if name == FA3_HUB else import_module(name)


def _flash_forward(module, q, k, v, scale):
    """Of FlashAttention-2 and -3."""
    flash = _module(module).flash_attn_func
    out, lse, *_ = flash(q, k, v, softmax_scale=scale, return_attn_probs=True)
    return out, lse


def _fa3_backward(module, dout, q, k, v, out, lse, scale):
    made = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in (q, k, v)]
    _module(module)._flash_attn_backward(
        dout, q, k, v, out, lse, *[None] * 6, *made, scale, False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return made


def _fa4_forward(q, k, v, scale):
    out, lse, *_ = import_module("flash_attn.cute").flash_attn_func(
        q, k, v, softmax_scale=scale, return_lse=True
    )
    return out, lse


def _fa4_backward(dout, q, k, v, out, lse, scale):
    made = import_module("flash_attn.cute.interface")._flash_attn_bwd(
        q, k, v, out, dout, lse, scale, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    return made[:3]


def _fa2_backward(dout, q, k, v, out, lse, scale):
    made = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in (q, k, v)]
    import_module("flash_attn.flash_attn_interface")._flash_attn_backward(
        dout, q, k, v, out, lse, *made, dropout_p=0.0, softmax_scale=scale, causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=None,
    )  # fmt: skip
    return made


def _heads_first(op: Callable, *tensors: Tensor) -> list[Tensor]:
    """op on [B, H, L, D] tensors, its results as [B, L, H, D]."""
    return [a.transpose(1, 2) for a in op(*(a.transpose(1, 2) for a in tensors))]


def _sdpa_mask(k: Tensor, repeats: int) -> Tensor | None:
    """What torch's CPU kernel adds to the scores, [1, 1, 1, Lk] float32 for k [B, H, Lk, D]."""
    if repeats == 1:
        return None
    mask = k.new_zeros(1, 1, 1, k.shape[2], dtype=torch.float32)
    mask[..., -1] = math.log(repeats)
    return mask


def _sdpa_forward(q, k, v, scale, repeats=1):
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    if device_type(q) == "cpu":
        op, mask = aten._scaled_dot_product_flash_attention_for_cpu, _sdpa_mask(k, repeats)
        out, lse = op(q, k, v, attn_mask=mask, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def _sdpa_backward(dout, q, k, v, out, lse, scale, repeats=1):
    def run(dout, q, k, v, out):
        if device_type(q) == "cpu":
            op, mask = aten._scaled_dot_product_flash_attention_for_cpu_backward, _sdpa_mask(k, repeats)
            return op(dout, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
        seed, lengths = torch.zeros(2, dtype=torch.int64, device=q.device), (q.shape[2], k.shape[2])
        op = aten._scaled_dot_product_flash_attention_backward
        return op(dout, q, k, v, out, lse, None, None, *lengths, 0.0, False, seed, seed, scale=scale)

    return _heads_first(run, dout, q, k, v, out)


def _cudnn_forward(q, k, v, scale):
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out.transpose(1, 2), lse.reshape(lse.shape[:3])  # [B, H, Lq, 1] in some versions


def _cudnn_backward(dout, q, k, v, out, lse, scale):
    def run(dout, q, k, v, out):
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2],
            0.0, False, scale=scale,
        )  # fmt: skip

    return _heads_first(run, dout, q, k, v, out)


def _xformers_forward(q, k, v, scale):
    run = import_module("xformers.ops").memory_efficient_attention_forward_requires_grad
    out, lse = run(q, k, v, scale=scale)
    return out, lse[..., : q.shape[1]]  # its CUTLASS kernel pads to a multiple of 32


def _xformers_backward(dout, q, k, v, out, lse, scale):
    run = import_module("xformers.ops").memory_efficient_attention_backward
    return run(dout, out, lse, q, k, v, scale=scale)


def _with_lse_gradient(forward, backward, dout, dlse, q, k, v, out, lse, scale, wants_q, wants_kv, *repeats):
    """A backward that knows no dlse, and for dlse one more forward and backward with v = k; `repeats` where
    both take it.

    lse adds p_ij dlse_i to ds_ij, so dq_i += scale dlse_i sum_j p_ij k_j, attention of k to itself as
    values, and dk_j += sum_i p_ij (scale dlse_i q_i), the value gradient of that.
    """
    dq, dk, dv = backward(dout, q, k, v, out, lse, scale, *repeats)
    if dlse is not None:
        weight = scale * dlse.mT[..., None]
        mean, _ = forward(q, k, k, scale, *repeats)
        dq = (dq + weight * mean).to(q.dtype)
        dk = dk + backward((weight * q).to(q.dtype), q, k, k, mean, lse, scale, *repeats)[2]
    return dq, dk, dv


class Need(NamedTuple):
    """A function of an optional package, and an argument of it that older forms lack, with what they do."""

    module: str
    attribute: str
    argument: str = ""
    without: str = ""


@cache
def _missing(*needs: Need) -> str | None:
    """Why one of the needs is not met, or None. Asked once a process.

    Two packages of versions that do not fit are an AttributeError, a broken build an OSError; the hub's
    loader raises ValueError or RuntimeError for a build that is not for this machine.
    """
    for need in needs:
        try:
            function = getattr(_module(need.module), need.attribute)
        except (ImportError, AttributeError, OSError, ValueError, RuntimeError) as error:
            return f"{need.module}: {' '.join(str(error).split()) or type(error).__name__}"
        if need.argument and not _takes(function, need.argument):
            return f"{need.module}: {need.attribute} has no {need.argument}: {need.without}"
    return None


def _takes(function: Callable, argument: str) -> bool:
    """Whether an argument may be passed by name; torch's custom operators show **kwargs alone."""
    parameters = inspect.signature(function).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _packages(*needs: Need, lowest: int = 8, highest: float = math.inf) -> Callable:
    """A probe for CUDA, 16 bits, major compute capabilities, and functions of optional packages."""
    return requires("cuda", (lowest, highest), HALVES, build=lambda _: _missing(*needs))


def _fa3_probe(module: str) -> Callable:
    lacks = "it may return no lse, want a build from 2025-08-29 or later"
    return _packages(
        Need(module, "flash_attn_func", "return_attn_probs", lacks), Need(module, "_flash_attn_backward"),
        lowest=9, highest=9,
    )  # fmt: skip


def _has_cudnn(_: str) -> str | None:
    return None if torch.backends.cudnn.is_available() else "torch has no cuDNN"


def _cudnn_doubt(device: str, backward: bool) -> str | None:
    """Why cuDNN is no default on a Hopper GPU.

    Its backward there reads keys, or queries, past the end of the last tile as zeros and not as masked, and
    makes NaN for rows whose lse is below -88.7: confirmed by NVIDIA for keys of 64 modulo 128 (cudnn-frontend
    pull request 628, pytorch issue 196678), and reported of 128 keys without a mask in 9.25.1 and 9.26.0
    (cudnn-frontend issue 1072). So no version and no shape is known to be safe. Before 9.18 it read workspace
    that nobody had initialised (TransformerEngine issue 2186).
    """
    if device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        return None
    if backward:
        return "makes NaN of rows with an lse below -88.7 on Hopper (cudnn-frontend 628, 1072)"
    version = torch.backends.cudnn.version() or 0
    shown = f"{version // 10000}.{version // 100 % 100}"
    return f"is version {shown}, on Hopper want 9.18 (TransformerEngine 2186)" if version < 91800 else None


def _sdpa_probe(device: str, *facts) -> str | None:
    return requires(dtypes=(*HALVES, torch.float32) if device == "cpu" else HALVES)(device, *facts)


def _record(
    name: str, reason: str, forward: Callable, backward: Callable, probe: Callable, native: str = "", **rest
) -> Implementation:
    """The record of a library; on the device type `native` its functions take repeats."""
    gradients = partial(_with_lse_gradient, forward, backward)
    both = forward_with_repeats(forward, native), backward_with_repeats(gradients, native)
    return Implementation(name, reason, probe, *both, **rest)


IMPLEMENTATIONS = (
    _record("sdpa", "torch's flash attention", _sdpa_forward, _sdpa_backward, _sdpa_probe, native="cpu"),
    _record(
        "xformers", "xformers", _xformers_forward, _xformers_backward,
        _packages(Need("xformers.ops", "memory_efficient_attention_forward_requires_grad"),
                  Need("xformers.ops", "memory_efficient_attention_backward")),
    ),
    _record(
        "fa2", "FlashAttention-2", partial(_flash_forward, "flash_attn"), _fa2_backward,
        _packages(Need("flash_attn", "flash_attn_func"),
                  Need("flash_attn.flash_attn_interface", "_flash_attn_backward", "window_size_left",
                       "want version 2.7 or later")),
    ),
    _record(
        "cudnn", "cuDNN through torch", _cudnn_forward, _cudnn_backward,
        requires("cuda", (8, math.inf), HALVES, build=_has_cudnn),
        backwards=("cudnn", "fa3", "fa3_hub", "fa2", "triton", "sdpa"), doubt=_cudnn_doubt,
    ),
    _record(
        "fa4", "FlashAttention-4", _fa4_forward, _fa4_backward,
        _packages(Need("flash_attn.cute", "flash_attn_func", "return_lse",
                       "it may return no lse, want a version from 2026-02-26 or later"),
                  Need("flash_attn.cute.interface", "_flash_attn_bwd"), lowest=9),
    ),
    _record(
        "fa3_hub", "FlashAttention-3 from the kernel hub's cache", partial(_flash_forward, FA3_HUB),
        partial(_fa3_backward, FA3_HUB), _fa3_probe(FA3_HUB),
    ),
    _record(
        "fa3", "FlashAttention-3", partial(_flash_forward, FA3), partial(_fa3_backward, FA3),
        _fa3_probe(FA3),
    ),
)  # fmt: skip
