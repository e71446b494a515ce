"""What the FFN is made of: bias and GELU, and in e4m3 the rows that go into a product and the product."""

import torch.nn.functional as F

from prfl_bench import formulas
from prfl_bench.formulas import quantized
from prfl_bench.operations.record import BF16, Operation
from prfl_kernels import bias_gelu
from prfl_kernels.fp8 import linear, quantize
from prfl_kernels.jit import wide


def _bias_gelu() -> Operation:
    return Operation(
        "bias_gelu", "bias_gelu",
        lambda s: [s.hidden(), s.normal(s.model.ffn)],
        lambda s, *inputs: bias_gelu.bias_gelu(*inputs),
        lambda s, *inputs: formulas.bias_gelu(*inputs),
        wanted=(0, 1),
        launch=lambda s, *inputs: [bias_gelu.forward(bias_gelu.triton_forward, *inputs)],
        backward=(
            lambda s: [s.hidden(), s.hidden(), s.normal(s.model.ffn)],
            lambda s, *inputs: bias_gelu.backward(bias_gelu.triton_backward, *inputs, True),
        ),
        streams=(BF16,),
    )  # fmt: skip


def _quantize_fp8(gelu: bool) -> Operation:
    """What comes out of attention, or out of the FFN's first product, as rows of e4m3."""

    def values(s, x):
        return F.gelu(x.to(wide(x.dtype)), approximate="tanh") if gelu else x

    return Operation(
        "quantize_fp8" + ", gelu" * gelu, "quantize_fp8",
        lambda s: [s.hidden() if gelu else s.rows()],
        lambda s, x: quantize.quantize_fp8(x, gelu),
        lambda s, x: quantized(values(s, x)),
        exact=values,
        decode=lambda out, scale: [out.double() * scale[..., None]],
        launch=lambda s, x: quantize.forward(quantize.triton_fill, x, gelu),
        streams=(BF16,),
    )  # fmt: skip


def _fp8_linear() -> Operation:
    """The FFN's first projection, beside the linear layer in dtype on the same values."""

    def inputs(s):
        weight = s.normal(s.model.ffn, s.model.width) * s.model.width**-0.5
        return [*quantized(s.rows()), *linear.quantize_weight(weight), s.normal(s.model.ffn)]

    def values(s, x, x_scale, w, w_scale, bias):
        pairs = (x, x_scale), (w, w_scale)
        return [*((a.to(s.dtype) * b[..., None]).to(s.dtype) for a, b in pairs), bias.to(s.dtype)]

    return Operation(
        "fp8_linear", "fp8_linear", inputs,
        lambda s, *inputs: linear.fp8_linear(*inputs, s.dtype),
        lambda s, *inputs: F.linear(*inputs),
        flops=lambda s: (2 * s.batch * s.length * s.model.width * s.model.ffn, 0),
        rate="fp8",
        prepare=values,
    )  # fmt: skip


OPERATIONS = (_bias_gelu(),)
FP8 = _quantize_fp8(gelu=False), _quantize_fp8(gelu=True), _fp8_linear()
