"""What this machine offers and which implementation of every operation will run on it, and why.

report() gathers plain dicts, render() prints them. Whether an optional package can be imported is asked here;
whether an attention library can run on a device, by its record (prfl_kernels.attention.libraries). A probe
that fails keeps the message: a missing package is an ImportError, two packages of versions that do not fit an
AttributeError.
"""

import importlib
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

import torch

from prfl_engine.gpu import _nvml_values
from prfl_kernels import dispatch, extension, matmul, processor
from prfl_kernels.attention import hub

GIB = 1 << 30
CPU_FLAGS = (  # x86, then Arm
    "avx", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile",
    "asimd", "sve", "bf16",
)  # fmt: skip


class Backend(NamedTuple):
    """An optional package."""

    name: str
    module: str
    distribution: str  # the name pip knows, which carries the version
    attribute: str | None  # what we use of it; None: finding the module is enough
    how: str  # how to get it


# Attention back ends are imported, since a broken build shows only then. Importing diffusers or
# transformers costs seconds and tells nothing more than finding them does.
BACKENDS = (
    Backend("FlashAttention 4", "flash_attn.cute", "flash-attn-4", "flash_attn_func",
            "pip install --pre flash-attn-4 (Hopper, Blackwell)"),
    Backend("FlashAttention 3", "flash_attn_interface", "flash_attn_3", "flash_attn_func",
            "build the hopper/ folder of the flash-attention repository (Hopper)"),
    Backend("kernels (Hugging Face)", "kernels", "kernels", "get_local_kernel", hub.GET),
    Backend("FlashAttention 2", "flash_attn", "flash-attn", "flash_attn_func",
            "pip install --no-build-isolation flash-attn (compiles, needs nvcc)"),
    Backend("xformers", "xformers.ops", "xformers", "memory_efficient_attention",
            "pip install xformers (torch >= 2.10)"),
    Backend("apex", "amp_C", "apex", None,
            "build NVIDIA's apex from its repository with --cpp_ext --cuda_ext; never from PyPI"),
    Backend("torchao", "torchao", "torchao", None, "pip install torchao"),
    Backend("peft", "peft", "peft", None, "pip install peft"),
    Backend("diffusers", "diffusers", "diffusers", None, "pip install diffusers"),
    Backend("transformers", "transformers", "transformers", None, "pip install transformers"),
    Backend("ftfy", "ftfy", "ftfy", None, "pip install ftfy"),
    Backend("wandb", "wandb", "wandb", None, "pip install wandb"),
    Backend("nvidia-ml-py", "pynvml", "nvidia-ml-py", "nvmlInit", "pip install nvidia-ml-py"),
)  # fmt: skip


def report() -> dict:
    """Everything `prfl doctor` shows, as plain values that json.dumps takes."""
    gpus, gpu_note = _gpus()
    return {
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": _version("triton"),
            "threads": torch.get_num_threads(),
        },
        "cpu": _cpu(),
        "gpus": gpus,
        "gpu_note": gpu_note,
        "compilers": [_compiler("gcc", "-dumpfullversion"), _compiler("nvcc", "--version")],
        "compiled": [
            _found(part, None, reason, available=state == "yes")
            for part, state, reason in extension.report()
        ],
        "backends": [_probe(backend) for backend in BACKENDS],
        "operations": [
            {"op": op, "implementation": implementation, "reason": reason}
            for op, implementation, reason in dispatch.choices()
        ],
        "implementations": [
            {"op": op, "name": record.name, "reason": record.reason, "absence": why}
            for op, record, why in dispatch.records()
        ],
    }


def render(found: dict) -> str:
    """The report as text for a terminal."""
    python, torch_, cpu = found["python"], found["torch"], found["cpu"]
    triton = torch_["triton"] or "not installed"
    lines = [
        f"Python {python['version']} on {python['platform']}",
        f"torch {torch_['version']} (CUDA {torch_['cuda'] or 'none'}, "
        f"cuDNN {torch_['cudnn'] or 'none'}), triton {triton}, {torch_['threads']} threads",
        f"CPU: {cpu['model']}, {cpu['cores']} cores, {cpu['memory_bytes'] / GIB:.0f} GiB, "
        f"{' '.join(cpu['flags']) or 'no vector flags known'} (torch uses {cpu['torch']}); "
        f"large float32 products by {cpu['products']}",
    ]
    lines += [_render_gpu(gpu) for gpu in found["gpus"]]
    if found["gpu_note"]:
        lines.append(found["gpu_note"])
    for title, rows in (
        ("Compilers", found["compilers"]),
        ("Compiled kernels (prfl_kernels._C)", found["compiled"]),
        ("Optional packages", found["backends"]),
    ):
        cells = [
            (row["name"], "yes" if row["available"] else "no",
             "  ".join(filter(None, (row["version"], row["reason"]))))
            for row in rows
        ]  # fmt: skip
        lines += ["", title, *columns(cells)]
    cells = [(row["op"], row["implementation"], row["reason"]) for row in found["operations"]]
    lines += ["", "Operations", *columns(cells), "", "Implementations", *columns(_alike(found))]
    return "\n".join(lines)


