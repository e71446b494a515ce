"""The fused addition and LayerNorm in C++ for the CPU (csrc/cpu/norm.cpp).

float32 and bfloat16, float32 inside, no fp8. Sums over tokens are made over a number of runs that depends on
the shapes alone and then added in order, so results are the same bits for any number of threads.
"""

from prfl_kernels import extension
from prfl_kernels.extension import empty, launch, supported
from prfl_kernels.norm.launch import Backward, Forward, runs


def forward(a: Forward) -> None:
    """Fill a launch. ValueError for dtypes but float32 and bfloat16."""
    supported("norm", a.x, a.y, a.gate, a.scale, a.shift, a.n)
    given = a._asdict()
    del given["quant"]
    batch, length, width = a.x.shape
    launch("norm_forward", **given, batch=batch, length=length, width=width)


def backward(a: Backward) -> None:
    """Fill a launch. ValueError for dtypes but float32 and bfloat16."""
    if a.dn is not None and a.dsum is not None:
        a = a._replace(dsum=a.dsum.to(a.x.dtype))
    if a.y is not None and a.dy is not None:
        a = a._replace(y=a.y.to(a.dy.dtype))
    supported("norm", *a.inputs, a.dy)
    batch, length, width = a.rows.shape
    tokens = -(-length // extension.runs(length))
    count, before = runs(length, a.boundary, tokens)
    part = empty(a.sums, batch, count, a.slots, width) if a.slots else None
    launch(
        "norm_backward", **a._asdict(), part=part, batch=batch, length=length, width=width, runs=count,
        tokens=tokens, before=before, sides=a.sums.shape[1], wants_parameters=a.wants_parameters,
    )  # fmt: skip
