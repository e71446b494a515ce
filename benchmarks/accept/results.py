"""What runs have found, as the report and README read it: benchmarks/results/DATE-GPU.json."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prfl_bench.accept.row import RAN
from prfl_bench.accept.steps import predicting
from prfl_engine.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "results"
FIELDS = {"machine": dict, "date": str, "rows": list, "not_run": dict}


class Results(NamedTuple):
    """Results by row name, and what they were measured on."""

    machine: dict
    date: str
    rows: dict[str, dict]
    not_run: dict[str, str] = {}  # noqa: RUF012 - never changed

    @property
    def on_gpu(self) -> bool:
        return self.machine.get("device") == "cuda"

    def ran(self, name: str) -> dict | None:
        """The values of a row that ran."""
        found = self.rows.get(name)
        return found["values"] if found is not None and found["state"] == RAN else None

    def stage(self, prefix: str) -> Iterator[dict]:
        """The results whose names begin so."""
        return (result for name, result in self.rows.items() if name.startswith(prefix))

    def attention(self, kind: str, model: str, tokens: int) -> dict[str, dict[str, dict]]:
        """{back end: {"forward" or "backward": row}} of what ran."""
        start = f"attention/{kind}/{model}/{tokens}/"
        return {
            result["name"].removeprefix(start): {r["pass"]: r for r in result["values"]["rows"] if r["ms"]}
            for result in self.stage(start)
            if result["state"] == RAN
        }

    def attention_ms(self) -> dict[str, dict[str, float]]:
        """{"forward", "backward": {back end: ms}}, the fastest first, at 14B and 32,760 tokens."""
        found: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for name, passes in self.attention("self", "14B", 32760).items():
            for direction, row in passes.items():
                found[direction][name] = row["ms"]["median"]
        return {d: dict(sorted(times.items(), key=lambda item: item[1])) for d, times in found.items()}

    def memory(self, model: str, tokens: int) -> dict[str, list[dict]]:
        """{operation: rows of every pass and back end} of what ran."""
        found = {}
        for result in self.stage("memory/"):
            if result["state"] == RAN and result["name"].endswith(f"/{model}/{tokens}"):
                found[result["name"].split("/")[1]] = [r for r in result["values"]["rows"] if r["ms"]]
        return found

    def job(self, name: str) -> tuple[dict, dict] | None:
        """(what was measured, what was predicted) of a training step, where both are there."""
        measured, predicted = self.ran(name), self.ran(predicting(name))
        return (measured, predicted) if measured and predicted else None


def file_name(machine: dict, date: str) -> str:
    """DATE-GPU.json"""
    name = machine["name"] if machine["device"] == "cuda" else "cpu"
    return f"{date}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read(path: Path) -> Results:
    """The results of a file that `report.write` made. UserError for another."""
    try:
        held = json.loads(path.read_text())
        for field, kind in FIELDS.items():
            if not isinstance(held[field], kind):
                raise TypeError(field)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: got no results of prfl accept ({error!r})") from None
    rows = {row["name"]: row for row in held["rows"]}
    return Results(held["machine"], held["date"], rows, held["not_run"])


def newest(folder: Path = FOLDER) -> Results | None:
    """Those of the newest file measured on a GPU, None where there is none."""
    found = (read(path) for path in sorted(folder.glob("[0-9]*.json"), reverse=True))
    return next((results for results in found if results.on_gpu), None)
