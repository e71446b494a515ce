"""What launches of the CUDA C++ kernels of csrc/cuda share.

The kernels work in units of 16 bytes: tensors that allow no such access are copied or refused, and
ValueError names what a kernel is not made for.
"""

from types import ModuleType

import torch
from torch import Tensor

from prfl_kernels import extension

VECTOR = 16  # bytes
_view = extension.view  # of every tensor that goes to a launcher


def library() -> ModuleType:
    """The extension that holds the launchers."""
    return extension.extension()


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _supported(name: str, *tensors: Tensor | None) -> None:
    for a in tensors:
        if a is not None and a.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: got {a.dtype}, want float32 or bfloat16")


def _vectors(a: Tensor) -> bool:
    """Whether every row of a begins at a multiple of 16 bytes."""
    strides = zip(a.shape[:-1], a.stride(), strict=False)
    steps = [a.data_ptr(), *(s * a.element_size() for n, s in strides if n > 1)]
    return a.stride(-1) == 1 and not any(step % VECTOR for step in steps)


def _aligned(width: int, *tensors: Tensor | None) -> bool:
    return width % 8 == 0 and all(_vectors(a) for a in tensors if a is not None)


def _narrow(name: str, width: int, stream: torch.dtype, *others: torch.dtype) -> None:
    """A bfloat16 stream meets bfloat16 alone."""
    if width > library().norm_width:
        raise ValueError(f"{name}: got width {width}, want at most {library().norm_width}")
    if stream == torch.bfloat16 and torch.float32 in others:
        raise ValueError(f"{name}: got float32 rows beside a bfloat16 stream, want bfloat16")


