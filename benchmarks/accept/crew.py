"""Workers seen from outside: one row at a time, within a time limit, replaced when they die or hang."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path

from prfl_bench.accept.row import DIED, HUNG, Row, Task

ALWAYS = {"PRFL_TUNING": ""}  # the constants run, not what was tuned here before
KILL = 20.0  # seconds that the driver may take to end a process whose kernel hangs
START = 180.0  # seconds that a process may take to import torch and to find the device


class Worker:
    """A process of worker.py, started when the first row is given to it."""

    def __init__(self, source: str, device: str, log: Path, environment: Mapping[str, str] = {}):  # noqa: B006
        self.command, self.log = [sys.executable, "-m", "prfl_bench.accept.worker"], log
        self.arguments, self.environment = [source, device], dict(environment)
        self.process: subprocess.Popen | None = None

    def start(self) -> str | None:
        """Have a process that waits for a row; why there is none, or None."""
        if self.process is not None:
            return None
        self.pipe, theirs = Pipe()
        with self.log.open("ab") as log:
            self.began = log.tell()
            self.process = subprocess.Popen(
                [*self.command, str(theirs.fileno()), *self.arguments],
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
                pass_fds=[theirs.fileno()],
                env=os.environ | ALWAYS | self.environment,
                start_new_session=True,
            )
        theirs.close()
        if self._answer(START) == b"ready":
            return None
        return f"a worker did not start: {self._end()}"

    def parts(self, row: Row) -> list[str]:
        """The names of the row's parts on this machine; [""] for a row without, or if no worker answers."""
        if row.parts is None or self.start() is not None:
            return [""]
        self.pipe.send_bytes(json.dumps({"row": row.name}).encode())
        answer = self._answer(START)
        if answer:
            return json.loads(answer)
        self._end()
        return [""]

    def run(self, task: Task, known: Mapping[str, dict], limit: float) -> dict:
        """The result: name, stage, state, detail, values, and seconds without the start of a process."""
        made = {"name": task.name, "stage": task.row.stage, "state": DIED, "detail": "", "values": {}}
        start = time.monotonic()
        if (why := self.start()) is not None:
            return made | {"detail": why, "seconds": time.monotonic() - start}
        start = time.monotonic()
        try:
            asked = {"row": task.row.name, "part": task.part, "known": known}
            self.pipe.send_bytes(json.dumps(asked).encode())
            answer = self._answer(limit)
        except BrokenPipeError:
            answer = b""
        if answer:
            made |= json.loads(answer)
            if not made.pop("alive"):
                self._end()
            return made
        hung, how = answer is None, self._end()
        why = (HUNG, f"no answer within {limit:.0f} s, killed") if hung else (DIED, how)
        return made | dict(zip(("state", "detail"), why, strict=True)) | {"seconds": time.monotonic() - start}

    def _answer(self, limit: float) -> bytes | None:
        """What the worker sends within `limit` seconds: None if nothing, b"" if it has died."""
        try:
            return self.pipe.recv_bytes() if self.pipe.poll(limit) else None
        except (EOFError, ConnectionResetError):
            return b""

    def _end(self) -> str:
        """End the process and all that it started; how it ended, and the last line that it wrote."""
        process, self.process = self.process, None
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self.pipe.close()
        try:
            code = process.wait(KILL)
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            how = f"not ended {KILL:.0f} s after SIGKILL: the driver holds it"
        with self.log.open("rb") as log:
            log.seek(self.began)
            lines = [
                line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()
            ]
        fatal = [line for line in lines if line.startswith("Fatal") or "Error" in line]
        last = (fatal or lines or [""])[-1]
        return f"{how}: {last}"[:400] if last else how

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.pipe.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None
