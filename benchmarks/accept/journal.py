"""Results as they come: one JSON line each, on the disk before the next row begins."""

import json
import os
import time
from pathlib import Path

from prfl_engine.errors import UserError

FILE = "rows.jsonl"


class Journal:
    """The results of a folder, by the name of their rows. A last line that was cut off is dropped.

    machine: what the results hold for; another machine's folder is refused with UserError. None: whatever the
    folder holds it for.
    """

    def __init__(self, folder: Path, machine: dict | None):
        self.path, self.results = folder / FILE, {}
        self.machine, self.date = machine or {}, time.strftime("%Y-%m-%d")
        whole = self._read() if self.path.exists() else 0
        if machine is not None and self.machine != machine:
            other = {k: v for k, v in self.machine.items() if machine.get(k) != v}
            raise UserError(f"--out: {folder} holds results of {other}, want another folder for this machine")
        if machine is not None and whole == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--out: {folder}: {error.strerror}, want a folder that can be made"
                ) from None
            self.path.write_bytes(b"")
            self._append({"machine": machine, "date": self.date})
        elif machine is not None:
            os.truncate(self.path, whole)

    def _read(self) -> int:
        """Take in all whole lines; returns how many bytes they are."""
        whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                held = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                raise UserError(f"--out: {self.path}: line {number} is no JSON") from None
            if held is None:
                break
            if "machine" in held:
                self.machine, self.date = held["machine"], held["date"]
            else:
                self.results[held["name"]] = held
            whole += len(line)
        return whole

    def add(self, result: dict) -> None:
        """Keep a result, on the disk too."""
        self.results[result["name"]] = result
        self._append(result)

    def _append(self, held: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(held) + "\n")
            file.flush()
            os.fsync(file.fileno())
