"""Which implementation of every operation runs, and why: the one place that decides.

An operation registers its implementations when its module is imported; `prfl_kernels.operations` imports them
all. Each is a record that says what it is, what computes it and, by its probe, why it does not run here.
By default the fused Triton kernels run on CUDA, the compiled C++ kernels on the CPU, and plain torch where
neither is there and for float64 anywhere; an operation with more to choose from brings an order of its own.
The CUDA C++ kernels run where they are asked for: they have not been compared with the Triton ones.
`PRFL_KERNELS` or `configure` overrides that, for all operations ("reference") or for some
("triton,reward_pool=reference"); what cannot run raises when it is called, and is never replaced.
"""

import math
import os
from collections.abc import Callable, Container, Iterable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_kernels import extension, jit
from prfl_kernels.compiling import constant

REFERENCE, CPU, TRITON, CUDA = "reference", "cpu", "triton", "cuda"
SCALED_MM = "scaled_mm"
_BEST = {"cuda": (SCALED_MM, TRITON), "cpu": (CPU,)}  # by device; the first that an operation has and runs


class Implementation(NamedTuple):
    """One of the implementations of an operation; forward and backward have the operation's own contract.

    probe(device type, dtype, head dim, whether results are e4m3) is why it does not run, to follow "it", or
    None; so is what is not known of the last three (False), and no reason against. The head dim is the last
    dimension of the first input. doubt(device type, whether the backward is meant) is why it is no default
    although it runs, or None: it is then chosen by name alone.
    """

    name: str
    reason: str  # what it is
    probe: Callable[..., str | None]
    forward: Callable
    backward: Callable | None = None
    backwards: tuple[str, ...] = ()  # whose backward follows this forward by default, the best first; () own
    doubt: Callable[[str, bool], str | None] = lambda device, backward: None


Order = Callable[[str, torch.dtype | None], tuple[tuple[str, ...], str]]
OPERATIONS: dict[str, dict[str, Implementation]] = {}
_orders: dict[str, Order] = {}
_choice = os.environ.get("PRFL_KERNELS", "")


def register(op: str, implementations: Iterable[Implementation], order: Order | None = None) -> None:
    """Add an operation; "reference" has to be among its implementations.

    order(device type, dtype or None for bfloat16) is (names, the best first; what that order rests on, "" if
    on nothing); "reference" runs where none of them does.
    """
    OPERATIONS[op] = records = {record.name: record for record in implementations}
    best = {device: (tuple(c for c in names if c in records), "") for device, names in _BEST.items()}
    _orders[op] = order or (lambda device, _: best.get(device, ((), "")))


def requires(
    on: str | None = None,
    capabilities: tuple[float, float] = (0, math.inf),
    dtypes: Container[torch.dtype] | None = None,
    head_dims: Container[int] | None = None,
    build: Callable[[str], str | None] = lambda device: None,
) -> Callable[..., str | None]:
    """A probe for a device type, on CUDA a lowest and highest major compute capability, dtypes, head dims,
    and for build(device type): why what has to be built or installed is not there. None asks for nothing."""

    def probe(device, dtype=None, head_dim=None, e4m3=False):
        if on not in (None, device):
            return f"needs a {on} device"
        low, high = capabilities
        if low and device == "cuda" and not low <= (found := torch.cuda.get_device_capability())[0] <= high:
            return f"needs capability {low}.0{'' if high == low else ' or higher'}, got {found[0]}.{found[1]}"
        if dtypes is not None and dtype is not None and dtype not in dtypes:
            return f"has no {str(dtype).removeprefix('torch.')}"
        if head_dims is not None and head_dim is not None and head_dim not in head_dims:
            return f"has no head dim {head_dim}"
        return build(device)

    return probe


def _compiled(part: str) -> Callable[[str], str | None]:
    return lambda device: extension.absence(part, device)


def _cpu(device, dtype=None, head_dim=None, e4m3=False):
    if e4m3:
        return "makes no e4m3"
    if dtype is not None and dtype not in extension.DTYPES:
        return f"has no {str(dtype).removeprefix('torch.')}"
    return extension.absence(CPU, device)


def _triton(device, dtype=None, head_dim=None, e4m3=False):
    return jit.absence(device) or (_lacks_e4m3() if e4m3 and not jit.INTERPRETED else None)


def _lacks_e4m3() -> str | None:
    return "needs capability 8.9 or higher" if torch.cuda.get_device_capability() < (8, 9) else None


