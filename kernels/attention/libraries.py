"""Attention by FlashAttention 2 to 4, cuDNN, xformers and torch's own (SDPA), by the contract in `op`.

None of them has a gradient of lse, and only torch's CPU kernel, by its mask, has a last key that counts
several times; both are added here. The caller gives rows of unit stride: torch's flash attention for the CPU
reads others as if they were.

Optional packages are imported when they are first asked for; a probe keeps the reason of a failure.
Known forms: FlashAttention-3 returned a tuple before it returned `out` alone; its backward takes the
softmax scale and the causal flag as arguments 16 and 17 in every version, under two names.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor

from prfl_kernels.attention.repeats import backward_with_repeats, forward_with_repeats
from prfl_kernels.dispatch import Implementation, requires

HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


def _fa3_forward(q, k, v, scale):
    flash = import_module("flash_attn_interface").flash_attn_func
    asks = "return_attn_probs" in inspect.signature(flash).parameters
    out, lse, *_ = flash(q, k, v, softmax_scale=scale, **({"return_attn_probs": True} if asks else {}))
    return out, lse


def _fa3_backward(dout, q, k, v, out, lse, scale):
    made = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in (q, k, v)]
    import_module("flash_attn_interface")._flash_attn_backward(
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


def _fa2_forward(q, k, v, scale):
    out, lse, *_ = import_module("flash_attn").flash_attn_func(
        q, k, v, softmax_scale=scale, return_attn_probs=True
    )
    return out, lse


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
    if q.device.type == "cpu":
        op, mask = aten._scaled_dot_product_flash_attention_for_cpu, _sdpa_mask(k, repeats)
        out, lse = op(q, k, v, attn_mask=mask, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def _sdpa_backward(dout, q, k, v, out, lse, scale, repeats=1):
    def run(dout, q, k, v, out):
        if q.device.type == "cpu":
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


@cache
def _missing(*needs: tuple[str, str]) -> str | None:
    """Why one of the (module, attribute) of optional packages cannot be used, or None. Asked once a process.

    Two packages of versions that do not fit are an AttributeError, a broken build an OSError.
    """
    for module, attribute in needs:
        try:
            getattr(import_module(module), attribute)
        except (ImportError, AttributeError, OSError) as error:
            return f"{module}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def _packages(*needs: tuple[str, str], lowest: int = 8, highest: float = math.inf) -> Callable:
    """A probe for CUDA, 16 bits, major compute capabilities, and attributes of optional packages."""
    return requires("cuda", (lowest, highest), HALVES, build=lambda _: _missing(*needs))


def _has_cudnn(_: str) -> str | None:
    return None if torch.backends.cudnn.is_available() else "torch has no cuDNN"


def _sdpa_probe(device: str, *facts) -> str | None:
    return requires(dtypes=(*HALVES, torch.float32) if device == "cpu" else HALVES)(device, *facts)


def _record(
    name: str, reason: str, forward: Callable, backward: Callable, probe: Callable, native: str = ""
) -> Implementation:
    """The record of a library; on the device type `native` its functions take repeats."""
    gradients = partial(_with_lse_gradient, forward, backward)
    return Implementation(
        name, reason, probe, forward_with_repeats(forward, native), backward_with_repeats(gradients, native)
    )


IMPLEMENTATIONS = (
    _record("sdpa", "torch's flash attention", _sdpa_forward, _sdpa_backward, _sdpa_probe, native="cpu"),
    _record(
        "xformers", "xformers", _xformers_forward, _xformers_backward,
        _packages(("xformers.ops", "memory_efficient_attention_forward_requires_grad"),
                  ("xformers.ops", "memory_efficient_attention_backward")),
    ),
    _record(
        "fa2", "FlashAttention-2", _fa2_forward, _fa2_backward,
        _packages(("flash_attn", "flash_attn_func"),
                  ("flash_attn.flash_attn_interface", "_flash_attn_backward")),
    ),
    _record(
        "cudnn", "cuDNN through torch", _cudnn_forward, _cudnn_backward,
        requires("cuda", (8, math.inf), HALVES, build=_has_cudnn),
    ),
    _record(
        "fa4", "FlashAttention-4", _fa4_forward, _fa4_backward,
        _packages(("flash_attn.cute", "flash_attn_func"), ("flash_attn.cute.interface", "_flash_attn_bwd"),
                  lowest=9),
    ),
    _record(
        "fa3", "FlashAttention-3", _fa3_forward, _fa3_backward,
        _packages(("flash_attn_interface", "flash_attn_func"),
                  ("flash_attn_interface", "_flash_attn_backward"), lowest=9, highest=9),
    ),
)  # fmt: skip
