"""Results as they come: one JSON line each, on the disk before the next row begins."""

import json
import os
import time
from pathlib import Path

from prfl_engine.errors import UserError, check, named
from prfl_engine.inputs import parse_json, read_bytes

FILE = "rows.jsonl"
HEAD, RESULT = {"machine": dict, "date": str}, {"name": str, "stage": str, "state": str, "values": dict}
WANT = "results of prfl accept"


class Journal:
    """The results of a folder, by the name of their rows. A last line that was cut off is dropped.

    machine: what the results hold for; another machine's folder is refused with UserError. None: whatever the
    folder holds it for.
    """

    def __init__(self, folder: Path, machine: dict | None):
        self.path, self.results = folder / FILE, {}
        self.machine, self.date = machine or {}, time.strftime("%Y-%m-%d")
        whole = 0
        if os.path.lexists(self.path):
            with named("--out"):
                whole = self._read()
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
        for number, line in enumerate(read_bytes(self.path, WANT).splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            where = f"{self.path}, line {number}"
            held = parse_json(line, where, WANT)
            fields = HEAD if "machine" in held else RESULT
            fits = all(isinstance(held.get(name), kind) for name, kind in fields.items())
            check(fits, where, held, f"{WANT}: {', '.join(fields)}")
            if fields is HEAD:
                device = held["machine"].get("device")
                check(isinstance(device, str), f"{where}: device", device, "that of a machine")
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
