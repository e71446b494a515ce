"""compute-sanitizer on the CUDA C++ kernels, each called once, forward and backward, at the smallest size.

compute-sanitizer --tool memcheck python -m prfl_bench.accept.sanitizer modulate attention ...
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from prfl_bench.accept.row import FAILED, RAN, REFUSED, Context, Outcome, Row

TOOLS = ("memcheck", "racecheck", "synccheck")
NAME = "compute-sanitizer"
SECONDS = 90  # of a tool, most of it the start of torch under it
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
DONE, UNSUPPORTED = "called", "Device not supported"  # the second under gVisor


def program() -> str | None:
    """Where compute-sanitizer is: on PATH, in CUDA_HOME, by nvcc, in NVIDIA's wheel, in /usr/local/cuda."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parent.parent)
    if (wheel := find_spec("nvidia")) is not None:
        homes += [Path(folder, "cu13") for folder in wheel.submodule_search_locations]
    homes.append(Path("/usr/local/cuda"))
    places = [folder / name / NAME for folder in homes for name in ("bin", "compute-sanitizer")]
    return shutil.which(NAME) or next((str(path) for path in places if path.is_file()), None)


def operations() -> list[str]:
    """Those with a CUDA C++ kernel."""
    from prfl_kernels import dispatch

    dispatch.complete()
    return [op for op, records in dispatch.OPERATIONS.items() if dispatch.CUDA in records]


def run(context: Context, tool: str) -> Outcome:
    path = program()
    if path is None:
        return Outcome(REFUSED, f"{NAME} is not here")
    command = [path, "--tool", tool, sys.executable, "-m", "prfl_bench.accept.sanitizer", *operations()]
    # Without torch's cache every tensor is an allocation of its own, so that an access beside it is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return read(tool, done.returncode, done.stdout + done.stderr)


def read(tool: str, code: int, text: str) -> Outcome:
    """What a tool has printed."""
    lines = text.splitlines()
    called = [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{DONE} ")]
    found = [int(next(filter(None, m.groups()), 0)) for m in SUMMARY.finditer(text)]
    errors = [line.lstrip("= ") for line in lines if line.startswith("=========") and line.strip("= ")]
    errors = [text for text in errors if text != NAME.upper()]
    values = {"called": called, "lines": errors[:12]}
    if UNSUPPORTED in text and not called:
        return Outcome(REFUSED, f"{NAME}: {UNSUPPORTED} here", values)
    if not found:
        return Outcome(
            FAILED, f"exit code {code} and no summary: {lines[-1] if lines else 'nothing printed'}", values
        )
    if sum(found):
        return Outcome(FAILED, f"{sum(found)} by {tool}: {errors[0] if errors else ''}", values)
    if code or not called:
        return Outcome(FAILED, f"no errors, but exit code {code} after {len(called)} operations", values)
    return Outcome(RAN, f"no errors in {len(called)} operations", values)


def inside(ops: list[str]) -> None:
    """What runs under the tool."""
    import torch

    from prfl_bench import gates, selftest
    from prfl_kernels import dispatch

    cases = [c for c in selftest.cases("cuda") if c.implementation == dispatch.CUDA and c.op in ops]
    for operation in dict.fromkeys(c.operation for c in cases):
        own = [c for c in cases if c.operation == operation]
        case = min(own, key=lambda c: (c.dtype != torch.bfloat16, c.shape.tokens * c.shape.model.width))
        dispatch.configure("reference")
        torch.manual_seed(0)
        entry, s = selftest.OPERATIONS[operation], case.shape
        inputs = entry.inputs(s)
        dispatch.configure(f"{case.op}={dispatch.CUDA}")
        gates.results(partial(entry.call, s), inputs, entry.wanted)
        torch.cuda.synchronize()
        print(DONE, operation, flush=True)


def rows() -> list[Row]:
    return [Row(f"sanitizer/{tool}", partial(run, tool=tool), SECONDS, 0.2) for tool in TOOLS]


if __name__ == "__main__":
    inside(sys.argv[1:])
