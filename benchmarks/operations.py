"""What the kernel ledger and `prfl tune` run: the shapes of Wan2.1, and the launchers of every operation.

A line in ENTRIES is all that a new kernel needs: a function from a shape to the operation's inputs and
outputs that calls the launcher on the way, with tensors that `empty` makes. They are meta tensors, unless
`tensors` gives others.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import bias_gelu
from prfl_kernels.attention import fp8 as attention_fp8
from prfl_kernels.attention import triton_kernels as attention_triton
from prfl_kernels.fp8 import quantize as quantize_fp8
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.norm import op as norm
from prfl_kernels.norm import triton_kernels as norm_triton
from prfl_kernels.qk_norm_rope import op as qk_norm_rope
from prfl_kernels.qk_norm_rope import triton_kernels as norm_rope
from prfl_kernels.reward_pool import op as reward_pool
from prfl_kernels.reward_pool import triton_kernels as pool_triton

F32, BF16 = torch.float32, torch.bfloat16
WIDTHS = {"14B": (5120, 40), "1.3B": (1536, 12)}  # width and heads
FFN = {"14B": 13824, "1.3B": 8960}
GRIDS = {32760: (21, 30, 52), 75600: (21, 45, 80)}  # 81 frames at 480 x 832 and at 720 x 1280
HEAD_DIM, TEXT = 128, 512


class Case(NamedTuple):
    """A shape: the model, its tokens, the dtype of the residual stream, and over how many GPUs the
    heads are divided."""

    model: str
    length: int
    stream: torch.dtype
    shards: int = 1

    @property
    def width(self) -> int:
        return WIDTHS[self.model][0]

    @property
    def heads(self) -> int:
        return max(1, WIDTHS[self.model][1] // self.shards)

    @property
    def grid(self) -> tuple[int, int, int]:
        return GRIDS.get(self.length, (1, 1, self.length))

    def rows(self, dtype: torch.dtype = BF16) -> Tensor:
        return empty(1, self.length, self.width, dtype=dtype)

    def residual(self) -> Tensor:
        return self.rows(self.stream)

    def modulation(self) -> Tensor:
        """One of the six vectors of a block, a slice of [B, 6, C]."""
        return empty(1, 6, self.width)[:, 1]

    def vector(self) -> Tensor:
        return empty(self.width)

    def stats(self) -> Tensor:
        return empty(2, 1, self.length)

    def projected(self) -> tuple[Tensor, ...]:
        """q, k and v before the norm, slices of the buffer of all three."""
        return empty(1, self.length, 3 * self.width, dtype=BF16).chunk(3, dim=-1)

    def per_head(self, dtype: torch.dtype = BF16) -> Tensor:
        return empty(1, self.length, self.heads, HEAD_DIM, dtype=dtype)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_make = [_meta]


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return _make[-1](shape, dtype)


@contextmanager
def tensors(make: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Iterator[None]:
    """Let the entries call their launchers with tensors of make(shape, dtype), not with meta tensors."""
    _make.append(make)
    try:
        yield
    finally:
        _make.pop()


def _norm(s: Case, vector: Callable, out_dtype: torch.dtype, base: float = 1.0) -> Iterable:
    x, scale, shift = s.residual(), vector(), vector()
    made = norm.forward(norm_triton.forward, x, None, None, scale, shift, base, 1e-6, out_dtype)
    return x, scale, shift, *made


def _norm_backward(s: Case, vector: Callable, base: float = 1.0) -> Iterable:
    dn, x, scale, stats = s.rows(), s.residual(), vector(), s.stats()
    made = norm.backward(norm_triton.backward, dn, None, x, None, None, scale, stats, base, True, None)
    return dn, x, scale, stats, *made


def _gated_add(s: Case) -> Iterable:
    x, y, gate = s.residual(), s.rows(), s.modulation()
    return x, y, gate, *norm.forward(norm_triton.forward, x, y, gate, None, None, 0.0, 0.0, None)


def _gated_add_backward(s: Case) -> Iterable:
    dsum, y, gate = s.residual(), s.rows(), s.modulation()
    made = norm.backward(norm_triton.backward, None, dsum, None, y, gate, None, None, 0.0, False, BF16)
    return dsum, y, gate, *made


def _gated_norm(s: Case, vector: Callable, base: float, out_dtype: torch.dtype = BF16) -> Iterable:
    x, y, gate, scale, shift = s.residual(), s.rows(), s.modulation(), vector(), vector()
    made = norm.forward(norm_triton.forward, x, y, gate, scale, shift, base, 1e-6, out_dtype)
    return x, y, gate, scale, shift, *made


def _gated_norm_backward(s: Case, vector: Callable, base: float) -> Iterable:
    dn, dsum, x, y = s.rows(), s.residual(), s.residual(), s.rows()
    gate, scale, stats = s.modulation(), vector(), s.stats()
    made = norm.backward(norm_triton.backward, dn, dsum, x, y, gate, scale, stats, base, True, BF16)
    return dn, dsum, x, y, gate, scale, stats, *made


def _qk(s: Case, fp8: bool = False) -> Iterable:
    q, k, _ = s.projected()
    weights = s.vector(), s.vector()
    made = qk_norm_rope.forward(norm_rope.forward, q, k, *weights, s.grid, s.heads, 1e-6, 0, fp8)
    return q, k, *weights, *made[0], *made[1], made[2]


def _qk_backward(s: Case) -> Iterable:
    q, k, _ = s.projected()
    held = s.per_head(), s.per_head(), q, k, s.vector(), s.vector(), s.stats()
    return *held, *qk_norm_rope.backward(norm_rope.backward, *held, s.grid, s.heads, 0, True)


def _rms(s: Case) -> Iterable:
    x, weight = s.rows(), s.vector()
    made = qk_norm_rope.forward(norm_rope.forward, x, None, weight, None, None, 1, 1e-6, 0)
    return x, weight, made[0][0], made[2]


def _rms_backward(s: Case) -> Iterable:
    dn, x, weight, rstd = s.rows(), s.rows(), s.vector(), s.stats()[:1]
    fill = norm_rope.backward
    made = qk_norm_rope.backward(fill, dn, None, x, None, weight, None, rstd, None, 1, 0, True)
    return dn, x, weight, rstd, made[0], made[2][0]


def _gelu(s: Case) -> Iterable:
    h, bias = empty(1, s.length, FFN[s.model], dtype=BF16), empty(FFN[s.model])
    return h, bias, bias_gelu.forward(bias_gelu.triton_forward, h, bias)


def _gelu_backward(s: Case) -> Iterable:
    dg, h = (empty(1, s.length, FFN[s.model], dtype=BF16) for _ in range(2))
    bias = empty(FFN[s.model])
    return dg, h, bias, *bias_gelu.backward(bias_gelu.triton_backward, dg, h, bias, True)


def _gelu_fp8(s: Case) -> Iterable:
    h = empty(1, s.length, FFN[s.model], dtype=BF16)
    return h, *quantize_fp8.launch(h, True)


def _rows_fp8(s: Case) -> Iterable:
    x = s.rows()
    return x, *quantize_fp8.launch(x, False)


POOL_QUERIES = 8  # one learned query with the 8 heads of the official reward model


def _pool(s: Case) -> Iterable:
    x, u = s.residual(), empty(POOL_QUERIES, s.width)
    return x, u, *reward_pool.forward(pool_triton.forward, x, u)


def _pool_backward(s: Case) -> Iterable:
    x, u, scores = s.residual(), empty(POOL_QUERIES, s.width), empty(1, s.length, POOL_QUERIES)
    dpooled, lse, delta = empty(1, POOL_QUERIES, s.width), empty(1, POOL_QUERIES), empty(1, POOL_QUERIES)
    inputs = dpooled, delta, x, u, scores, lse
    made = reward_pool.backward(pool_triton.backward, *inputs, True, True)
    return x, u, scores, dpooled, lse, delta, *made


def _qkv(s: Case, keys: int | None) -> list[Tensor]:
    k, v = (empty(1, keys or s.length, s.heads, HEAD_DIM, dtype=BF16) for _ in range(2))
    return [s.per_head(BF16), k, v]


def _attention(s: Case, keys: int | None = None) -> Iterable:
    q, k, v = _qkv(s, keys)
    return q, k, v, *attention_triton.forward(q, k, v, HEAD_DIM**-0.5)


def _attention_backward(s: Case, keys: int | None = None) -> Iterable:
    q, k, v = _qkv(s, keys)
    held = s.per_head(BF16), None, q, k, v, s.per_head(BF16), empty(1, s.heads, s.length)
    return *held, *attention_triton.backward(*held, HEAD_DIM**-0.5)


def _attention_fp8(s: Case, keys: int | None = None) -> Iterable:
    keys = keys or s.length
    q, q_scale = s.per_head(E4M3), empty(1, s.length, s.heads)
    k, k_scale = empty(1, keys, s.heads, HEAD_DIM, dtype=E4M3), empty(1, keys, s.heads)
    padded = attention_fp8.padded_length(keys)
    v, v_scale = empty(1, s.heads, HEAD_DIM, padded, dtype=E4M3), empty(1, s.heads, HEAD_DIM)
    held = q, q_scale, k, k_scale, v, v_scale
    return *held, *attention_fp8.launch_forward(*held, HEAD_DIM**-0.5)


def _quantize_values(s: Case) -> Iterable:
    v = s.projected()[2].unflatten(2, (s.heads, HEAD_DIM))
    inverse = empty(1, s.heads, HEAD_DIM)
    return v, inverse, attention_fp8.launch_quantize(v, inverse, attention_fp8.padded_length(s.length))


class Entry(NamedTuple):
    """An operation: call(case) makes its launches and returns its inputs and outputs, None allowed."""

    op: str
    call: Callable[[Case], Iterable[Tensor | None]]
    kind: str = "memory"  # bound by memory, or "matrix", or "attention": matrix with tiles to check
    streams: tuple[torch.dtype, ...] = (F32, BF16)  # the one dtype, where the stream does not matter


ENTRIES = (
    Entry("modulate", lambda s: _norm(s, s.modulation, BF16)),
    Entry("modulate backward", lambda s: _norm_backward(s, s.modulation)),
    Entry("modulate_fp8", lambda s: _norm(s, s.modulation, E4M3)),
    Entry("layer_norm", lambda s: _norm(s, s.vector, BF16, 0.0)),
    Entry("layer_norm backward", lambda s: _norm_backward(s, s.vector, 0.0)),
    Entry("gated_add", _gated_add),
    Entry("gated_add backward", _gated_add_backward),
    Entry("gated_add_modulate", lambda s: _gated_norm(s, s.modulation, 1.0)),
    Entry("gated_add_modulate backward", lambda s: _gated_norm_backward(s, s.modulation, 1.0)),
    Entry("gated_add_modulate_fp8", lambda s: _gated_norm(s, s.modulation, 1.0, E4M3)),
    Entry("gated_add_norm", lambda s: _gated_norm(s, s.vector, 0.0)),
    Entry("gated_add_norm backward", lambda s: _gated_norm_backward(s, s.vector, 0.0)),
    Entry("gated_add_norm_fp8", lambda s: _gated_norm(s, s.vector, 0.0, E4M3)),
    Entry("qk_norm_rope", _qk, streams=(BF16,)),
    Entry("qk_norm_rope_fp8", lambda s: _qk(s, True), streams=(BF16,)),
    Entry("qk_norm_rope backward", _qk_backward, streams=(BF16,)),
    Entry("rms_norm", _rms, streams=(BF16,)),
    Entry("rms_norm backward", _rms_backward, streams=(BF16,)),
    Entry("bias_gelu", _gelu, streams=(BF16,)),
    Entry("bias_gelu backward", _gelu_backward, streams=(BF16,)),
    Entry("quantize_fp8", _rows_fp8, streams=(BF16,)),
    Entry("quantize_fp8, gelu", _gelu_fp8, streams=(BF16,)),
    Entry("reward_pool", _pool),
    Entry("reward_pool backward", _pool_backward),
    Entry("quantize_values", _quantize_values, streams=(BF16,)),
    Entry("attention, self", _attention, "attention", (BF16,)),
    Entry("attention, self backward", _attention_backward, "attention", (BF16,)),
    Entry("attention, cross", lambda s: _attention(s, TEXT), "attention", (BF16,)),
    Entry("attention, cross backward", lambda s: _attention_backward(s, TEXT), "attention", (BF16,)),
    Entry("attention_fp8, self", _attention_fp8, "attention", (BF16,)),
    Entry("attention_fp8, cross", lambda s: _attention_fp8(s, TEXT), "attention", (BF16,)),
)


def cases(quick: bool, entries: Iterable[Entry] = ENTRIES) -> list[tuple[Entry, Case]]:
    """Every operation at every shape; quick: at 32,760 tokens alone."""
    return [
        (entry, Case(model, length, stream))
        for length in GRIDS
        if not (quick and length != min(GRIDS))
        for model in WIDTHS
        for entry in entries
        for stream in entry.streams
    ]
