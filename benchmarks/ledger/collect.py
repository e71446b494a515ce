"""The kernel ledger: what every Triton kernel of this package compiles to and moves, without a GPU.

One row a kernel launch at the shapes of Wan: registers, spills, occupancy and instructions of the
sm_90a code, bytes and operations counted in Triton's interpreter, and a predicted time. operations/ has
the operations. Compiling and interpreting take processes of their own, since TRITON_INTERPRET has to be
set before Triton is imported. docs/kernels.md says how to read it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prfl_bench.ledger import cuda as ledger_cuda
from prfl_bench.ledger import peers as ledger_peers
from prfl_bench.ledger import sass
from prfl_bench.ledger import table as ledger_rows
from prfl_bench.ledger.table import ASSUMPTIONS, DOT_RATES, LANES
from prfl_bench.operations import Launch, cases
from prfl_bench.shapes import Shape


def collect(
    quick: bool = False,
    peers: str | None = None,
    only: Callable[[Launch, Shape], bool] | None = None,
) -> dict:
    """Everything `prfl kernels --json` prints. peers: the tutorial's file for peers.py, "" for the
    installed peers alone, None for none; only: the Triton operations and shapes to take, without the CUDA
    kernels; None for all."""
    if find_spec("triton") is None:
        raise ValueError("ledger: got no Triton, want it installed")
    if peers is not None:
        ledger_peers.check(peers)
    jobs = cases(quick)
    taken = [i for i, job in enumerate(jobs) if only is None or only(*job)]
    # One process compiles all shapes of an operation, since some of them need the same kernels.
    names = list(dict.fromkeys(jobs[i][0].op for i in taken))
    workers = min(2, os.cpu_count() or 1, max(1, len(names)))
    shares = [[i for i in taken if names.index(jobs[i][0].op) % workers == n] for n in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        parts = [pool.submit(_spawn, "compile", [quick, share]) for share in shares]
        counted = _spawn("count", [quick, taken])
        compiled = {}
        for share, part in zip(shares, parts, strict=True):
            compiled |= zip(share, part.result(), strict=True)
    operations = [_row(*jobs[i], compiled[i], one) for i, one in zip(taken, counted, strict=True)]
    absent = ledger_cuda.absence()
    found = {"assumptions": ASSUMPTIONS, "operations": operations, "cuda_absent": absent}
    found["cuda"] = [] if absent or only is not None else ledger_cuda.collect(quick)
    return found if peers is None else found | {"peers": _spawn("peers", peers)}


def _spawn(task: str, what: Any) -> Any:
    """The results of `task`, from a process with Triton in the right mode: "compile" and "count" the
    cases numbered in what = [quick, share], or compile the "peers"."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PRFL_KERNELS")}
    environment["PRFL_TUNING"] = ""  # the module constants, also on a GPU that has tuned choices
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what launches without the option had so far
    if task == "count":
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        code = "import sys; from prfl_bench.ledger.collect import work; work(*sys.argv[1:])"
        arguments = [task, json.dumps(what), str(file)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment)
        if done.returncode:
            raise RuntimeError(f"ledger: the process that was to {task} ended with {done.returncode}")
        result = json.loads(file.read_text())
    if "error" in result:
        raise ValueError(result["error"])
    return result["rows"]


def work(task: str, what: str, file: str) -> None:
    """The inside of a worker process: results, or the message of a ValueError, as JSON in `file`."""
    torch.set_num_threads(1)
    asked = json.loads(what)
    try:
        if task == "peers":
            result = {"rows": ledger_peers.compile_peers(asked)}
        else:
            (quick, share), one = asked, _compile if task == "compile" else _count
            jobs = cases(quick)
            result = {"rows": [one(jobs[i][0].bind(jobs[i][1])) for i in share]}
    except ValueError as error:
        result = {"error": str(error)}
    Path(file).write_text(json.dumps(result))


def _compile(call: Callable) -> list[dict]:
    return [sass.facts(launch) for launch in sass.compile_calls(call)]


def _count(call: Callable) -> dict:
    from prfl_bench.ledger.traffic import count

    held, launches, torch_traffic = count(call)
    minimum = sum(a.nbytes for a in {id(a): a for a in held if a is not None}.values())
    return {"minimum": minimum, "launches": launches, "torch": torch_traffic}


def _dot_rate(dtype: str, precision: str) -> float:
    if dtype.startswith("fp8"):
        return DOT_RATES["fp8"]
    return DOT_RATES["16-bit"] if dtype in ("bf16", "fp16") else DOT_RATES[precision]


def _row(launch: Launch, s: Shape, compiled: list[dict], counted: dict) -> dict:
    """Join what was compiled and what was counted for one operation at one shape."""
    kernels = []
    for code, traffic in zip(compiled, counted["launches"], strict=True):
        if code["kernel"] != traffic["kernel"]:
            raise ValueError(f"ledger: got {traffic['kernel']} interpreted, want {code['kernel']}")
        kernels.append(_kernel(code, traffic, s.tokens * s.model.width, launch.kind == "attention"))
    memory, cached = counted["torch"]["memory"], sum(counted["torch"]["cached"].values())
    row = ledger_rows.operation(launch, s, counted["minimum"], kernels, memory, cached)
    return row | {"elementwise": sum(k["elementwise"] for k in kernels)}


def _kernel(code: dict, traffic: dict, row_values: int, one_loop: bool = False) -> dict:
    """One launch; row_values: how many values the rows of C values have together; one_loop: all products are
    in the hot loop."""
    for a in traffic["arguments"]:
        a["rows"] = a["footprint"] >= row_values  # whole rows, of a byte a value at least
    work = [
        (2 * m * n * k * number, _dot_rate(dtype, precision))
        for m, n, k, dtype, precision, number in traffic["dots"]
    ]
    flops = sum(flops for flops, _ in work)
    if one_loop and "cycles" in code:
        products = ledger_rows.product_seconds(code, traffic["grid"], code["blocks"], flops)
    else:
        products = sum(n / rate for n, rate in work)
    seconds = {"products": products, "lanes": traffic["elementwise"] / LANES}
    return ledger_rows.kernel(code, traffic["arguments"], code["descriptors"], flops, seconds) | {
        "scalars": [a["name"] for a in traffic["arguments"] if a["scalar"] and (a["read"] or a["written"])],
        "elementwise": traffic["elementwise"],
        "dots": traffic["dots"],
    }
