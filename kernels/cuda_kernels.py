"""What launches of the CUDA C++ kernels of csrc/cuda share.

The kernels work in units of 16 bytes: tensors that allow no such access are copied or refused, and
ValueError names what a kernel is not made for.
"""

from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

from prfl_kernels import extension

VECTOR = 16  # bytes
_view = extension.view  # of every tensor that goes to a launcher


def library() -> ModuleType:
    """The extension that holds the launchers."""
    return extension.extension()


def launch(name: str, **arguments: Tensor | float | None) -> None:
    """Run a launcher of csrc/cuda/bind.cpp on the device of its tensors and that device's current stream.

    `arguments` are its keywords: tensors, None for an absent one, and numbers. Raises ValueError if the
    tensors are on different devices, TypeError for a keyword that is missing, unknown or of a wrong type, and
    RuntimeError if CUDA refuses the launch.
    """
    tensors = {word: a for word, a in arguments.items() if isinstance(a, Tensor)}
    device = _device(name, tensors)
    given = extension.keywords(arguments, _view)
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
        getattr(library(), name)(**given, stream=stream)


def _device(name: str, tensors: dict[str, Tensor]) -> torch.device:
    """The device that all tensors are on."""
    (first, a), *others = tensors.items()
    for word, other in others:
        if other.device != a.device:
            raise ValueError(
                f"{name}: got {first} on {a.device} and {word} on {other.device}, want one device"
            )
    return a.device


def vectors(a: Tensor) -> bool:
    """Whether every row of a begins at a multiple of 16 bytes."""
    strides = zip(a.shape[:-1], a.stride(), strict=False)
    steps = [a.data_ptr(), *(s * a.element_size() for n, s in strides if n > 1)]
    return a.stride(-1) == 1 and not any(step % VECTOR for step in steps)


def aligned(width: int, *tensors: Tensor | None) -> bool:
    """Whether rows of `width` can be read eight columns at a time."""
    return width % 8 == 0 and all(vectors(a) for a in tensors if a is not None)


def narrow(name: str, width: int, residual: torch.dtype, *others: torch.dtype) -> None:
    """Raise ValueError for rows that are too wide, and for float32 rows next to a bfloat16 residual."""
    if width > library().row_width:
        raise ValueError(f"{name}: got width {width}, want at most {library().row_width}")
    if residual == torch.bfloat16 and torch.float32 in others:
        raise ValueError(f"{name}: got float32 rows next to a bfloat16 residual, want bfloat16")
