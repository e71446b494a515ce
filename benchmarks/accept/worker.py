"""The process that runs rows one after another: `crew` starts it, and starts another when it dies or hangs.

    python -m prfl_bench.accept.worker DESCRIPTOR MODULE:FUNCTION DEVICE

It reads {"row", "part", "known"} from the connection of that descriptor and answers with the outcome, or with
the names of the row's parts where "known" is missing; FUNCTION(device) of MODULE gives the rows. After a
fault of the device, which ends every later call of this process, it says so and ends.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from importlib import import_module
from multiprocessing.connection import Connection

import torch

from prfl_bench.accept.row import FAILED, Context, Outcome, Row
from prfl_kernels import dispatch, extension

_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def rows_of(source: str, device: str) -> list[Row]:
    """The rows of MODULE:FUNCTION."""
    module, _, function = source.partition(":")
    return getattr(import_module(module), function)(device)


def run(row: Row, context: Context) -> tuple[Outcome, bool]:
    """(what the row found, whether the device still answers)."""
    try:
        outcome = row.run(context)
        if context.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return outcome, True
    except Exception as error:  # whatever a library raises costs this row alone
        return Outcome(FAILED, told(error)), answers(context.device)
    finally:
        dispatch.configure("")


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:400]


def answers(device: str) -> bool:
    """Whether the device takes work after an error: an illegal access ends the whole context."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(descriptor: str, source: str, device: str) -> None:
    end_with_parent()
    faulthandler.enable()
    os.dup2(2, 1)  # what libraries print goes to the log
    pipe = Connection(int(descriptor))
    if device == "cpu":
        extension.keep_freed_memory()
    rows = {row.name: row for row in rows_of(source, device)}
    pipe.send_bytes(b"ready")
    while True:
        try:
            asked = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        row = rows[asked["row"]]
        if "known" not in asked:
            pipe.send_bytes(json.dumps(row.parts(device)).encode())
            continue
        print("---", row.name, asked["part"], file=sys.stderr, flush=True)
        start = time.perf_counter()
        outcome, alive = run(row, Context(device, asked["known"], asked["part"]))
        made = outcome._asdict() | {"seconds": time.perf_counter() - start, "alive": alive}
        pipe.send_bytes(json.dumps(made).encode())
        if not alive:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
