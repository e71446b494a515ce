"""The compiled extension prfl_kernels._C: which parts of it are there, which run, and why not.

It is built from csrc/ when the package is installed (setup.py): kernels for the CPU, one build for
every instruction set, and kernels for CUDA. It holds no torch code: tensors go in as addresses and
strides, and its loops run on the threads of torch's own OpenMP runtime.
PRFL_CPU_ISA=generic|avx2|avx512|avx512_bf16 (or `use_isa`) forces an instruction set; by default the
best one that the processor takes runs.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

PARTS = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16)  # of the compiled kernels
CODES = {**{dtype: i for i, dtype in enumerate(DTYPES)}, torch.float8_e4m3fn: 2}
View = tuple[Tensor | int, ...]
Argument = Tensor | float | None  # of a launch
# Runs of tokens of a sample on the CPU: enough for the threads of a large machine, few enough that their
# partial sums (at most three rows a run) stay under 5 % of the traffic.
RUNS, TOKENS_OF_A_RUN = 128, 16
# Tensors from here on get large pages: the first touch of small ones costs more than the kernels.
HUGE_BYTES = 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    try:
        module = import_module("prfl_kernels._C")
    except ModuleNotFoundError:
        return None, "is not built: install the package with g++ 9 or newer, Python's headers and pybind11"
    except ImportError as error:
        return None, f"does not load: {' '.join(str(error).split())}"
    try:
        module.use_isa(os.environ.get("PRFL_CPU_ISA", ""))
    except ValueError as error:
        raise ValueError(f"PRFL_CPU_ISA: {error}") from None
    return module, ""


_dry: list[bool] = []  # one for every `dry_run` under way


@contextmanager
def dry_run() -> Iterator[None]:
    """The CPU kernels, built or not, allocate what they return and compute nothing: for tensors without
    values, fake or on the meta device."""
    _dry.append(True)
    try:
        yield
    finally:
        _dry.pop()


def is_dry() -> bool:
    """Whether a `dry_run` is under way."""
    return bool(_dry)


def device_type(a: Tensor) -> str:
    """Of the kernels that run on a tensor: that of its device, "cpu" in a dry run."""
    return "cpu" if _dry else a.device.type


def extension() -> ModuleType:
    """prfl_kernels._C. Raises ValueError, with the reason, where it is not there."""
    module, why = _load()
    if module is None:
        raise ValueError(f"kernels: prfl_kernels._C {why}")
    return module


def absence(part: str, device_type: str) -> str | None:
    """Why the compiled part ("cpu" or "cuda") does not run on a device; None if it does."""
    if part not in PARTS:
        raise ValueError(f"kernels: got compiled part {part!r}, want one of {', '.join(PARTS)}")
    if part == "cpu" and _dry:
        return None
    module, why = _load()
    if module is None:
        return why
    if part == "cuda" and not module.cuda_architectures:
        return f"is not built: {module.cuda_reason}"
    if device_type != part:
        return "runs on the CPU alone" if part == "cpu" else "needs a CUDA device"
    if part == "cuda":
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < (9, 0):
            built = module.cuda_architectures
            return f"is built for {built}, this GPU is sm_{capability[0]}{capability[1]}"
        return _driver_absence(module, compiles=capability != (9, 0))
    return None


def _driver_absence(module: ModuleType, compiles: bool) -> str | None:
    """Why the driver does not run what the module is built with; None if it does.

    The module has a CUDA runtime of its own, linked in, so torch's may be any. A driver runs code that a
    newer release of its major version compiled, but `compiles` PTX (for a GPU other than sm_90) only of
    releases that it supports (CUDA Compatibility Guide, minor version compatibility).
    """
    built, driver = module.cuda_version, module.cuda_driver_version()
    if not driver:
        return "needs an NVIDIA driver"
    if driver >= built or (driver // 1000 == built // 1000 and not compiles):
        return None
    return f"is built with CUDA {_release(built)}, the driver supports {_release(driver)}"


def _release(version: int) -> str:
    """12080 as 12.8."""
    return f"{version // 1000}.{version % 1000 // 10}"


def isas() -> list[str]:
    """The instruction sets that are built and run on this processor, poorest first."""
    return [name for name, runs in extension().isas() if runs]


def use_isa(name: str = "") -> None:
    """Run the CPU kernels of one instruction set; "" for the best. ValueError if it is not there."""
    try:
        extension().use_isa(name)
    except ValueError as error:
        raise ValueError(f"kernels: {error}") from None


def report() -> list[tuple[str, str, str]]:
    """(part, "yes" or "no", what it is or why not) of every part, for `prfl doctor`."""
    module, _ = _load()
    rows = []
    if (why := absence("cpu", "cpu")) is None:
        built = ", ".join(name if runs else f"{name} (not on this processor)" for name, runs in module.isas())
        lacking = f"; the compiler was too old for {module.isas_left_out}" if module.isas_left_out else ""
        rows.append(("cpu", "yes", f"{module.active_isa()} of {built}{lacking}"))
        runtime = module.openmp_runtime()
        threads = "torch's threads, " + runtime if runtime else "one thread: torch has no OpenMP runtime here"
        rows.append(("cpu threads", "yes" if runtime else "no", threads))
    else:
        rows.append(("cpu", "no", why))
    why = absence("cuda", "cuda")
    built = ""
    if module and module.cuda_architectures:
        built = f"built for {module.cuda_architectures} with CUDA {_release(module.cuda_version)}"
    rows.append(("cuda", "no" if why else "yes", "; ".join(filter(None, (built, why)))))
    return rows


def view(a: Tensor) -> View:
    """A tensor as _C takes it: (the tensor, address, dtype code, strides of all dimensions but the last).

    The last dimension must have stride 1. The tensor is part of the view, so its memory lives as long as
    the view does, and a view of a temporary tensor is safe.
    """
    return a, a.data_ptr(), CODES[a.dtype], *a.stride()[:-1]


def keywords(arguments: dict[str, Argument], view: Callable = view) -> dict[str, View | float | None]:
    """The arguments of a launch as _C takes them: tensors by `view`, numbers and None as they are."""
    return {name: view(a) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def launch(name: str, **arguments: Argument) -> None:
    """Run a launcher of csrc/cpu/bind.cpp on torch's threads; nothing in a dry run.

    `arguments` are its keywords but `threads`: tensors, None for an absent one, and numbers. Raises TypeError
    for a keyword that is missing, unknown or of a wrong type.
    """
    if not _dry:
        getattr(extension(), name)(**keywords(arguments), threads=torch.get_num_threads())


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of `like`, in its dtype if None; on large pages on the CPU."""
    a = like.new_empty(shape, dtype=dtype)
    if a.nbytes >= HUGE_BYTES and a.is_cpu and not _dry and _load()[0]:
        extension().advise_huge_pages(a.data_ptr(), a.nbytes)
    return a


def runs(length: int) -> int:
    """How many runs of tokens the CPU kernels make partial sums of, for any number of threads."""
    return max(1, min(RUNS, length // TOKENS_OF_A_RUN))


def supported(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor has one of DTYPES."""
    for a in tensors:
        if a is not None and a.dtype not in DTYPES:
            raise ValueError(f"{op}: got {a.dtype} for a compiled kernel, want float32 or bfloat16")


def keep_freed_memory() -> bool:
    """Have the allocator of this process keep what is freed for the next results; True if it will.

    glibc maps every large tensor anew and gives it back when it is freed, so that the system clears each page
    of a result before a kernel writes it: up to five times the cost of writing it. Kept, memory does not
    shrink again until the process ends. For a process whose work is training on the CPU; only glibc's
    allocator can be told so.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
