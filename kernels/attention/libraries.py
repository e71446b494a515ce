"""The implementations of softmax attention behind one contract, and which of them run here.

    forward(q, k, v, scale[, repeats]) -> (out, lse)
    backward(dout, dlse, q, k, v, out, lse, scale, wants_q, wants_kv[, repeats]) -> (dq, dk, dv)

q, out, dout [B, Lq, H, D], k and v [B, Lk, H, D] of one dtype; lse and dlse [B, H, Lq] float32 natural
logarithms, dlse None for zero. Unwanted gradients may be None. Nothing here is differentiable by
autograd and nothing masks or drops out: `attention` wraps all of it in one operation.

The last key counts `repeats` times. Our own implementations raise its score by log(repeats), and so does the
mask of torch's CPU kernel; other libraries know nothing of it: `run_forward` gives them the key and its value
that often, and `run_backward` sums up what comes back, for the same result at the price of the longer keys.
All get rows of unit stride: torch's flash attention for the CPU reads others as if they were.

Optional packages are imported when they are first asked for; a probe keeps the reason of a failure.
Known forms: FlashAttention-3 returned a tuple before it returned `out` alone; its backward takes the
softmax scale and the causal flag as arguments 16 and 17 in every version, under two names.
"""

import inspect
import math
from collections.abc import Callable, Container
from functools import cache, partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import extension, jit, processor
from prfl_kernels.attention import (
    cpu as attention_cpu,
)
from prfl_kernels.attention import (
    cuda as attention_hopper,
)
from prfl_kernels.attention import (
    triton_kernels as attention_triton,
)
from prfl_kernels.jit import unit_last, wide

HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


def _scores(q: Tensor, k: Tensor, scale: float, repeats: int) -> Tensor:
    """scale q k^T in float32 at least, of [B, H, L, D], and log(repeats) more for the last key."""
    s = (q @ k.mT).to(wide(q.dtype)) * scale
    if repeats > 1:
        s[..., -1] += math.log(repeats)
    return s


def reference_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    s = _scores(q, k, scale, repeats)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp().to(q.dtype)
    return (p @ v).transpose(1, 2), lse


def reference_backward(dout, dlse, q, k, v, out, lse, scale, wants_q=True, wants_kv=True, repeats=1):
    """The formulas of `attention_triton`, all of [B, H, Lq, Lk] at once; delta is summed over keys, which
    needs no `out` and makes the rows of ds sum to zero, rounding of `out` or not."""
    dout, q, k, v = (a.transpose(1, 2) for a in (dout, q, k, v))
    p = (_scores(q, k, scale, repeats) - lse[..., None]).exp()
    dp = (dout @ v.mT).to(p.dtype)
    delta = (p * dp).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = (p * (dp - delta[..., None]) * scale).to(q.dtype)
    dq = (ds @ k).transpose(1, 2) if wants_q else None
    dk = (ds.mT @ q).transpose(1, 2) if wants_kv else None
    dv = (p.to(q.dtype).mT @ dout).transpose(1, 2) if wants_kv else None
    return dq, dk, dv


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


class Backend(NamedTuple):
    reason: str  # what it is
    forward: Callable
    backward: Callable
    needs: tuple[tuple[str, str], ...] = ()  # (module, attribute) of optional packages
    device: str | None = "cuda"
    capabilities: tuple[int, int] = (8, math.inf)  # lowest and highest major compute capability
    dtypes: tuple[torch.dtype, ...] = HALVES
    head_dims: Container[int] | None = None  # None: its own checks tell
    takes_repeats: tuple[str, ...] = ()  # device types; on others it gets the last key laid out


def _library(reason: str, forward: Callable, backward: Callable, *needs, **facts) -> Backend:
    return Backend(reason, forward, partial(_with_lse_gradient, forward, backward), needs, **facts)


BACKENDS = {
    "reference": Backend(
        "plain torch", reference_forward, reference_backward, device=None,
        dtypes=(*HALVES, torch.float32, torch.float64), takes_repeats=("cpu", "cuda"),
    ),
    "cpu": Backend(
        f"own C++ kernels, for head dims up to {attention_cpu.LARGEST_HEAD_DIM}",
        attention_cpu.forward, attention_cpu.backward, device="cpu", dtypes=attention_cpu.DTYPES,
        head_dims=range(1, attention_cpu.LARGEST_HEAD_DIM + 1), takes_repeats=("cpu",),
    ),
    "sdpa": _library(
        "torch's flash attention", _sdpa_forward, _sdpa_backward, device=None, takes_repeats=("cpu",)
    ),
    "xformers": _library(
        "xformers", _xformers_forward, _xformers_backward,
        ("xformers.ops", "memory_efficient_attention_forward_requires_grad"),
        ("xformers.ops", "memory_efficient_attention_backward"),
    ),
    "triton": Backend(
        "own Triton kernels", attention_triton.forward, attention_triton.backward,
        dtypes=attention_triton.DTYPES, takes_repeats=("cpu", "cuda"),
    ),
    "cuda": Backend(
        "own CUDA C++ kernel, its backward in Triton", attention_hopper.forward, attention_triton.backward,
        capabilities=(9, 9), dtypes=(torch.bfloat16,),
    ),
    "fa2": _library(
        "FlashAttention-2", _fa2_forward, _fa2_backward,
        ("flash_attn", "flash_attn_func"), ("flash_attn.flash_attn_interface", "_flash_attn_backward"),
    ),
    "cudnn": _library("cuDNN through torch", _cudnn_forward, _cudnn_backward),
    "fa4": _library(
        "FlashAttention-4", _fa4_forward, _fa4_backward,
        ("flash_attn.cute", "flash_attn_func"), ("flash_attn.cute.interface", "_flash_attn_bwd"),
        capabilities=(9, math.inf),
    ),
    "fa3": _library(
        "FlashAttention-3", _fa3_forward, _fa3_backward,
        ("flash_attn_interface", "flash_attn_func"), ("flash_attn_interface", "_flash_attn_backward"),
        capabilities=(9, 9),
    ),
}  # fmt: skip
# On CUDA the first that runs; "cuda" is no default before it has been measured on a GPU.
ORDER = ("fa3", "fa4", "cudnn", "fa2", "triton", "sdpa")
CPU_ORDER = ("cpu", "sdpa")
# In bfloat16 where torch's products use AMX: ours, which do not, take 3.8 times (1,080 tokens) to 5 times as
# long there (4,096) forward, and 2.1 to 2.3 times backward. In float32 they have not been compared there.
AMX_ORDER = ("sdpa", "cpu")


