"""Rates that `prfl accept` has measured, in place of those that machine.py assumes.

Its report writes them to rates.json: {"gpu": torch's name, "date", "torch", "rates": {a field of Rates: its
value}, "steps": [{"step", "bytes", "seconds", "bytes_predicted", "seconds_predicted"}]}.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prfl_engine.errors import UserError, named
from prfl_engine.inputs import read_json
from prfl_engine.planner.machine import Machine
from prfl_engine.planner.seconds import Rates

FILE = "rates.json"
WORDS = {
    "products": "products, TFLOP/s", "attention": "attention, TFLOP/s",
    "attention_backward": "its backward, TFLOP/s", "memory": "memory, GB/s", "link": "host link, GB/s",
    "products_fp8": "products in e4m3, TFLOP/s", "attention_fp8": "attention in e4m3, TFLOP/s",
}  # fmt: skip


class Step(NamedTuple):
    """A step that was measured, and what was predicted of it before."""

    step: str
    bytes: float
    seconds: float
    bytes_predicted: float
    seconds_predicted: float


@dataclass(frozen=True)
class Measured:
    """What was measured on a GPU."""

    gpu: str
    date: str
    rates: dict[str, float]
    steps: tuple[Step, ...]

    def on(self, gpu: Machine) -> Machine:
        """The machine with these rates. UserError for one of another kind."""
        kind = gpu.name.split("-")[0].upper()
        if kind not in self.gpu.upper():
            raise UserError(f"--rates: got rates of {self.gpu!r}, want those of --gpu {gpu.name}")
        rest = [word.split(",")[0] for field, word in WORDS.items() if field not in self.rates]
        basis = f"measured on {self.gpu}, {self.date}"
        if rest:
            basis += f"; not measured, and as assumed without: {', '.join(rest)}"
        links = "links between GPUs assumed"
        return gpu._replace(rates=gpu.rates._replace(**self.rates), basis=f"{basis}; {links}")

    def text(self, assumed: Rates) -> list[str]:
        """Lines of a table: every rate as assumed and as measured, every step as predicted and measured."""
        lines = [f"{'rates':32}{'assumed':>12}{'measured':>12}{'ratio':>9}"]
        for field, value in self.rates.items():
            unit = 1e12 if "TFLOP" in WORDS[field] else 1e9
            before = getattr(assumed, field)
            cells = f"{before / unit:12,.0f}{value / unit:12,.0f}{value / before:9.2f}" if before else ""
            lines.append(f"  {WORDS[field]:30}{cells}")
        if self.steps:
            heads = "".join(f"{head:>12}" for head in ("GB", "predicted", "s", "predicted"))
            lines += ["", f"{'steps that were measured there':32}{heads}"]
        for s in self.steps:
            sizes = f"{s.bytes / 1e9:12.2f}{s.bytes_predicted / 1e9:12.2f}"
            lines.append(f"  {s.step[:29]:30}{sizes}{s.seconds:12.2f}{s.seconds_predicted:12.2f}")
        return lines


def read(path: str | Path) -> Measured:
    """What a file holds that `prfl accept` has written. UserError for another one."""
    want = f"the {FILE} that a report of prfl accept has written on a GPU"
    with named("--rates"):
        held = read_json(path, want)
    try:
        rates = {field: float(value) for field, value in held["rates"].items()}
        steps = tuple(Step(str(s["step"]), *(float(s[f]) for f in Step._fields[1:])) for s in held["steps"])
        found = Measured(str(held["gpu"]), str(held["date"]), rates, steps)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"--rates: {path}: {error!r}, want {want}") from None
    numbers = [*rates.values(), *(n for s in steps for n in s[1:])]
    if not rates or rates.keys() - WORDS.keys() or not all(0 < n < float("inf") for n in numbers):
        raise UserError(f"--rates: {path}: got rates {sorted(rates)}, want {want}")
    return found
