"""Softmax attention without mask or dropout, self or cross, by any of several implementations.

    out = softmax(s) v,  lse = log sum_j exp(s_j)      q [B, Lq, H, D], k and v [B, Lk, H, D]
    s_j = scale q k_j, and log(repeats) more for the last key

out is as q, lse [B, H, Lq] float32. The last key counts `repeats` times: n equal keys with equal values are
one whose score is log n higher, for out, lse and all gradients, of which its own are the sums over the n.
So padding, which is one vector many times, costs no more than one token.

Layout is (batch, sequence, heads, head dim), as in FlashAttention. Whatever computes it, it is one
operation, torch.ops.prfl.attention.default, that returns out and lse: selective checkpointing that
saves these two never recomputes attention, and torch.compile sees every implementation alike.

The other files of this folder hold the implementations, all with one contract:

    forward(q, k, v, scale, repeats) -> (out, lse)
    backward(dout, dlse, q, k, v, out, lse, scale, wants_q, wants_kv, repeats) -> (dq, dk, dv)

Rows have unit stride, lse and dlse are natural logarithms, dlse is None for zero, unwanted gradients may be
None. Nothing in them is differentiable by autograd. Out and lse do not tell who made them, so forward and
backward may come from two implementations.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from prfl_kernels import dispatch, extension, processor
from prfl_kernels.attention import cpu, cuda, libraries, reference, triton_kernels
from prfl_kernels.checks import expect, expect_float, expect_rank
from prfl_kernels.declare import operation, or_empty
from prfl_kernels.jit import unit_last, wide

# On CUDA the first that runs; "cuda" is no default before it has been measured on a GPU.
ORDER = ("fa3", "fa3_hub", "fa4", "cudnn", "fa2", "triton", "sdpa")
CPU_ORDER = ("cpu", "sdpa")
# In bfloat16 where torch's products use AMX: ours, which do not, take 3.8 times (1,080 tokens) to 5 times as
# long there (4,096) forward, and 2.1 to 2.3 times backward. In float32 they have not been compared there.
AMX_ORDER = ("sdpa", "cpu")


def order(device: str, dtype: torch.dtype | None) -> tuple[tuple[str, ...], str]:
    """(names, the best first, what that rests on) for `dispatch.register`."""
    if device == "cuda":
        return ORDER, ""
    if why := processor.amx_absence():
        return CPU_ORDER, f"torch's bfloat16 products do not use AMX: {why}"
    amx = dtype in (None, torch.bfloat16)
    return AMX_ORDER if amx else CPU_ORDER, "torch's bfloat16 products use AMX"


_own = (cpu.IMPLEMENTATION, triton_kernels.IMPLEMENTATION, cuda.IMPLEMENTATION)
dispatch.register("attention", (reference.IMPLEMENTATION, *_own, *libraries.IMPLEMENTATIONS), order)
RECORDS = dispatch.OPERATIONS["attention"]
BACKWARDS = [name for name, record in RECORDS.items() if record.backward]


def forward(fill, q, k, v, scale, repeats=1):
    """(out, lse), which fill, the forward of a record, makes unless it is None."""
    if fill is None or q.numel() == 0:
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide(q.dtype))
        return q.new_empty(q.shape), lse
    out, lse = fill(*map(unit_last, (q, k, v)), scale, repeats)
    return out.contiguous(), lse.contiguous()


def backward(fill, dout, dlse, q, k, v, out, lse, scale, wants_q=True, wants_kv=True, repeats=1):
    """[dq, dk, dv], None where not wanted, which fill, the backward of a record, makes unless it is None."""
    if fill is None:
        made = [a.new_empty(a.shape) for a in (q, k, v)]
    elif q.numel() == 0:
        made = [a.new_zeros(a.shape) for a in (q, k, v)]
    else:
        dlse = None if dlse is None else dlse.contiguous()
        ends = out, lse.contiguous(), scale, wants_q, wants_kv, repeats
        made = fill(unit_last(dout), dlse, *map(unit_last, (q, k, v)), *ends)
    wanted = wants_q, wants_kv, wants_kv
    return [a.contiguous() if wants else None for a, wants in zip(made, wanted, strict=True)]


def _check(op, q, k, v, scale, repeats):
    batch, length, heads, dim = expect_rank(op, "q", q, "B, Lq, H, D")
    expect_float(op, "q", q.dtype)
    keys = expect_rank(op, "k", k, "B, Lk, H, D")[1]
    for name, a in (("k", k), ("v", v)):
        expect(op, name, a, (batch, keys, heads, dim), q, q.dtype)
    if keys == 0 and length > 0:
        raise ValueError(f"{op}: got no keys, want at least one")
    if repeats < 1:
        raise ValueError(f"{op}: got {repeats} repeats of the last key, want at least 1")
    if not scale > 0:
        raise ValueError(f"{op}: got scale {scale}, want a positive number")


def _expect_name(op: str, argument: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"{op}: got {argument} {name!r}, want one of {', '.join(names)}")


def _runnable(op: str, name: str, q: Tensor) -> dispatch.Implementation:
    """The record of this name. ValueError if it does not run on q."""
    if q.numel():
        dispatch.runnable(op, name, extension.device_type(q), q.dtype, q.shape[3])
    return RECORDS[name]


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, backend, ctx.repeats, backward = inputs
    ctx.backward = backward or dispatch.backward_of("attention", q, backend)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = torch.ops.prfl.attention_backward(
        dout, dlse, q, k, v, out, lse, ctx.scale, ctx.backward, wants_q, wants_k or wants_v, ctx.repeats
    )
    made = dq if wants_q else None, dk if wants_k else None, dv if wants_v else None
    return *made, None, None, None, None


@operation("attention", _gradient, _setup_context)
def _attention(
    fake: bool, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, repeats: int = 1,
    backward: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "attention"
    _check(op, q, k, v, scale, repeats)
    _expect_name(op, "backend", backend, RECORDS)
    if backward is not None:
        _expect_name(op, "backward", backward, BACKWARDS)
    return forward(None if fake else _runnable(op, backend, q).forward, q, k, v, scale, repeats)


@operation("attention_backward")
def _attention_backward(
    fake: bool, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, backend: str, wants_q: bool, wants_kv: bool, repeats: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "attention_backward"
    _check(op, q, k, v, scale, repeats)
    _expect_name(op, "backend", backend, BACKWARDS)
    expect(op, "dout", dout, q.shape, q, q.dtype)
    expect(op, "out", out, q.shape, q, q.dtype)
    numbers, dtype = (q.shape[0], q.shape[2], q.shape[1]), wide(q.dtype)
    expect(op, "lse", lse, numbers, q, dtype)
    if dlse is not None:
        expect(op, "dlse", dlse, numbers, q, dtype)
    fill = None if fake else _runnable(op, backend, q).backward
    return or_empty(q, *backward(fill, dout, dlse, q, k, v, out, lse, scale, wants_q, wants_kv, repeats))


def attend(q: Tensor, k: Tensor, v: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` by the implementation that `dispatch` chooses, for use inside an operation."""
    return forward(dispatch.record("attention", q).forward, q, k, v, q.shape[3] ** -0.5, repeats)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, wants_q: bool = True,
    wants_kv: bool = True, repeats: int = 1,
) -> list[Tensor | None]:  # fmt: skip
    """[dq, dk, dv] of `attend`, None where not wanted."""
    fill, scale = RECORDS[dispatch.backward_of("attention", q)].backward, q.shape[3] ** -0.5
    return backward(fill, dout, None, q, k, v, out, lse, scale, wants_q, wants_kv, repeats)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, D] in q.dtype, lse [B, H, Lq] float32), both differentiable.

    q [B, Lq, H, D], k and v [B, Lk, H, D] of one float dtype and any strides, D > 0; nothing broadcasts;
    scale > 0, 1 / sqrt(D) if None. The last key counts `repeats` times. lse is float64 for float64 inputs.
    Raises ValueError for shapes, dtypes or devices that do not fit, for queries without keys, for repeats
    below 1, and for a chosen implementation that cannot run.
    """
    dim = expect_rank("attention", "q", q, "B, Lq, H, D")[3]
    scale = dim**-0.5 if scale is None else scale
    backend = dispatch.implementation("attention", q)
    backward = dispatch.backward_of("attention", q, backend)
    return torch.ops.prfl.attention(q, k, v, scale, backend, repeats, backward)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, repeats: int = 1
) -> Tensor:
    """out of `attention_with_lse`."""
    return attention_with_lse(q, k, v, scale, repeats)[0]
