"""What the processor has, as far as a choice depends on it."""

import os
import re
from functools import cache
from pathlib import Path

import torch

from prfl_kernels.compiling import constant

# oneDNN reads the first of these that is set; another value than a name of an instruction set means no limit.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@cache
def flags() -> frozenset[str]:
    """The features that the system names in /proc/cpuinfo; none where there is no such file."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return frozenset(found[1].split()) if found else frozenset()


@constant  # of the machine, not of the tensors
def amx_absence() -> str | None:
    """Why torch's bfloat16 products do not use AMX, the matrix unit of Intel's Xeons from Sapphire Rapids on;
    None if they do: the system names it, and oneDNN, which makes these products, is there and may use it."""
    if not {"amx_tile", "amx_bf16"} <= flags():
        return "the processor has no AMX"
    if not torch.backends.mkldnn.is_available():
        return "torch has no oneDNN"
    for name in _LIMITS:
        limit = os.environ.get(name, "").upper()
        if limit:
            return f"{name}={limit} forbids AMX" if re.match(r"(?!.*AMX)(SSE|AVX)", limit) else None
    return None
