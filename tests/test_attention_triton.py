"""The Triton attention kernels against plain attention in float64, forward and backward."""

import pytest
import torch
from fused import DEVICE, error, needs_triton, normal
from rounding import rounding

from prfl_kernels.attention import triton_kernels as attention_triton

pytestmark = [needs_triton, pytest.mark.usefixtures("fresh_memory_is_nan")]


def plain(q, k, v, scale):
    """(out, lse) as the kernels' head writes it, in the dtype of the inputs."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    s = (q @ k.mT) * scale
    return (s.softmax(-1) @ v).transpose(1, 2), s.logsumexp(-1)


def gradients(inputs, dout, dlse, scale, dtype):
    inputs = [a.detach().to(dtype).requires_grad_() for a in inputs]
    out, lse = plain(*inputs, scale)
    made = torch.autograd.grad((out, lse), inputs, (dout.to(dtype), dlse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *made]


def run(q, k, v, dout, dlse, scale):
    out, lse = attention_triton.forward(q, k, v, scale)
    return [out, lse, *attention_triton.backward(dout, dlse, q, k, v, out, lse, scale)]


@pytest.mark.parametrize(
    "batch, queries, keys, heads, dim, dtype",
    [
        (2, 37, 61, 2, 64, torch.float32),
        (1, 70, 33, 1, 128, torch.float32),
        (1, 150, 131, 2, 64, torch.float16),
        (2, 131, 300, 1, 128, torch.float16),
        (1, 1, 1, 1, 64, torch.float32),
    ],
)
def test_outputs_and_gradients(batch, queries, keys, heads, dim, dtype):
    torch.manual_seed(0)
    q, dout = (normal(batch, queries, heads, dim, dtype=dtype) for _ in range(2))
    k, v = (normal(batch, keys, heads, dim, dtype=dtype) for _ in range(2))
    dlse, scale = normal(batch, heads, queries), dim**-0.5
    exact = gradients((q, k, v), dout, dlse, scale, torch.float64)
    low = gradients((q, k, v), dout, dlse, scale, dtype)
    for i, (got, base, want) in enumerate(zip(run(q, k, v, dout, dlse, scale), low, exact, strict=True)):
        assert got.shape == want.shape and not got.isnan().any()
        # The single value of the last case has gradients that cancel: the rounding of the terms.
        limit = 2 * error(base, want) + rounding(max(queries, keys, dim))
        assert (got.double() - want).norm() <= limit * (want.norm() + dout.norm()), f"result {i}"


def test_slices_of_one_buffer_single_gradients_and_equal_bits():
    torch.manual_seed(1)
    buffer = normal(2, 45, 3, 2, 64)
    q, k, v = buffer.unbind(2)
    dout, dlse = normal(2, 45, 2, 64), normal(2, 2, 45)
    first = run(q, k, v, dout, dlse, 0.125)
    dense = run(q.contiguous(), k.contiguous(), v.contiguous(), dout, dlse, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(first, dense, strict=True))
    out, lse = first[:2]
    alone = attention_triton.backward(dout, dlse, q, k, v, out, lse, 0.125, wants_kv=False)
    assert torch.equal(alone[0], first[2]) and alone[1:] == (None, None)
    alone = attention_triton.backward(dout, dlse, q, k, v, out, lse, 0.125, wants_q=False)
    assert alone[0] is None and torch.equal(alone[1], first[3]) and torch.equal(alone[2], first[4])


def test_large_scores_do_not_overflow():
    torch.manual_seed(2)
    q, k, v, dout = (normal(1, 40, 1, 64) for _ in range(4))
    q = q * 1e3
    want = gradients((q, k, v), dout, torch.zeros(1, 1, 40, device=DEVICE), 1.0, torch.float64)
    got = run(q, k, v, dout, None, 1.0)
    assert all(a.isfinite().all() for a in got)
    # dv is made with exp(score - lse): their last bits are absolute errors of the exponent.
    for i, large in ((0, 1), (1, 1), (4, want[1].abs().max())):
        assert error(got[i], want[i]) <= rounding(64) * large, f"result {i}"
    # One key takes all the weight, so dq and dk are zero: ds is the difference of two equal sums of 64
    # products of dout and v, and goes into dq times k and into dk times q.
    longest = [a.double().norm(dim=-1).max() for a in (q, k, v)]
    for i, other in ((2, longest[1]), (3, longest[0])):
        assert (got[i] - want[i]).norm() <= rounding(64) * dout.norm() * longest[2] * other, f"result {i}"


@pytest.mark.parametrize(
    "dim, dtype, why", [(96, torch.float32, "head dim 96"), (64, torch.float64, "float64")]
)
def test_what_the_kernels_cannot_do_is_named(dim, dtype, why):
    q = normal(1, 4, 1, dim, dtype=dtype)
    with pytest.raises(ValueError, match=f"^kernels: attention got triton on .*: it has no {why}$"):
        torch.ops.prfl.attention(q, q, q, 1.0, "triton")
