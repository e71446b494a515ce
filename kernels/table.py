"""Which implementation of every operation runs, and why: the one place that decides.

By default the fused kernels run on CUDA and plain torch runs on the CPU and for float64 anywhere;
attention has more to choose from, see `attention_backends`.
`PRFL_KERNELS` or `configure` overrides that, for all operations ("reference") or for some
("triton,reward_pool=reference"); what cannot run raises when it is called, and is never replaced.
"""

import os

import torch
from torch import Tensor

from prfl_kernels import attention_backends, jit

REFERENCE, TRITON, SCALED_MM = "reference", "triton", "scaled_mm"
OPERATIONS = {
    "modulate": (REFERENCE, TRITON),
    "layer_norm": (REFERENCE, TRITON),
    "gated_add": (REFERENCE, TRITON),
    "gated_add_modulate": (REFERENCE, TRITON),
    "gated_add_norm": (REFERENCE, TRITON),
    "rms_norm": (REFERENCE, TRITON),
    "qk_norm_rope": (REFERENCE, TRITON),
    "attention": tuple(attention_backends.BACKENDS),
    "reward_pool": (REFERENCE, TRITON),
    "fp8_linear": (REFERENCE, SCALED_MM),
    "attention_fp8": (REFERENCE, TRITON),
}
_FP8_MATRICES = ("fp8_linear", "attention_fp8")  # want tensor cores that take e4m3
_REASONS = {
    REFERENCE: "plain torch",
    TRITON: "fused Triton kernel",
    SCALED_MM: "torch._scaled_mm with row-wise scales",
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


def implementation(op: str, x: Tensor) -> str:
    """The implementation of `op` that runs on a tensor like x."""
    if x.dtype == torch.float64:
        return REFERENCE  # float64 is for checking; no fused kernel computes in it
    choice = _overrides.get(op) or _default(op, x.device.type, x.dtype, x.shape[-1])
    if not _runs(op, choice, x.device.type):
        raise ValueError(_misfit(op, choice, x.device.type))
    return choice


def check(device: str) -> None:
    """Raise ValueError if an operation was given an implementation that does not run on `device`."""
    for op, choice in _overrides.items():
        if not _runs(op, choice, device):
            raise ValueError(_misfit(op, choice, device))


def choices() -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) of every operation, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [(op, *_choice(op, device)) for op in OPERATIONS]


def _runs(op: str, choice: str, device: str) -> bool:
    if op == _ATTENTION:
        return attention_backends.absence(choice, device) is None
    if choice == REFERENCE or (choice == TRITON and jit.INTERPRETED):
        return True
    if device != "cuda" or (choice == TRITON and jit.triton is None):
        return False
    return op not in _FP8_MATRICES or torch.cuda.get_device_capability() >= (8, 9)


def _misfit(op: str, choice: str, device: str) -> str:
    if op == _ATTENTION:
        return f"kernels: {op} got {choice} on {device}: it {attention_backends.absence(choice, device)}"
    want = "a CUDA device"
    if op in _FP8_MATRICES:
        want += " of capability 8.9 or higher"
    if choice == TRITON:
        want += " with Triton installed (or TRITON_INTERPRET=1 in the environment)"
    return f"kernels: {op} got {choice} for {device}, want {want}"


def _default(op: str, device: str, dtype: torch.dtype | None = None, head_dim: int | None = None) -> str:
    if op == _ATTENTION:
        return attention_backends.default(device, dtype, head_dim)[0]
    best = OPERATIONS[op][-1]
    return best if device == "cuda" and _runs(op, best, device) else REFERENCE


def _choice(op: str, device: str) -> tuple[str, str]:
    if op in _overrides:
        return _overrides[op], f"{_reason(op, _overrides[op])}; chosen by configuration or PRFL_KERNELS"
    if op == _ATTENTION:
        choice, passed = attention_backends.default(device)
        absent = "".join(f"; {name} {why}" for name, why in passed.items())
        return choice, f"{_reason(op, choice)}; the default on {device}{absent}"
    choice = _default(op, device)
    why = f"{_REASONS[choice]}; the default on {device}"
    best = OPERATIONS[op][-1]
    if device == "cuda" and choice != best:
        absent = best == TRITON and jit.triton is None
        why += f", since {'triton is not installed' if absent else 'its capability is below 8.9'}"
    return choice, why


def _reason(op: str, choice: str) -> str:
    return attention_backends.BACKENDS[choice].reason if op == _ATTENTION else _REASONS[choice]


configure(os.environ.get("PRFL_KERNELS", ""))