def _scaled_mm(device, dtype=None, head_dim=None, e4m3=False):
    """float32 results are cuBLASLt's alone, which torch calls on capability 9 with CUDA 12.9 or newer; its
    other kernels give bfloat16 (torch's aten/src/ATen/native/cuda/ScaledBlas.cpp)."""
    why = requires("cuda")(device) or _lacks_e4m3()
    if why or dtype != torch.float32:
        return why
    if (major := torch.cuda.get_device_capability()[0]) != 9:
        return f"has float32 results on capability 9 alone, got {major}"
    built = torch.version.cuda or "0"
    if tuple(map(int, built.split("."))) >= (12, 9):
        return None
    return f"needs torch built with CUDA 12.9 or newer for float32 results, got {built}"


_COMMON = {
    REFERENCE: ("plain torch", requires()),
    CPU: ("compiled C++ kernel", _cpu),
    TRITON: ("fused Triton kernel", _triton),
    SCALED_MM: ("torch._scaled_mm with row-wise scales", _scaled_mm),
    CUDA: ("own CUDA C++ kernel", requires(dtypes=extension.DTYPES, build=_compiled(CUDA))),
}


def common(functions: dict[str, tuple[Callable, ...] | Callable], e4m3: bool = False) -> list[Implementation]:
    """Records of {name: (forward, backward) or forward}, by the names at the top of this file; e4m3 for an
    operation that always reads or makes it."""

    def record(name: str, pair: tuple[Callable, ...]) -> Implementation:
        reason, probe = _COMMON[name]
        always = (lambda device, dtype=None, *_: probe(device, dtype, e4m3=True)) if e4m3 else probe
        return Implementation(name, reason, always, *pair)

    return [record(name, pair if isinstance(pair, tuple) else (pair,)) for name, pair in functions.items()]


def room(plain: tuple[Callable, Callable], **files: ModuleType) -> list[Implementation]:
    """Records of plain torch, (forward, backward), and of the files of a room by the names of `common`: each
    has a forward and a backward."""
    return common({REFERENCE: plain} | {name: (file.forward, file.backward) for name, file in files.items()})


def configure(choice: str) -> None:
    """Set the implementation of all operations or of single ones, as in PRFL_KERNELS.

    choice is a comma-separated list of IMPLEMENTATION (every operation that has it; the others keep
    their default) and OPERATION=IMPLEMENTATION; later entries win, "" is the default everywhere. Where one
    implementation's backward may follow another's forward, OPERATION_backward=IMPLEMENTATION chooses it.
    Raises ValueError for a name that is not there.
    """
    global _choice
    _parsed(choice)
    _choice = choice


def configured() -> str:
    """What was chosen, as `configure` takes it."""
    return _choice


@cache
def _parsed(choice: str) -> dict[str, str]:
    """{operation or OPERATION_backward: implementation} of what `configure` takes."""
    found: dict[str, str] = {}
    entries = [part.strip() for part in choice.split(",") if part.strip()]
    if entries:
        complete()
    backwards = {
        f"{op}_backward": [name for name, record in records.items() if record.backward]
        for op, records in OPERATIONS.items()
        if any(record.backwards for record in records.values())
    }
    single = OPERATIONS | backwards
    known = sorted({name for names in OPERATIONS.values() for name in names})
    for entry in entries:
        op, given, implementation = entry.rpartition("=")
        if given and op not in single:
            raise ValueError(f"kernels: got operation {op!r}, want one of {', '.join(single)}")
        names = single[op] if given else known
        if implementation not in names:
            where = f" for {op}" if given else ""
            raise ValueError(f"kernels: got {implementation!r}{where}, want one of {', '.join(names)}")
        for name in [op] if given else OPERATIONS:
            if implementation in single[name]:
                found[name] = implementation
    return found


def complete() -> None:
    """Have all operations registered."""
    import_module("prfl_kernels.operations")


@constant  # of the names, not of the tensors
def _chosen(op: str, choice: str) -> str | None:
    return _parsed(choice).get(op)


def implementation(op: str, x: Tensor, fp8: bool = False, dtype: torch.dtype | None = None) -> str:
    """The implementation of `op`, or of its form that makes e4m3, that runs on a tensor like x.

    dtype: of the results, where that of x does not tell. Raises ValueError if the chosen one does not run."""
    if x.dtype == torch.float64:
        return REFERENCE  # float64 is for checking; no fused kernel computes in it
    facts = extension.device_type(x), dtype or x.dtype, x.shape[-1], fp8
    choice = _chosen(op, _choice)
    if choice is None:
        choice, passed = default(op, *facts)
        if not (fp8 and choice == REFERENCE and facts[0] == "cuda"):
            return choice
        choice = next(iter(passed))  # to be refused, with the reason
    return runnable(op, choice, *facts)


def record(op: str, x: Tensor, fp8: bool = False, dtype: torch.dtype | None = None) -> Implementation:
    """The record of `implementation`; raises as that."""
    return OPERATIONS[op][implementation(op, x, fp8, dtype)]


