"""Times with a cold cache, and the limits of the machine measured in the same run.

Before every launch a buffer several times the size of the last-level cache is read and written, so
that inputs come from memory. On CUDA the launch is timed by events; the flush is queued before it
and takes long enough for the host to run ahead, so that launching costs nothing unless it is slower
than the flush. On a CPU it is timed by perf_counter.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from prfl_kernels import processor

# Sizes of the buffer in caches. On a GPU it also gives the host a lead: 500 MB on an H100, read and
# written at 3 TB/s, are 0.3 ms.
FLUSH = {"cuda": 10, "cpu": 2}
CPU_CACHE = 64 << 20  # assumed where the system does not tell
WARM_UP = 2  # launches before the first that counts: they compile and allocate
GEMM_SIZE = 8192  # on CUDA

Prepare = Callable[[], Callable[[], object]]  # untimed work, returns what is to be timed


class Times(NamedTuple):
    """Seconds of several launches."""

    median: float
    least: float
    most: float


def cache_bytes(device: str) -> int:
    """Size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    known = "SC_LEVEL3_CACHE_SIZE" in getattr(os, "sysconf_names", ())
    size = os.sysconf("SC_LEVEL3_CACHE_SIZE") if known else 0
    return size if size > 0 else CPU_CACHE


def machine(device: str) -> str:
    """What was measured on, in a line."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{processor.name()} ({capability}), {threads} threads"


def compile_absence(device: str) -> str | None:
    """Why torch.compile has no code generator for the device; None if it has."""
    if device == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    compilers = os.environ.get("CXX", "g++"), "clang++", "c++"
    return None if any(map(shutil.which, compilers)) else "there is no C++ compiler"


def measure(candidates: dict[Hashable, Prepare], device: str, repeat: int) -> dict[Hashable, Times | None]:
    """Times of every candidate over `repeat` launches, taken in turn: A B A B, not A A B B.

    A candidate prepares its launch before the flush and returns it. None: out of GPU memory.
    """
    flushed = torch.zeros(_flush_bytes(device), dtype=torch.uint8, device=device).view(torch.int32)
    clocks: dict[Hashable, list | None] = {name: [] for name in candidates}
    for i in range(WARM_UP + repeat):
        for name, prepare in candidates.items():
            if clocks[name] is None:
                continue
            try:
                clock = _launch(prepare, flushed, device)
            except torch.OutOfMemoryError:
                clocks[name] = None
                continue
            if i >= WARM_UP:
                clocks[name].append(clock)
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: _times([clock() for clock in read]) if read else None for name, read in clocks.items()}


def _times(seconds: list[float]) -> Times:
    return Times(statistics.median(seconds), min(seconds), max(seconds))


def _flush_bytes(device: str) -> int:
    return FLUSH[device] * cache_bytes(device)


def _launch(prepare: Prepare, flushed: torch.Tensor, device: str) -> Callable[[], float]:
    """Launch once; returns a function for its seconds, to be called when the device is done."""
    run = prepare()
    flushed.add_(1)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    made = run()
    seconds = time.perf_counter() - begin
    del made  # after the clock: freeing is not computing
    return lambda: seconds


def limits(device: str, dtype: torch.dtype, fp8: bool, repeat: int = 5) -> dict[str, float]:
    """{"copy": bytes read and written a second, "product": FLOP/s of a large matrix product in dtype}
    and, if asked for, "fp8": in e4m3 where the device multiplies it, else in float32, as the emulation.

    The best of `repeat`, out of cache: what the fraction of the roofline is measured against.
    """
    size = _flush_bytes(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    seconds = measure({"copy": lambda: lambda: copied.copy_(source)}, device, repeat)["copy"].least
    found = {"copy": 2 * size / seconds, "product": _product_rate(dtype, device, repeat)}
    if fp8:
        native = device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
        kind = torch.float8_e4m3fn if native else torch.float32
        found["fp8"] = found["product"] if kind == dtype else _product_rate(kind, device, repeat)
    return found


def _product_rate(dtype: torch.dtype, device: str, repeat: int) -> float:
    """FLOP/s of n x n matrices; on a CPU the three of them are larger than the cache."""
    fp8 = dtype == torch.float8_e4m3fn
    n = GEMM_SIZE
    if device == "cpu":
        n = 256 * -(-int((cache_bytes(device) / dtype.itemsize / 2) ** 0.5) // 256)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def run():
        if fp8:
            return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return a @ b.T

    return 2 * n**3 / measure({"": lambda: run}, device, repeat)[""].least

