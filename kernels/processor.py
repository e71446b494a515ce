"""What the processor has, as far as a choice depends on it."""

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

from prfl_kernels.compiling import constant

# oneDNN reads the first of these that is set; another value than a name of an instruction set means no limit.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def _told(key: str) -> str | None:
    """The first value of a key of /proc/cpuinfo; None where the file or the key is missing."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^(?:{key})\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return found and found[1].strip()


@cache
def name() -> str:
    """The processor's model, as the system names it."""
    return _told("model name") or platform.processor() or platform.machine()


@cache
def vendor() -> str | None:
    """Who made an x86 processor, such as AuthenticAMD; None where the system does not say."""
    return _told("vendor_id")


@cache
def flags() -> frozenset[str]:
    """The features that the system names in /proc/cpuinfo; none where there is no such file."""
    return frozenset((_told("flags|Features") or "").split())


@constant  # of the machine, not of the tensors
def bfloat16_absence() -> str | None:
    """Why torch's bfloat16 products are no faster than its float32 ones; None if they are: the processor has
    AVX512-BF16 or AMX, and oneDNN, which makes these products, is there and may use it."""
    if not {"avx512_bf16", "amx_bf16"} & flags():
        return "the processor has neither AVX512-BF16 nor AMX"
    if not torch.backends.mkldnn.is_available():
        return "torch has no oneDNN"
    return _forbidden(r"SSE|AVX2|AVX$|AVX512_(CORE|CORE_VNNI|MIC.*)$", "bfloat16")


@constant  # of the machine, not of the tensors
def amx_absence() -> str | None:
    """Why torch's bfloat16 products do not use AMX, the matrix unit of Intel's Xeons from Sapphire Rapids on;
    None if they do: the system names it, and oneDNN, which makes these products, is there and may use it."""
    if not {"amx_tile", "amx_bf16"} <= flags():
        return "the processor has no AMX"
    if not torch.backends.mkldnn.is_available():
        return "torch has no oneDNN"
    return _forbidden(r"(?!.*AMX)(SSE|AVX)", "AMX")


def _forbidden(limits: str, what: str) -> str | None:
    """That oneDNN's limit in the environment, one that the pattern `limits` matches, forbids `what`."""
    for name in _LIMITS:
        limit = os.environ.get(name, "").upper()
        if limit:
            return f"{name}={limit} forbids {what}" if re.match(limits, limit) else None
    return None
