"""What is here, what was built, and the rates of the machine that the other rows are held against."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from prfl_bench import timing
from prfl_bench.accept.machine import ROOT
from prfl_bench.accept.row import FAILED, RAN, REFUSED, Context, Outcome, Row
from prfl_engine.tools import doctor
from prfl_kernels import dispatch, extension

LINK_BYTES = 1 << 30
REPEAT = 5


def machine(context: Context) -> Outcome:
    """The versions of everything, and the defaults of the operations."""
    found = doctor.report()
    found["driver"] = driver()
    q = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=context.device)
    found["attention"] = {
        "forward": dispatch.implementation("attention", q), "backward": dispatch.backward_of("attention", q)
    }  # fmt: skip
    names = [gpu["name"] for gpu in found["gpus"]] or [found["gpu_note"]]
    t = found["torch"]
    nvcc = next(c["version"] or "none" for c in found["compilers"] if c["name"] == "nvcc")
    versions = f"torch {t['version']}, triton {t['triton']}, nvcc {nvcc}, driver {found['driver'] or 'none'}"
    return Outcome(RAN, f"{', '.join(names)}; {versions}", found)


def driver() -> str | None:
    """The version of NVIDIA's driver, where nvidia-smi is here."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def build(context: Context) -> Outcome:
    """Whether the compiled kernels of this device are there, and no older than their sources."""
    why = extension.absence(context.device, context.device)
    values = {part: [state, reason] for part, state, reason in extension.report()}
    if why is not None:
        nvcc = context.device == "cuda" and (shutil.which("nvcc") or os.environ.get("CUDA_HOME"))
        return Outcome(FAILED if nvcc else REFUSED, f"the {context.device} kernels: {why}", values)
    module = Path(extension.extension().__file__)
    newest = max((ROOT / "csrc").rglob("*"), key=lambda path: path.stat().st_mtime if path.is_file() else 0)
    if newest.stat().st_mtime > module.stat().st_mtime:
        return Outcome(
            FAILED, f"{module.name} is older than {newest.relative_to(ROOT)}: install again", values
        )
    return Outcome(RAN, values[context.device][1], values)


def rates(context: Context) -> Outcome:
    """Copy, products and, on a GPU, the link to the host."""
    found = timing.limits(context.device, torch.bfloat16, fp8=not context.small, repeat=REPEAT)
    if context.device == "cuda":
        host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device="cuda")
        ways = {
            "to the host": lambda: lambda: host.copy_(there, non_blocking=True),
            "from the host": lambda: lambda: there.copy_(host, non_blocking=True),
        }
        found |= {way: LINK_BYTES / t.least for way, t in timing.measure(ways, "cuda", REPEAT).items()}
    shown = [
        f"{name} {rate / 1e9:,.0f} {'GFLOP/s' if name in ('product', 'fp8') else 'GB/s'}"
        for name, rate in found.items()
    ]
    return Outcome(RAN, ", ".join(shown), found)


def limits_of(context: Context) -> dict[str, float]:
    """The rates that were measured, or measured now where that row has not run."""
    return context.values("environment/rates") or rates(context).values


def driver_number(text: str | None) -> int | None:
    """The major version of a driver."""
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


def rows() -> list[Row]:
    return [
        Row("environment/machine", machine, 6, 4),
        Row("environment/build", build, 0.2, 0.2),
        Row("environment/rates", rates, 4, 6),
    ]