def _alike(found: dict) -> list[tuple[str, str, str]]:
    """(name, yes or no, reason and operations) of the implementations, one row for all that say the same."""
    ops: dict[tuple, list[str]] = {}
    for row in found["implementations"]:
        ops.setdefault((row["name"], row["reason"], row["absence"]), []).append(row["op"])
    return [
        (name, "no" if why else "yes", f"{reason}{f'; {why}' if why else ''}  ({', '.join(named)})")
        for (name, reason, why), named in ops.items()
    ]


def _gpus() -> tuple[list[dict], str]:
    """The GPUs torch sees, and one line about what cannot be said of them ('' when all can)."""
    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device"
        return [], f"No GPU: {why}"
    gpus, note = [], ""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        values, why = _nvml_values(index)
        note = note or why
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                **values,
            }
        )
    return gpus, note


def _render_gpu(gpu: dict) -> str:
    parts = [gpu["name"], f"sm_{gpu['capability'].replace('.', '')}"]
    parts.append(f"{gpu['memory_bytes'] / GIB:.0f} GiB")
    if "gpu_memory_bytes" in gpu:
        parts.append(f"{gpu['gpu_memory_bytes'] / GIB:.1f} GiB used")
    for unit, now, limit in (
        ("W", "gpu_power_w", "gpu_power_limit_w"),
        ("MHz", "gpu_sm_clock_mhz", "gpu_sm_clock_max_mhz"),
    ):
        if now in gpu:
            of = f" of {gpu[limit]:.0f}" if limit in gpu else ""
            parts.append(f"{gpu[now]:.0f}{of} {unit}")
    return "GPU: " + ", ".join(parts)


def _cpu() -> dict:
    # Cores of this process: a container or taskset leaves it fewer than the machine has.
    affinity = getattr(os, "sched_getaffinity", None)
    chosen, why = matmul.choice()
    return {
        "model": processor.name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": [flag for flag in CPU_FLAGS if flag in processor.flags()],
        "torch": torch.backends.cpu.get_cpu_capability(),
        "products": f"{'oneDNN' if chosen else 'torch'}: {why}",
    }


def _found(name: str, version: str | None, reason: str, available: bool) -> dict:
    return {"name": name, "available": available, "version": version, "reason": reason}


def _compiler(name: str, flag: str) -> dict:
    path = shutil.which(name)
    if path is None:
        return _found(name, None, "not on PATH", available=False)
    try:
        run = subprocess.run([path, flag], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return _found(name, None, str(error), available=False)
    numbers = re.findall(r"V?(\d+\.\d+[.\d]*)", run.stdout)
    return _found(name, numbers[-1] if numbers else None, path, available=True)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _probe(backend: Backend) -> dict:
    """Whether an optional package can be used here; the reason says how to get it when not."""
    version = _version(backend.distribution)
    why = ""
    if backend.attribute is None:
        available = find_spec(backend.module) is not None
    else:
        try:
            module = importlib.import_module(backend.module)
            if vars(module).get("__file__", "") is None:  # a folder of that name, such as this project's
                raise ModuleNotFoundError(name=backend.module)
            available = getattr(module, backend.attribute) is not None
        except (ImportError, AttributeError) as error:
            available = False
            if not _absent(error, backend.module):
                why = f"{' '.join(str(error).split())}; "
    if backend.name == "apex" and not available and version:
        why = f"the installed apex {version} is the unrelated PyPI package, or built without C++; "
    if available:
        return _found(backend.name, version, "", available)
    return _found(backend.name, None, why + backend.how, available)


def _absent(error: Exception, module: str) -> bool:
    """Whether the import failed because `module` or a parent of it simply is not installed."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def columns(rows: list[tuple[str, str, str]]) -> list[str]:
    """Rows of three cells, the first two padded to a common width."""
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