def _laid_out(a: Tensor, repeats: int) -> Tensor:
    """a [B, L, H, D] with its last token `repeats` times."""
    return a if repeats == 1 else torch.cat([a, a[:, -1:].expand(-1, repeats - 1, -1, -1)], dim=1)


def _gathered(d: Tensor, repeats: int) -> Tensor:
    """The gradient of a from that of _laid_out(a, repeats)."""
    if repeats == 1:
        return d
    single, last = d.split([d.shape[1] - repeats, repeats], dim=1)
    return torch.cat([single, last.sum(1, keepdim=True, dtype=wide(d.dtype)).to(d.dtype)], dim=1)


def run_forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, repeats: int
) -> tuple[Tensor, Tensor]:
    """`forward` of back end `name`, whether it takes repeats or not."""
    backend = BACKENDS[name]
    q, k, v = (unit_last(a) for a in (q, k, v))
    if q.device.type in backend.takes_repeats:
        return backend.forward(q, k, v, scale, repeats)
    return backend.forward(q, _laid_out(k, repeats), _laid_out(v, repeats), scale)


def run_backward(name, dout, dlse, q, k, v, out, lse, scale, wants_q, wants_kv, repeats):
    """`backward` of back end `name`, whether it takes repeats or not."""
    backend, ends = BACKENDS[name], (out, lse, scale, wants_q, wants_kv)
    dout, q, k, v = (unit_last(a) for a in (dout, q, k, v))
    if q.device.type in backend.takes_repeats:
        return backend.backward(dout, dlse, q, k, v, *ends, repeats)
    dq, dk, dv = backend.backward(dout, dlse, q, _laid_out(k, repeats), _laid_out(v, repeats), *ends)
    return (dq, _gathered(dk, repeats), _gathered(dv, repeats)) if wants_kv else (dq, None, None)


@cache
def _missing(name: str) -> str | None:
    """Why a package that back end `name` needs cannot be used, or None. Asked once a process.

    Two packages of versions that do not fit are an AttributeError, a broken build an OSError.
    """
    for module, attribute in BACKENDS[name].needs:
        try:
            getattr(import_module(module), attribute)
        except (ImportError, AttributeError, OSError) as error:
            return f"{module}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


@torch.compiler.assume_constant_result  # of the machine, not of the tensors
def absence(
    name: str, device: str, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Why back end `name` does not run on a device of type `device`, for a dtype and head dim; None if
    it does."""
    backend = BACKENDS[name]
    interpreted = name == "triton" and jit.INTERPRETED
    if backend.device not in (None, device) and not interpreted:
        return f"needs a {backend.device} device"
    if name in ("triton", "cuda") and jit.triton is None:
        return "triton is not installed"
    if name == "cpu" and (why := extension.absence("cpu", device)) is not None:
        return why
    if device == "cuda" and backend.device == "cuda":
        low, high = backend.capabilities
        major, minor = torch.cuda.get_device_capability()
        if not low <= major <= high:
            return f"needs capability {low}.0{'' if high == low else ' or higher'}, got {major}.{minor}"
    if name == "cuda" and (why := extension.absence("cuda", device)):
        return why
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch has no cuDNN"
    dtypes = (*HALVES, torch.float32) if name == "sdpa" and device == "cpu" else backend.dtypes
    if dtype is not None and dtype not in dtypes:
        return f"has no {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and backend.head_dims is not None and head_dim not in backend.head_dims:
        return f"has no head dim {head_dim}"
    return _missing(name)


def default(
    device: str, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> tuple[str, dict[str, str]]:
    """(the back end that runs where none is chosen, {each better one: why not it}); without dtype that for
    bfloat16."""
    passed: dict[str, str] = {}
    order = ORDER if device == "cuda" else CPU_ORDER
    if device == "cpu" and dtype in (None, torch.bfloat16) and processor.amx_absence() is None:
        order = AMX_ORDER
    for name in order:
        why = absence(name, device, dtype, head_dim)
        if why is None:
            return name, passed
        passed[name] = why
    return "reference", passed


def note(device: str) -> str:
    """What the order of `default` rests on, where it depends on the processor; else empty."""
    if device != "cpu":
        return ""
    if why := processor.amx_absence():
        return f"torch's bfloat16 products do not use AMX: {why}"
    return f"torch's bfloat16 products use AMX; in float32 {default(device, torch.float32)[0]}"
