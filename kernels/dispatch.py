"""Which implementation of every operation runs, and why: the one place that decides.

By default the fused Triton kernels run on CUDA, the compiled C++ kernels on the CPU, and plain torch where
neither is there and for float64 anywhere; attention has more to choose from, see `attention_backends`.
The CUDA C++ kernels run where they are asked for: they have not been measured beside the Triton ones.
`PRFL_KERNELS` or `configure` overrides that, for all operations ("reference") or for some
("triton,reward_pool=reference"); what cannot run raises when it is called, and is never replaced.
"""

import os

import torch
from torch import Tensor

from prfl_kernels import extension, jit
from prfl_kernels.attention import libraries

REFERENCE, CPU, TRITON, CUDA = "reference", "cpu", "triton", "cuda"
SCALED_MM = "scaled_mm"
_ALL = (REFERENCE, CPU, TRITON, CUDA)
OPERATIONS = {
    "modulate": _ALL,
    "layer_norm": _ALL,
    "gated_add": _ALL,
    "gated_add_modulate": _ALL,
    "gated_add_norm": _ALL,
    "rms_norm": _ALL,
    "qk_norm_rope": _ALL,
    "bias_gelu": (REFERENCE, CPU, TRITON),
    "attention": tuple(libraries.BACKENDS),
    "reward_pool": _ALL,
    "fp8_linear": (REFERENCE, SCALED_MM),
    "quantize_fp8": (REFERENCE, TRITON),
    "attention_fp8": (REFERENCE, TRITON, CUDA),
    "solver_step": (REFERENCE, CUDA),
}
_BEST = {"cuda": (SCALED_MM, TRITON), "cpu": (CPU,)}  # by device; the first that an operation has and runs
_FP8 = ("fp8_linear", "quantize_fp8", "attention_fp8")  # want a GPU that has e4m3
_REASONS = {
    REFERENCE: "plain torch",
    CPU: "compiled C++ kernel",
    TRITON: "fused Triton kernel",
    SCALED_MM: "torch._scaled_mm with row-wise scales",
    CUDA: "own CUDA C++ kernel",
}
_ATTENTION = "attention"
_overrides: dict[str, str] = {}


def configure(choice: str) -> None:
    """Set the implementation of all operations or of single ones, as in PRFL_KERNELS.

    choice is a comma-separated list of IMPLEMENTATION (every operation that has it; the others keep
    their default) and OPERATION=IMPLEMENTATION; later entries win, "" is the default everywhere.
    Raises ValueError for a name that is not there.
    """
    found: dict[str, str] = {}
    known = sorted({name for names in OPERATIONS.values() for name in names})
    for entry in filter(None, (part.strip() for part in choice.split(","))):
        op, given, implementation = entry.rpartition("=")
        if given and op not in OPERATIONS:
            raise ValueError(f"kernels: got operation {op!r}, want one of {', '.join(OPERATIONS)}")
        names = OPERATIONS[op] if given else known
        if implementation not in names:
            where = f" for {op}" if given else ""
            raise ValueError(f"kernels: got {implementation!r}{where}, want one of {', '.join(names)}")
        for name in [op] if given else OPERATIONS:
            if implementation in OPERATIONS[name]:
                found[name] = implementation
    _overrides.clear()
    _overrides.update(found)


def configured() -> str:
    """What was chosen, as `configure` takes it."""
    return ",".join(f"{op}={choice}" for op, choice in _overrides.items())


def implementation(op: str, x: Tensor, fp8: bool = False) -> str:
    """The implementation of `op`, or of its form that makes e4m3, that runs on a tensor like x."""
    if x.dtype == torch.float64:
        return REFERENCE  # float64 is for checking; no fused kernel computes in it
    device = x.device.type
    choice = _overrides.get(op)
    if choice is None:
        choice = _default(op, device, x.dtype, fp8, x.shape[-1])
        if fp8 and device == "cuda" and choice == REFERENCE:
            choice = TRITON  # to be refused below, with the reason
    why = absence(op, choice, device, x.dtype, fp8)
    if why:
        raise ValueError(_misfit(op, choice, device, why, fp8))
    return choice


def check(device: str) -> None:
    """Raise ValueError if an operation was given an implementation that does not run on `device`."""
    for op, choice in _overrides.items():
        why = absence(op, choice, device)
        if why:
            raise ValueError(_misfit(op, choice, device, why))


def choices() -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) of every operation, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [(op, *_choice(op, device)) for op in OPERATIONS]


def absence(
    op: str, choice: str, device: str, dtype: torch.dtype | None = None, fp8: bool = False
) -> str | None:
    """Why implementation `choice` of `op` does not run on a device of type `device`; None if it does."""
    if op == _ATTENTION:
        return libraries.absence(choice, device)
    if choice == CUDA:
        # Attention in CUDA C++ is written for capability 9.0 alone.
        fp8 = op == "attention_fp8"
        return libraries.absence(CUDA, device) if fp8 else extension.absence(CUDA, device)
    if choice == REFERENCE or (choice == TRITON and jit.INTERPRETED):
        return None
    if choice == CPU:
        if fp8:
            return "makes no e4m3"
        if dtype not in (None, *extension.DTYPES):
            return f"has no {str(dtype).removeprefix('torch.')}"
        return extension.absence(CPU, device)
    if device != "cuda":
        hint = " (or TRITON_INTERPRET=1 in the environment)" if choice == TRITON else ""
        return f"needs a cuda device{hint}"
    if choice == TRITON and jit.triton is None:
        return "triton is not installed"
    if (fp8 or op in _FP8) and torch.cuda.get_device_capability() < (8, 9):
        return "needs capability 8.9 or higher"
    return None


def _misfit(op: str, choice: str, device: str, why: str, fp8: bool = False) -> str:
    return f"kernels: {op}{'_fp8' * fp8} got {choice} on {device}: it {why}"


def _default(
    op: str, device: str, dtype: torch.dtype | None = None, fp8: bool = False, head_dim: int | None = None
) -> str:
    if op == _ATTENTION:
        return libraries.default(device, dtype, head_dim)[0]
    known = (c for c in _BEST.get(device, ()) if c in OPERATIONS[op])
    return next((c for c in known if not absence(op, c, device, dtype, fp8)), REFERENCE)


def _choice(op: str, device: str) -> tuple[str, str]:
    if op in _overrides:
        return _overrides[op], f"{_reason(op, _overrides[op])}; chosen by configuration or PRFL_KERNELS"
    note = ""
    if op == _ATTENTION:
        choice, passed = libraries.default(device)
        note = libraries.note(device)
    else:
        choice = _default(op, device)
        better = (c for c in _BEST[device] if c in OPERATIONS[op] and c != choice)
        passed = {c: absence(op, c, device) for c in better}
    absent = "".join(f"; {name} {why}" for name, why in passed.items())
    return choice, f"{_reason(op, choice)}; the default on {device}{absent}{note and '; '}{note}"


def _reason(op: str, choice: str) -> str:
    return libraries.BACKENDS[choice].reason if op == _ATTENTION else _REASONS[choice]


configure(os.environ.get("PRFL_KERNELS", ""))
