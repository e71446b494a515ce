"""A row of the acceptance run: one measurement, what it is expected to cost, and what came of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

RAN, REFUSED, FAILED, HUNG, DIED = "ran", "refused", "failed", "hung", "died"
BAD = (FAILED, HUNG, DIED)
NOT_RUN = "not run"

STAGES = {
    "environment": "What is here, and what was built",
    "correct": "Every implementation of every operation against float64 or float32",
    "memory": "Memory-bound kernels",
    "attention": "Attention by back end",
    "tiles": "Triton's tile choices",
    "step": "One PRFL step of Wan 1.3B at 480P",
    "large": "Eight blocks of Wan 14B",
    "graphs": "Rollout steps as CUDA graphs",
    "sanitizer": "compute-sanitizer on the CUDA C++ kernels",
}


class Outcome(NamedTuple):
    """What a row found. values: numbers and short texts that json.dumps takes."""

    state: str
    detail: str = ""
    values: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Context(NamedTuple):
    """What a row is given: the device type, and if `alone` the results (dicts, by name) before it."""

    device: str
    known: Mapping[str, dict]
    part: str = ""  # of a row with parts

    @property
    def small(self) -> bool:
        """Whether rows take their small form."""
        return self.device == "cpu"

    def values(self, name: str) -> dict[str, Any]:
        """Those of an earlier row, none where it did not run."""
        return self.known.get(name, {}).get("values", {})


class Row(NamedTuple):
    """name: STAGE/... ; seconds: predicted on an H200; small: on two CPU cores, in the small form.

    A row that is not `alone` measures no time, so others may run beside it. parts(device) are the names of
    what it consists of on this machine, each run by itself, with a result of its own: NAME/PART.
    """

    name: str
    run: Callable[[Context], Outcome]
    seconds: float
    small: float = 1.0
    alone: bool = True
    parts: Callable[[str], list[str]] | None = None
    environment: Mapping[str, str] = {}  # noqa: RUF012 - of its worker, in the small form

    @property
    def stage(self) -> str:
        return self.name.split("/")[0]

    def cost(self, device: str) -> float:
        """Predicted seconds of all parts."""
        return self.small if device == "cpu" else self.seconds


class Task(NamedTuple):
    """A row, or a part of one, as a worker runs it."""

    row: Row
    part: str = ""
    share: float = 1.0  # of the row's predicted seconds

    @property
    def name(self) -> str:
        return f"{self.row.name}/{self.part}" if self.part else self.row.name

    def cost(self, device: str) -> float:
        return self.share * self.row.cost(device)

    def limit(self, device: str) -> float:
        """Seconds after which it counts as hung."""
        return 30 + 5 * self.cost(device)
