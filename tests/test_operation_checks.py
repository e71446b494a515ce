"""What does not fit is refused by its operation, forward and backward form, real and fake, in one line."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_kernels import dispatch
from prfl_kernels import extension as compiled
from prfl_kernels.attention.op import attention
from prfl_kernels.bias_gelu import bias_gelu
from prfl_kernels.norm.gated_add import gated_add, gated_add_norm
from prfl_kernels.norm.op import layer_norm, modulate
from prfl_kernels.qk_norm_rope.op import qk_norm_rope, rms_norm
from prfl_kernels.reward_pool.op import merge, reward_pool
from prfl_kernels.sublayers.cross_attention import cross_attention
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights
from prfl_kernels.sublayers.self_attention import modulated_attention

F32, F64 = torch.float32, torch.float64
prfl = torch.ops.prfl


def n(*shape, dtype=F32):
    return torch.randn(shape).to(dtype)


def x(batch=2, length=5, width=8):
    return n(batch, length, width)


def rope(q=None, k=None, w=None, grid=(1, 2, 4), heads=2, **more):
    q, w = x() if q is None else q, n(8) if w is None else w
    return qk_norm_rope(q, x() if k is None else k, w, n(8), grid, heads, **more)


def rope_backward(dq=None, rstd=None, grid=(1, 2, 4)):
    dk, rstd = n(2, 5, 2, 4), n(2, 2, 5) if rstd is None else rstd
    dq, weights = dk if dq is None else dq, (n(8), n(8))
    return prfl.qk_norm_rope_backward(dq, dk, x(), x(), *weights, rstd, grid, 2, 0, True)


def ffn(w1=None, chunk=None, batch=2):
    weights = FFNWeights(n(6, 8) if w1 is None else w1, n(6), n(8, 6), n(8))
    return modulated_ffn(x(batch), None, n(2, 8), n(2, 8), n(2, 8), weights, chunk=chunk)


def projections(**changed):
    square = {"q": n(8, 8), "k": n(8, 8), "v": n(8, 8), "o": n(8, 8)}
    plain = {f"{k}_bias": n(8) for k in square} | square | {"norm_q": n(8), "norm_k": n(8)}
    return AttentionWeights(**plain | changed)


def self_attention(grid=(1, 2, 4), heads=2, gate=None, **changed):
    gate = n(2, 8) if gate is None else gate
    return modulated_attention(x(), n(2, 8), n(2, 8), gate, projections(**changed), grid, heads)


def cross(context=None, heads=2, **changed):
    return cross_attention(x(), n(2, 3, 8) if context is None else context, projections(**changed), heads)


def attention_backward(dout=None, lse=None, q=None):
    q = n(1, 3, 2, 4) if q is None else q
    dout, lse = q if dout is None else dout, n(1, 2, 3) if lse is None else lse
    return prfl.attention_backward(dout, None, q, q, q, q, lse, 0.5, "reference", True, True)


def pool_backward(scores=None, lse=None):
    scores, lse = n(2, 5, 3) if scores is None else scores, n(2, 3) if lse is None else lse
    return prfl.reward_pool_backward(n(2, 3, 8), n(2, 3), x(), n(3, 8), scores, lse, n(2, 3, 8), True, True)


BAD = {
    r"modulate: got scale \[2, 3\], want \[2, 8\]": lambda: modulate(x(), n(2, 3), n(2, 8)),
    r"modulate: got scale \[1, 8\], want \[2, 8\]": lambda: modulate(x(), n(1, 8), n(1, 8)),
    r"modulate: got scale \[0, 8\], want \[2, 8\]": lambda: modulate(x(), n(0, 8), n(2, 8)),
    r"modulate: got shift \[2, 3\], want \[2, 8\]": lambda: modulate(x(), n(2, 8), n(2, 3)),
    r"modulate: got x \[2, 8\], want \[B, L, C\]": lambda: modulate(n(2, 8), n(2, 8), n(2, 8)),
    r"modulate: got x \[2, 5, 0\], want .* C > 0": lambda: modulate(n(2, 5, 0), n(2, 0), n(2, 0)),
    r"modulate: got scale torch.int64": lambda: modulate(x(), n(2, 8, dtype=torch.int64), n(2, 8)),
    r"modulate: got shift on meta": lambda: modulate(x(), n(2, 8), n(2, 8).to("meta")),
    r"modulate: got out_dtype torch.int8": lambda: modulate(x(), n(2, 8), n(2, 8), out_dtype=torch.int8),
    r"layer_norm: got weight \[3\], want \[8\]": lambda: layer_norm(x(), n(3), n(8)),
    r"modulate: got base 0.5": lambda: prfl.modulate(x(), n(8), n(8), 0.5, 1e-6, F32),
    r"modulate_backward: got stats \[2, 2, 3\]": lambda: prfl.modulate_backward(
        x(), x(), n(2, 8), n(2, 2, 3), 1.0, True
    ),
    r"gated_add: got y \[2, 4, 8\], want \[2, 5, 8\]": lambda: gated_add(x(), x(2, 4)),
    r"gated_add: got gate \[2, 3\]": lambda: gated_add(x(), x(), n(2, 3)),
    r"gated_add: got gate \[1, 8\], want \[2, 8\]": lambda: gated_add(x(), x(), n(1, 8)),
    r"gated_add_norm: got weight \[3\]": lambda: gated_add_norm(x(), x(), None, n(3), n(8)),
    r"rms_norm: got weight \[3\], want \[8\]": lambda: rms_norm(x(), n(3)),
    r"qk_norm_rope: got k \[1, 5, 8\], want \[2, 5, 8\]": lambda: rope(k=x(1)),
    r"qk_norm_rope: got k \[2, 3, 8\], want \[2, 5, 8\]": lambda: rope(k=x(2, 3)),
    r"qk_norm_rope: got k torch.float64, want torch.float32": lambda: rope(k=x().double()),
    r"qk_norm_rope: got weight_q \[3\]": lambda: rope(w=n(3)),
    r"qk_norm_rope: got grid \[3, 3, 0\], want three sizes": lambda: rope(grid=(3, 3, 0)),
    r"qk_norm_rope: got 2 values in grid, want 3": lambda: rope(grid=(3, 3)),
    r"qk_norm_rope: got 5 tokens from offset 900 on, want .* of 8 tokens": lambda: rope(offset=900),
    r"qk_norm_rope: got 5 tokens from offset -1 on": lambda: rope(offset=-1),
    r"qk_norm_rope: got heads of 1 channels, want an even": lambda: rope(heads=8),
    r"qk_norm_rope: got 16 heads for width 8": lambda: rope(heads=16),
    r"qk_norm_rope: got 0 heads": lambda: rope(heads=0),
    r"qk_norm_rope_backward: got 5 tokens from offset 0 on": lambda: rope_backward(grid=(1, 1, 2)),
    r"qk_norm_rope_backward: got rstd \[1, 2, 5\]": lambda: rope_backward(rstd=n(1, 2, 5)),
    r"qk_norm_rope_backward: got dq \[2, 3, 2, 4\]": lambda: rope_backward(dq=n(2, 3, 2, 4)),
    r"bias_gelu: got bias \[8\], want \[4096\]": lambda: bias_gelu(n(1, 1, 4096), n(8)),
    r"bias_gelu_backward: got dg \[2, 3, 8\]": lambda: prfl.bias_gelu_backward(x(2, 3), x(), n(8), True),
    r"bias_gelu_backward: got wants_bias without": lambda: prfl.bias_gelu_backward(x(), x(), None, True),
    r"attention: got v \[1, 2, 2, 4\], want": lambda: attention(n(1, 3, 2, 4), n(1, 3, 2, 4), n(1, 2, 2, 4)),
    r"attention: got q \[1, 3, 2, 0\], want .* D > 0": lambda: attention(*[n(1, 3, 2, 0)] * 3),
    r"attention: got q \[\], want \[B, Lq, H, D\]": lambda: attention(n(), n(), n()),
    r"attention: got scale -1.0": lambda: attention(*[n(1, 3, 2, 4)] * 3, scale=-1.0),
    r"attention_backward: got dout \[1, 1, 2, 4\]": lambda: attention_backward(dout=n(1, 1, 2, 4)),
    r"attention_backward: got lse torch.float64": lambda: attention_backward(lse=n(1, 2, 3, dtype=F64)),
    r"reward_pool: got 5 tokens and 0 queries": lambda: reward_pool(x(), n(0, 8)),
    r"reward_pool: got 0 tokens": lambda: reward_pool(x(2, 0), n(3, 8)),
    r"reward_pool_backward: got scores \[2, 3, 3\]": lambda: pool_backward(scores=n(2, 3, 3)),
    r"reward_pool_backward: got lse \[1, 3\]": lambda: pool_backward(lse=n(1, 3)),
    r"merge: got lse \[2, 1, 3\], want \[2, 2, 3\]": lambda: merge(n(2, 2, 3, 8), n(2, 1, 3)),
    r"modulated_ffn: got w1 \[6, 7\], want \[6, 8\]": lambda: ffn(n(6, 7)),
    r"modulated_ffn: got w1_bias \[6\], want \[5\]": lambda: ffn(n(5, 8)),
    r"modulated_ffn: got shift \[2, 8\], want \[1, 8\]": lambda: ffn(batch=1),
    r"chunk: got 0, want": lambda: ffn(chunk=0),
    r"modulated_attention: got gate \[1, 8\], want \[2, 8\]": lambda: self_attention(gate=n(1, 8)),
    r"modulated_attention: got v \[8, 4\], want \[8, 8\]": lambda: self_attention(v=n(8, 4)),
    r"modulated_attention: got 16 heads for width 8": lambda: self_attention(heads=16),
    r"modulated_attention: got 5 tokens from offset 0 on": lambda: self_attention(grid=(1, 2, 2)),
    r"cross_attention: got context \[1, 3, 8\], want \[2, 3, 8\]": lambda: cross(n(1, 3, 8)),
    r"cross_attention: got 0 image tokens in a context of 0": lambda: cross(n(2, 0, 8)),
    r"cross_attention: got norm_k \[4\], want \[8\]": lambda: cross(norm_k=n(4)),
    r"cross_attention: got 3 heads for width 8": lambda: cross(heads=3),
}  # fmt: skip


@pytest.mark.parametrize("choice", ["", "reference"])
def test_misfits_are_named(choice):
    try:
        dispatch.configure(choice)
        for message, call in BAD.items():
            with pytest.raises(ValueError, match=f"^{message}.*$") as caught:
                call()
            assert "\n" not in str(caught.value)
    finally:
        dispatch.configure("")


def test_fake_tensors_are_refused_alike():
    for message, call in BAD.items():
        if "meta" not in message:
            with FakeTensorMode(), pytest.raises(ValueError, match=f"^{message}"):
                call()


@pytest.mark.skipif(compiled.absence("cpu", "cpu") is not None, reason="the extension is not built")
def test_a_view_keeps_its_tensor():
    """A strided bias is copied for the kernel; the copy must live until the kernel has run."""
    tensor = n(4, 4)
    assert compiled.view(tensor)[0] is tensor
    for width in (16, 512, 8960):
        h, bias = n(1, 8, width).requires_grad_(), n(2 * width)[::2].requires_grad_()
        g = bias_gelu(h, bias)
        want = torch.nn.functional.gelu(h + bias, approximate="tanh")
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-5)
        made, exact = (torch.autograd.grad(a.sum(), (h, bias)) for a in (g, want))
        torch.testing.assert_close(made, exact, rtol=1e-4, atol=1e-4)
