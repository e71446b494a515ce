"""Attention, self and cross, in 16 bits and on e4m3 values."""

from functools import partial

from torch import Tensor

from prfl_bench import formulas
from prfl_bench.formulas import quantized
from prfl_bench.operations.record import BF16, Operation
from prfl_bench.shapes import Shape
from prfl_kernels.attention import fp8, triton_kernels
from prfl_kernels.attention import op as attention


def _qkv(s: Shape, cross: bool) -> list[Tensor]:
    keys = s.text if cross else s.tokens
    return [s.per_head(), s.per_head(keys), s.per_head(keys)]


def products(cross: bool, s: Shape) -> tuple[int, int]:
    """FLOP of the products, forward and backward."""
    product = 2 * s.batch * s.tokens * (s.text if cross else s.tokens) * s.heads * s.head_dim
    return 2 * product, 5 * product


def _attention(kind: str) -> Operation:
    cross = kind == "cross"

    def backward_inputs(s):
        lse = s.statistics(s.batch, s.heads, s.tokens)
        return [s.per_head(), None, *_qkv(s, cross), s.per_head(), lse]

    return Operation(
        f"attention, {kind}", "attention",
        lambda s: _qkv(s, cross),
        lambda s, *inputs: attention.attention(*inputs),
        lambda s, *inputs: formulas.attention(*inputs),
        wanted=(0, 1, 2),
        flops=partial(products, cross),
        divided="heads",
        reads=lambda inputs, outputs: [*inputs, *outputs],
        peers={"sdpa": lambda s, *inputs: formulas.sdpa(*inputs)},
        launch=lambda s, *inputs: triton_kernels.forward(*inputs, s.head_dim**-0.5),
        backward=(backward_inputs, lambda s, *a: triton_kernels.backward(*a, s.head_dim**-0.5)),
        kind="attention",
        streams=(BF16,),
    )  # fmt: skip


def _attention_fp8(kind: str) -> Operation:
    """Beside attention in dtype on the same values."""
    cross = kind == "cross"

    def inputs(s):
        q, k, v = _qkv(s, cross)
        return [*quantized(q), *quantized(k), *fp8.quantize_values(v)]

    def values(s, q, q_scale, k, k_scale, v, v_scale):
        v = fp8._natural(v.to(s.dtype))[..., : k.shape[1]] * v_scale[..., None]
        return [(a.to(s.dtype) * b[..., None]).to(s.dtype) for a, b in ((q, q_scale), (k, k_scale))] + [
            v.permute(0, 3, 1, 2).to(s.dtype).contiguous()
        ]

    def yardstick(s, *inputs):
        return fp8.attention_fp8_reference(*inputs, s.head_dim**-0.5)[0].bfloat16()

    return Operation(
        f"attention_fp8, {kind}", "attention_fp8", inputs,
        lambda s, *inputs: fp8.attention_fp8(*inputs)[0],
        lambda s, *inputs: formulas.attention(*inputs),
        flops=partial(products, cross),
        rate="fp8",
        divided="heads",
        prepare=values,
        peers={"sdpa": lambda s, *inputs: formulas.sdpa(*inputs)},
        yardstick=yardstick,
        launch=lambda s, *inputs: fp8.launch_forward(*inputs, s.head_dim**-0.5),
        kind="attention",
        streams=(BF16,),
    )  # fmt: skip


def _quantize_values() -> Operation:
    """A part of attention_fp8."""

    def inputs(s):
        v = s.projected()[2].unflatten(2, (s.model.heads, -1))
        return [v, s.statistics(s.batch, s.model.heads, s.head_dim)]

    def launch(s, v, inverse):
        return [fp8.launch_quantize(v, inverse, fp8.padded_length(s.length))]

    return Operation(
        "quantize_values", "attention_fp8", inputs, None, None, launch=launch, streams=(BF16,)
    )


OPERATIONS = _attention("self"), _attention("cross")
FP8 = _quantize_values(), _attention_fp8("self"), _attention_fp8("cross")