def backward_of(op: str, x: Tensor, forward: str | None = None) -> str:
    """The implementation whose backward follows the forward of `forward`, or of `implementation`, for x.

    It is the one chosen for OPERATION_backward, else the first of the `backwards` of `forward` that is a
    default, else `forward` itself. Raises ValueError if there is none."""
    if x.dtype == torch.float64:
        return REFERENCE
    facts, forward = (extension.device_type(x), x.dtype, x.shape[-1]), forward or implementation(op, x)
    names = _followers(op, forward, _choice)
    if names == (forward,):
        return forward
    return runnable(f"{op}_backward", _follower(op, names, *facts)[0], *facts)


def _follower(op: str, names: tuple[str, ...], *facts) -> tuple[str, dict[str, str]]:
    """(the first of `names` whose backward is a default, else the last, {each one passed over: why})."""
    passed: dict[str, str] = {}
    for name in names:
        why = _unfit(op, name, True, *facts)
        if why is None:
            return name, passed
        passed[name] = why
    return names[-1], passed


@constant  # of the names, not of the tensors
def _followers(op: str, forward: str, choice: str) -> tuple[str, ...]:
    chosen = _parsed(choice).get(f"{op}_backward")
    return (chosen,) if chosen else OPERATIONS[op][forward].backwards or (forward,)


def runnable(op: str, choice: str, device: str, *facts) -> str:
    """`choice`, one for `op` or OPERATION_backward. Raises ValueError, with the reason, if it does not run;
    facts as for `absence`."""
    if why := absence(op, choice, device, *facts):
        fp8 = "_fp8" if facts[2:] == (True,) else ""
        raise ValueError(f"kernels: {op}{fp8} got {choice} on {device}: it {why}")
    return choice


def check(device: str) -> None:
    """Raise ValueError if an operation was given an implementation that does not run on `device`."""
    for op, choice in _parsed(_choice).items():
        runnable(op, choice, device)


@constant  # of the machine, not of the tensors
def absence(op: str, choice: str, *facts) -> str | None:
    """Why implementation `choice` of `op` or OPERATION_backward does not run; None if it does. facts are the
    device type and what is known of dtype, head dim and whether e4m3 is made, as for a probe."""
    own = OPERATIONS.get(op) or OPERATIONS[op.removesuffix("_backward")]
    return own[choice].probe(*facts)


@constant  # of the machine, not of the tensors
def _unfit(op: str, name: str, backward: bool, device: str, *facts) -> str | None:
    """Why implementation `name`, or its backward, is no default; None if it is."""
    return absence(op, name, device, *facts) or OPERATIONS[op][name].doubt(device, backward)


def default(op: str, device: str, *facts) -> tuple[str, dict[str, str]]:
    """(the implementation that runs where none is chosen, {each better one: why not it}); facts as for
    `absence`, without a dtype for bfloat16."""
    passed: dict[str, str] = {}
    for name in _orders[op](device, facts[0] if facts else None)[0]:
        why = _unfit(op, name, False, device, *facts)
        if why is None:
            return name, passed
        passed[name] = why
    return REFERENCE, passed


def _device() -> str:
    complete()
    return "cuda" if torch.cuda.is_available() else "cpu"


def choices(device: str | None = None) -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) of every operation on a kind of device; None: on the GPU where
    there is one."""
    device = _device() if device is None else device
    return [(op, *_reasoned(op, device)) for op in OPERATIONS]


def records() -> list[tuple[str, Implementation, str | None]]:
    """(operation, implementation, why it does not run) of all, on the GPU where there is one."""
    device = _device()
    return [(op, own[c], absence(op, c, device)) for op, own in OPERATIONS.items() for c in own]


def _reasoned(op: str, device: str) -> tuple[str, str]:
    chosen = _parsed(_choice).get(op)
    choice, passed = (chosen, {}) if chosen else default(op, device)
    notes = [OPERATIONS[op][choice].reason]
    names = _followers(op, choice, _choice)
    follower, better = _follower(op, names, device)
    if better or names != (choice,):
        reasons = ", ".join(f"{name} {why}" for name, why in better.items())
        notes.append(f"backward by {follower}{reasons and f' ({reasons})'}")
    if chosen:
        doubt = OPERATIONS[op][choice].doubt(device, False)
        notes += filter(None, [doubt and f"{choice} {doubt}"])
        return choice, "; ".join([*notes, "chosen by configuration or PRFL_KERNELS"])
    notes += [f"the default on {device}", *(f"{name} {why}" for name, why in passed.items())]
    notes += filter(None, [_orders[op](device, None)[1]])
    if (single := default(op, device, torch.float32)[0]) != choice:
        notes.append(f"in float32 {single}")
    return choice, "; ".join(notes)
