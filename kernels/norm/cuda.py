"""The fused addition and LayerNorm in CUDA C++ (csrc/cuda/norm.cu).

Rows in float32 or bfloat16, next to a bfloat16 residual in bfloat16 alone; C up to 5120, quick for 1536,
3072 and 5120. ValueError for anything else.
"""

from torch import Tensor

from prfl_kernels import cuda_kernels
from prfl_kernels.extension import CODES, supported
from prfl_kernels.jit import unit_last
from prfl_kernels.norm.launch import Backward, Forward


def _f32(a: Tensor | None, batch: int) -> Tensor | None:
    """A vector in float32, as [B, 2, C]."""
    return None if a is None else unit_last(a.float()).expand(batch, -1, -1)


def forward(a: Forward) -> None:
    """Fill a launch."""
    batch, length, width = a.x.shape
    y = a.x if a.y is None else a.y
    supported("norm", a.x, y)
    cuda_kernels.narrow("norm", width, a.x.dtype, y.dtype)
    a = a._replace(**{name: _f32(getattr(a, name), batch) for name in ("gate", "scale", "shift")})
    cuda_kernels.launch(
        "norm_forward", **a._asdict(), batch=batch, length=length, width=width, x_kind=CODES[a.x.dtype],
        y_kind=CODES[y.dtype], n_kind=CODES[a.x.dtype if a.n is None else a.n.dtype],
        aligned=cuda_kernels.aligned(width, a.x, a.y, a.gate, a.scale, a.shift, a.total, a.n),
    )  # fmt: skip


def backward(a: Backward) -> None:
    """Fill a launch."""
    batch, length, width = a.rows.shape
    residual = (a.dsum if a.x is None else a.x).dtype
    dn = residual if a.dn is None else a.dn.dtype
    y = dn if a.dy is None else a.dy.dtype
    supported("norm", a.dn, a.dsum, a.x, a.y)
    cuda_kernels.narrow("norm", width, residual, y, dn)
    a = a._replace(gate=_f32(a.gate, batch), scale=_f32(a.scale, batch))
    given = a._asdict()
    sums = given.pop("sums")
    library, size = cuda_kernels.library(), (batch, length, width, a.boundary)
    part, before = sums.new_empty(batch, library.row_runs(*size), a.slots, width), library.runs_before(*size)
    cuda_kernels.launch(
        "norm_backward", **given, part=part, before=before, batch=batch, length=length, width=width,
        x_kind=CODES[residual], y_kind=CODES[y], dn_kind=CODES[dn],
        wants_parameters=a.wants_parameters, wants_gate=a.wants_gate,
        aligned=cuda_kernels.aligned(width, a.dn, a.dsum, a.x, a.y, a.gate, a.scale, a.dx, a.dy),
    )  # fmt: skip
    a.add(part, before)
