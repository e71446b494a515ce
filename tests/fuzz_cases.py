"""Random valid inputs of every operation: shapes, strides, dtypes, empty batches and sequences."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels.attention.fp8 import attention_fp8, quantize_values
from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.bias_gelu import bias_gelu
from prfl_kernels.fp8.e4m3 import E4M3
from prfl_kernels.fp8.linear import fp8_linear
from prfl_kernels.fp8.quantize import quantize_fp8
from prfl_kernels.linear import linear
from prfl_kernels.norm.gated_add import gated_add, gated_add_modulate, gated_add_norm
from prfl_kernels.norm.op import layer_norm, modulate
from prfl_kernels.qk_norm_rope.op import qk_norm_rope, rms_norm
from prfl_kernels.reward_pool.op import reward_pool_with_lse
from prfl_kernels.solver_step import solver_step
from prfl_kernels.sublayers.cross_attention import ImageWeights, cross_attention
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights, LowRank
from prfl_kernels.sublayers.self_attention import modulated_attention

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KEEP = ("nothing", "attention", "projections", "all")


class Case(NamedTuple):
    run: Callable[..., tuple[Tensor, ...]]  # of *tensors and the dtype to compute in
    tensors: list[Tensor | None]
    dtype: torch.dtype


class Inputs:
    """Draws sizes, dtypes and tensors from one source of chance."""

    def __init__(self, rng: random.Random):
        self.rng, self.generator = rng, torch.Generator().manual_seed(rng.randrange(1 << 30))
        self.stream = self.choice(F32, F32, BF16, F16)
        self.half = self.stream in (BF16, F16)

    def choice(self, *options):
        return self.rng.choice(options)

    def floats(self) -> torch.dtype:
        return self.choice(F32, BF16)

    def rows(self) -> tuple[int, int, int]:
        # In 16 bits a narrow row's standard deviation may be nothing but rounding.
        widths = (16, 17, 48) if self.half else (1, 2, 3, 8, 17, 48)
        return self.choice(0, 1, 2, 3), self.choice(0, 1, 2, 5, 17, 40), self.choice(*widths)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers in one of the layouts that torch's own operations give."""
        layout = self.choice("plain", "every second", "part", "transposed", "expanded")

        def made(sizes):
            return (torch.randn(sizes, generator=self.generator) * scale).to(dtype or self.floats())

        if layout == "every second":
            return made((*shape[:-1], 2 * shape[-1]))[..., ::2]
        if layout == "part":
            return made([n + 1 for n in shape])[tuple(slice(1, None) for _ in shape)]
        if layout == "transposed":
            return made(shape[::-1]).permute(*reversed(range(len(shape))))
        if layout == "expanded":
            return made((1, *shape[1:])).expand(shape)
        return made(shape)

    def matrix(self, outputs: int, inputs: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor(outputs, inputs, dtype=dtype, scale=inputs**-0.5)


def _boundary(i: Inputs, length: int, *vectors: Tensor | None) -> dict[str, int]:
    """A boundary for vectors of which some are [B, 2, C]."""
    two = any(a is not None and a.dim() == 3 for a in vectors)
    return {"boundary": i.rng.randint(0, length)} if two else {}


def _modulate(i: Inputs, op=modulate):
    batch, length, width = i.rows()
    shape = i.choice((batch, width), (width,), *([(batch, 2, width)] if op is modulate else []))
    tensors = [i.tensor(batch, length, width, dtype=i.stream), i.tensor(*shape), i.tensor(*shape)]
    more = _boundary(i, length, *tensors[1:])
    return Case(lambda *a: op(*a[:-1], out_dtype=a[-1], **more), tensors, i.choice(i.stream, i.floats()))


def _layer_norm(i: Inputs):
    return _modulate(i, layer_norm)


def _gated_add(i: Inputs):
    batch, length, width = i.rows()
    y = i.tensor(batch, length, width, dtype=F16 if i.stream == F16 else None)
    gate = i.choice(None, i.tensor(batch, width), i.tensor(batch, 2, width))
    tensors, more = [i.tensor(batch, length, width, dtype=i.stream), y, gate], _boundary(i, length, gate)
    return Case(lambda *a: gated_add(*a[:-1], **more), tensors, F32)


def _gated_add_modulate(i: Inputs, op=gated_add_modulate):
    batch, length, width = i.rows()
    shape = i.choice((batch, width), (width,), *([(batch, 2, width)] if op is gated_add_modulate else []))
    rows = [i.tensor(batch, length, width, dtype=dtype) for dtype in (i.stream, i.stream)]
    gate = i.choice(None, i.tensor(batch, width), i.tensor(batch, 2, width))
    tensors = [*rows, gate, i.tensor(*shape), i.tensor(*shape)]
    more = _boundary(i, length, *tensors[2:])
    return Case(lambda *a: op(*a[:-1], out_dtype=a[-1], **more), tensors, i.choice(i.stream, i.floats()))


def _gated_add_norm(i: Inputs):
    return _gated_add_modulate(i, gated_add_norm)


def _rms_norm(i: Inputs):
    shape = i.rows()
    tensors = [i.tensor(*shape, dtype=i.stream), i.tensor(shape[2])]
    return Case(lambda *a: rms_norm(*a[:-1]), tensors, F32)


def _places(i: Inputs) -> tuple[int, int, int, int, tuple[int, int, int], int]:
    """(batch, length, width, heads, grid, offset)."""
    heads, dim = i.choice(1, 2, 3), i.choice(16, 18) if i.half else i.choice(2, 4, 6, 18)
    grid = tuple(i.choice(1, 2, 3, 5) for _ in range(3))
    tokens = grid[0] * grid[1] * grid[2]
    length = min(tokens, i.choice(0, 1, 4, 30))
    return i.choice(0, 1, 2), length, heads * dim, heads, grid, i.rng.randint(0, tokens - length)


def _qk_norm_rope(i: Inputs):
    batch, length, width, heads, grid, offset = _places(i)
    rows = [i.tensor(batch, length, width, dtype=i.stream) for _ in range(2)]
    tensors = [*rows, i.tensor(width), i.tensor(width)]
    return Case(lambda *a: qk_norm_rope(*a[:-1], grid, heads, offset=offset), tensors, F32)


def _bias_gelu(i: Inputs):
    shape = i.rows()
    tensors = [i.tensor(*shape, dtype=i.stream), i.choice(None, i.tensor(shape[2]))]
    return Case(lambda *a: bias_gelu(*a[:-1]), tensors, F32)


def _attention(i: Inputs):
    batch, heads, dim = i.choice(0, 1, 2), i.choice(1, 2, 3), i.choice(1, 3, 8, 17, 40)
    q = i.tensor(batch, i.choice(0, 1, 7, 33), heads, dim, dtype=i.stream)
    keys = i.choice(1, 2, 9, 70)
    k, v = (i.tensor(batch, keys, heads, dim, dtype=i.stream) for _ in range(2))
    repeats = i.choice(1, 3)
    return Case(lambda *a: attention_with_lse(*a[:-1], repeats=repeats), [q, k, v], F32)


def _reward_pool(i: Inputs):
    batch, length, width = i.rows()
    x = i.tensor(batch, length + 1, width, dtype=i.stream)
    return Case(lambda *a: reward_pool_with_lse(*a[:-1]), [x, i.matrix(i.choice(1, 3, 9), width)], F32)


def _updates(i: Inputs, sizes: dict[str, tuple[int, int]]) -> tuple[list[str], list[Tensor]]:
    """Low-rank updates of some of the weights: their names, and A and B of each."""
    names = [name for name in sizes if i.choice(True, False)]
    rank = i.choice(1, 4)
    return names, sum(([i.matrix(rank, sizes[k][1]), i.matrix(sizes[k][0], rank)] for k in names), [])


def _low(names: list[str], tensors: list[Tensor]) -> dict[str, LowRank]:
    return {k: LowRank(tensors[2 * n], tensors[2 * n + 1], 0.5) for n, k in enumerate(names)}


def _modulated_ffn(i: Inputs):
    batch, length, width = i.rows()
    hidden = i.choice(1, 8, 33)
    names, low = _updates(i, {"w1": (hidden, width), "w2": (width, hidden)})
    x, y = (i.tensor(batch, length, width, dtype=F32) for _ in range(2))
    sizes = i.choice((batch, width), (batch, 2, width))
    vectors = [i.tensor(*sizes) for _ in range(3)]
    more = _boundary(i, length, *vectors)
    weights = i.matrix(hidden, width), i.tensor(hidden), i.matrix(width, hidden), i.tensor(width)
    keep, chunk, y = i.choice(*KEEP), i.choice(None, 1, 7), i.choice(None, y)

    def run(x, y, shift, scale, gate, *rest):
        *rest, dtype = rest
        low = _low(names, rest[4:])
        return modulated_ffn(
            x, y, shift, scale, gate, FFNWeights(*rest[:4]), dtype=dtype, keep=keep, low=low, chunk=chunk,
            **more,
        )  # fmt: skip

    return Case(run, [x, y, *vectors, *weights, *low], F32)


def _projections(i: Inputs, width: int, count: int) -> list[Tensor]:
    return sum(([i.matrix(width, width), i.tensor(width)] for _ in range(count)), [])


def _modulated_attention(i: Inputs):
    batch, length, width, heads, grid, offset = _places(i)
    names, low = _updates(i, dict.fromkeys("qkvo", (width, width)))
    sizes = i.choice((batch, width), (batch, 2, width))
    tensors = [i.tensor(batch, length, width, dtype=F32), *(i.tensor(*sizes) for _ in range(3))]
    more = _boundary(i, length, *tensors[1:])
    tensors += [*_projections(i, width, 4), *(i.tensor(width) for _ in range(4))]
    keep, chunk, ends = i.choice(*KEEP), i.choice(None, 1, 7), i.choice(True, False)

    def run(x, shift, scale, gate, *rest):
        *rest, dtype = rest
        made = modulated_attention(
            x, shift, scale, gate, AttentionWeights(*rest[:10]), grid, heads, offset=offset,
            norm=tuple(rest[10:12]) if ends else None, dtype=dtype, keep=keep, low=_low(names, rest[12:]),
            chunk=chunk, **more,
        )  # fmt: skip
        return (made.x, made.n) if ends else made.x

    tensors[14:16] = tensors[14:16] if ends else [None, None]
    return Case(run, [*tensors, *low], F32)


def _cross_attention(i: Inputs):
    batch, length, heads, dim = i.choice(0, 1, 2), i.choice(0, 1, 5, 33), i.choice(1, 3), i.choice(1, 8, 17)
    width, picture = heads * dim, i.choice(0, 0, 4)
    x = i.tensor(batch, length, width, dtype=F32)
    context = i.tensor(batch, picture + i.choice(1, 9), width)
    weights = [*_projections(i, width, 4), i.tensor(width), i.tensor(width)]
    image = [*_projections(i, width, 2), i.tensor(width)] if picture else []
    updated = ("q", "k", "v", "o", "k_img", "v_img") if picture else "qkvo"
    names, low = _updates(i, dict.fromkeys(updated, (width, width)))
    keep, repeats = i.choice(*KEEP), i.choice(1, 3)

    def run(x, context, *rest):
        *rest, dtype = rest
        image_weights = ImageWeights(*rest[10:15]) if picture else None
        weights, low = AttentionWeights(*rest[:10]), _low(names, rest[10 + len(image) :])
        return cross_attention(
            x, context, weights, heads, image_weights, picture, dtype=dtype, keep=keep, repeats=repeats,
            low=low,
        )  # fmt: skip

    return Case(run, [x, context, *weights, *image, *low], F32)


def _solver_step(i: Inputs):
    shape = i.rows()
    held = [i.tensor(*shape, dtype=i.stream) for _ in range(4)]
    columns = i.tensor(shape[0], 9)
    return Case(lambda *a: solver_step(*a[:-1], columns.to(a[0].dtype)), [*held, i.tensor(*shape)], F32)


def _linear(i: Inputs):
    groups, rows = i.choice(0, 2), i.choice(0, 1, 5)
    outputs, inputs, rank = i.choice(1, 3, 17), i.choice(1, 8, 17), i.choice(1, 4)
    if i.choice(True, False):
        x, weight = i.tensor(groups, rows, inputs, dtype=i.stream), i.tensor(groups, outputs, inputs)
        return Case(lambda x, w, _: (linear(x, w),), [x, weight], i.stream)
    shape = i.choice((rows,), (groups, rows), ())
    tensors = [i.tensor(*shape, inputs, dtype=i.stream), i.matrix(outputs, inputs), i.tensor(outputs)]
    tensors += [i.matrix(rank, inputs), i.matrix(outputs, rank)]
    return Case(lambda x, w, b, *low: (linear(x, w, b, LowRank(*low[:2], 0.5)),), tensors, i.stream)


DIFFERENTIABLE = {
    f.__name__.strip("_"): f
    for f in (
        _modulate, _layer_norm, _gated_add, _gated_add_modulate, _gated_add_norm, _rms_norm, _qk_norm_rope,
        _bias_gelu, _attention, _reward_pool, _modulated_ffn, _modulated_attention, _cross_attention,
        _solver_step, _linear,
    )
}  # fmt: skip


def _quantize_fp8(i: Inputs):
    return Case(lambda x, _: quantize_fp8(x, True), [i.tensor(*i.rows(), dtype=i.stream)], F32)


def _fp8_linear(i: Inputs):
    rows, outputs, inputs = i.choice((), (0,), (2, 3)), i.choice(16, 32), i.choice(16, 48)
    x, w = i.tensor(*rows, inputs).to(E4M3), i.tensor(outputs, inputs).to(E4M3)
    scales = torch.rand(rows), i.tensor(outputs, dtype=F32)
    return Case(lambda *a: fp8_linear(*a[:-1]), [x, scales[0], w, scales[1], i.tensor(outputs)], F32)


def _attention_fp8(i: Inputs):
    batch, heads, length, keys = i.choice(0, 1, 2), i.choice(1, 2), i.choice(0, 1, 5), i.choice(1, 3, 130)
    q, k, v = (i.tensor(batch, n, heads, 64) for n in (length, keys, keys))
    scales = [torch.rand(a.shape[:3]) for a in (q, k)]

    def run(q, k, v, *scales):
        return attention_fp8(q.to(E4M3), scales[0], k.to(E4M3), scales[1], *quantize_values(v))

    return Case(run, [q, k, v, *scales], F32)


FORWARD_ONLY = {f.__name__.strip("_"): f for f in (_quantize_fp8, _fp8_linear, _attention_fp8)}
