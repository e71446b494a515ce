"""`prfl tune`: measure the candidates of every tile choice on this GPU and keep the fastest ones.

The launches are those of the ledger, at the shapes of its models, on random tensors. Each says by
asking `tuning.choice` which choices it makes; one after the other every candidate of one of them is tried,
all others at their default. A candidate whose results differ from the default's by more than rounding is
refused. What is timed is the whole operation, so that partial sums count that it adds up after its kernels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_bench import operations
from prfl_bench.shapes import Shape, wan
from prfl_kernels import bias_gelu, tuning
from prfl_kernels.attention import fp8 as attention_fp8
from prfl_kernels.attention import triton_kernels as attention_triton
from prfl_kernels.jit import triton
from prfl_kernels.norm import triton_kernels as add_norm
from prfl_kernels.qk_norm_rope import triton_kernels as norm_rope
from prfl_kernels.reward_pool import triton_kernels as reward_pool

_FILES = (attention_triton, attention_fp8, add_norm, norm_rope, bias_gelu, reward_pool)
CANDIDATES = {kernel: found for file in _FILES for kernel, found in file.CANDIDATES.items()}
WARMUP, REPEATS = 3, 15
CACHE = 256 << 20  # bytes that are overwritten before a measurement: more than any L2 holds


class Asked(NamedTuple):
    """One choice that an operation makes."""

    kernel: str
    key: tuning.Key
    default: tuple

    @property
    def candidates(self) -> list[tuple]:
        """The default first, then the others."""
        found = (c for start, c in CANDIDATES.get(self.kernel, {}).items() if self.key[: len(start)] == start)
        return list(dict.fromkeys((self.default, *next(found, ()))))


def launches(models: list[str], lengths: list[int], sp: int) -> Iterator[tuple[str, Callable]]:
    """(name, device -> call) of every launch of one rank of `sp`: attention on all tokens and 1 / sp of the
    heads, the others on 1 / sp of the tokens. Without those in fp8 on a GPU that has none."""
    e4m3 = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
    for model in models:
        for length in lengths:
            for launch in operations.LAUNCHES:
                if "fp8" in launch.op and not e4m3:
                    continue
                for stream in launch.streams:
                    s = wan(model, length, stream, sp)
                    tokens = s.tokens if launch.kind == "attention" else s.length
                    bind = partial(_bound, launch, s)
                    yield f"{launch.op}, {model}, {tokens} tokens", bind


def _bound(launch: operations.Launch, s: Shape, device: str) -> Callable[[], list[Tensor | None]]:
    return launch.bind(s._replace(device=device))


def asked(call: Callable) -> list[Asked]:
    """The choices with candidates that call() makes, without a launch."""
    found: dict[Asked, None] = {}

    def record(kernel, key, default):
        found[Asked(kernel, key, default)] = None
        return default

    launcher = type(reward_pool._merge)  # what @jit makes: for a GPU, or for the interpreter
    plain = launcher.run
    launcher.run = lambda *arguments, **options: None
    try:
        with tuning.hooked(record):
            call()
    finally:
        launcher.run = plain
    return [one for one in found if len(one.candidates) > 1]


def agree(got: list[Tensor], want: list[Tensor]) -> bool:
    """Whether results differ by no more than rounding: two units in the last place, root mean square."""
    for a, b in zip(got, want, strict=True):
        a, b, limit = a.float(), b.float(), max(1e-3, 2 * torch.finfo(b.dtype).eps)
        if not (a - b).norm() <= limit * b.norm():  # not: for NaN too
            return False
    return True


def device_seconds(call: Callable) -> float:
    """Median time of call() by device events, with a cold L2."""
    times, cache = [], torch.empty(CACHE, dtype=torch.int8, device="cuda")
    for i in range(WARMUP + REPEATS):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= WARMUP:
            times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def measure(call: Callable, one: Asked, timer: Callable) -> dict[tuple, float | None]:
    """{candidate: seconds of call(), None where it does not fit the GPU or gives another result}."""
    results, want = {}, None
    for candidate in one.candidates:

        def answer(kernel, key, default, candidate=candidate):
            return candidate if (kernel, key) == (one.kernel, one.key) else default

        with tuning.hooked(answer):
            try:
                got = [a for a in call() if a is not None]
            except triton.runtime.errors.OutOfResources:
                results[candidate] = None
                continue
            want = want or got
            results[candidate] = timer(call) if agree(got, want) else None
    return results


def choices(models: list[str], lengths: list[int], sp: int) -> Iterator[tuple[str, Callable, Asked]]:
    """(name of a launch, device -> call, a choice that it makes), every choice once."""
    if triton is None:
        raise ValueError("tune: got no Triton, want it installed")
    seen: set[tuple] = set()
    for name, bind in launches(models, lengths, sp):
        for one in asked(bind("meta")):
            if one[:2] not in seen:
                seen.add(one[:2])
                yield name, bind, one


def listing(models: list[str], lengths: list[int], sp: int) -> Iterator[str]:
    """A line for every choice: its key, what runs now and why, and the candidates."""
    for name, _, one in choices(models, lengths, sp):
        tuned = one[:2] in tuning.tuned()
        now = tuning.choice(*one)
        source = f"from {tuning.file()}" if tuned else "the default"
        yield f"{one.kernel} {one.key} ({name}): {now}, {source}; of {one.candidates}"


def tune(
    models: list[str], lengths: list[int], sp: int, timer: Callable = device_seconds, device: str = "cuda"
) -> Iterator[str]:
    """Measure and store every choice; a line for each. timer(call) gives seconds.

    Choices for other shapes that this GPU's file holds stay. Raises ValueError where there is no GPU.
    """
    file = tuning.file()
    if file is None:
        raise ValueError("tune: got no CUDA GPU (or an empty PRFL_TUNING), want one")
    held = dict(tuning.tuned())
    for name, bind, one in choices(models, lengths, sp):
        times = measure(bind(device), one, timer)
        ran = {candidate: seconds for candidate, seconds in times.items() if seconds is not None}
        if ran:
            held[one[:2]] = min(ran, key=ran.__getitem__)
            tuning.write(file, held)
        shown = {c: "refused" if t is None else f"{1e3 * t:.3f} ms" for c, t in times.items()}
        found = ", ".join(f"{candidate} {time}" for candidate, time in shown.items())
        yield f"{one.kernel} {one.key} ({name}): {held.get(one[:2], one.default)} of {found}"
