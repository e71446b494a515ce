"""Softmax attention without mask or dropout, self or cross, by any of several implementations.

    out = softmax(s) v,  lse = log sum_j exp(s_j)      q [B, Lq, H, D], k and v [B, Lk, H, D]
    s_j = scale q k_j, and log(repeats) more for the last key

out is as q, lse [B, H, Lq] float32. The last key counts `repeats` times: n equal keys with equal values are
one whose score is log n higher, for out, lse and all gradients, of which its own are the sums over the n.
So padding, which is one vector many times, costs no more than one token.

Layout is (batch, sequence, heads, head dim), as in FlashAttention. Whatever computes it, it is one
operation, torch.ops.prfl.attention.default, that returns out and lse: selective checkpointing that
keeps these two never computes attention again, and torch.compile sees every implementation alike.
`attention_backends` holds the implementations, the table says which one runs.
"""

import torch
from torch import Tensor

from prfl_kernels.attention.libraries import BACKENDS, absence, run_backward, run_forward
from prfl_kernels.checks import checked, expect, expect_float, expect_rank
from prfl_kernels.dispatch import implementation
from prfl_kernels.jit import register, wide


def _check(q, k, v, scale, backend, repeats=1, op="attention"):
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
    if backend not in BACKENDS:
        raise ValueError(f"{op}: got backend {backend!r}, want one of {', '.join(BACKENDS)}")


def _check_backward(dout, dlse, q, k, v, out, lse, scale, backend, wants_q, wants_kv, repeats=1):
    op = "attention_backward"
    _check(q, k, v, scale, backend, repeats, op)
    expect(op, "dout", dout, q.shape, q, q.dtype)
    expect(op, "out", out, q.shape, q, q.dtype)
    numbers, dtype = (q.shape[0], q.shape[2], q.shape[1]), wide(q.dtype)
    expect(op, "lse", lse, numbers, q, dtype)
    if dlse is not None:
        expect(op, "dlse", dlse, numbers, q, dtype)


def _check_runs(backend: str, q: Tensor) -> None:
    why = absence(backend, q.device.type, q.dtype, q.shape[3])
    if why:
        raise ValueError(f"kernels: attention got {backend} on {q.device.type}: it {why}")


def _forward(q, k, v, scale, backend, repeats=1):
    if q.numel() == 0:
        return _forward_fake(q, k, v, scale, backend)
    _check_runs(backend, q)
    out, lse = run_forward(backend, q, k, v, scale, repeats)
    return out.contiguous(), lse.contiguous()


def _forward_fake(q, k, v, scale, backend, repeats=1):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide(q.dtype))
    return q.new_empty(q.shape), lse


def _backward(dout, dlse, q, k, v, out, lse, scale, backend, wants_q, wants_kv, repeats=1):
    if q.numel() == 0:
        made = [q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)]
    else:
        _check_runs(backend, q)
        dlse = None if dlse is None else dlse.contiguous()
        ends = out, lse.contiguous(), scale, wants_q, wants_kv, repeats
        made = run_backward(backend, dout, dlse, q, k, v, *ends)
    wanted = (wants_q, wants_kv, wants_kv)
    return tuple(a.contiguous() if w else q.new_empty(0) for a, w in zip(made, wanted, strict=True))


def _backward_fake(dout, dlse, q, k, v, out, lse, scale, backend, wants_q, wants_kv, repeats=1):
    wanted = ((q, wants_q), (k, wants_kv), (v, wants_kv))
    return tuple(a.new_empty(a.shape if w else 0) for a, w in wanted)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.backend, ctx.repeats = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = torch.ops.prfl.attention_backward(
        dout, dlse, q, k, v, out, lse, ctx.scale, ctx.backend, wants_q, wants_k or wants_v, ctx.repeats
    )
    made = dq if wants_q else None, dk if wants_k else None, dv if wants_v else None
    return *made, None, None, None


register(
    "attention(Tensor q, Tensor k, Tensor v, float scale, str backend, int repeats=1) -> (Tensor, Tensor)",
    *checked(_check, _forward, _forward_fake),
    _gradient,
    _setup_context,
)
register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale, str backend, bool wants_q, bool wants_kv, int repeats=1) -> (Tensor, Tensor, Tensor)",
    *checked(_check_backward, _backward, _backward_fake),
)


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
    return torch.ops.prfl.attention(q, k, v, scale, implementation("attention", q), repeats)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, repeats: int = 1
) -> Tensor:
    """out of `attention_with_lse`."""
    return attention_with_lse(q, k, v, scale, repeats)[0]
