"""The acceptance run: rows in their order, each by a worker, within the minutes given, every result kept."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from prfl_bench.accept.crew import Worker
from prfl_bench.accept.journal import Journal
from prfl_bench.accept.row import HUNG, STAGES, Row, Task
from prfl_engine.errors import UserError

SOURCE = "prfl_bench.accept.listing:rows"
LOG = "workers.log"
MOST_WORKERS = 6  # beside each other, where nothing is timed: each holds a CUDA context and compiles


def chosen(rows: list[Row], only: Iterable[str]) -> list[Row]:
    """The rows that a stage, a name, the beginning of one up to a slash, or a pattern names; all for none.
    UserError for what names nothing."""
    taken: set[str] = set()
    for wanted in (only := list(only)):
        found = [
            r.name
            for r in rows
            if r.name == wanted or r.name.startswith(f"{wanted}/") or fnmatchcase(r.name, wanted)
        ]
        if not found:
            stages = ", ".join(STAGES)
            raise UserError(f"--only: got {wanted!r}, want a row of `prfl accept --list` or one of {stages}")
        taken.update(found)
    return [row for row in rows if row.name in taken or not only]


def workers_for(device: str) -> int:
    """How many workers run beside each other what is not timed. On a CPU one: it has all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // 2)) if device == "cuda" else 1


class Run:
    """One call of the command on the rows of `source`."""

    def __init__(
        self,
        rows: list[Row],
        device: str,
        out: Path,
        journal: Journal,
        minutes: float,
        say: Callable[[str], None],
        source: str = SOURCE,
    ):
        self.rows, self.device, self.journal, self.say = rows, device, journal, say
        self.log, self.source = out / LOG, source
        self.begin = time.monotonic()
        self.end = self.begin + 60 * minutes
        self.not_run: dict[str, str] = {}
        self.lock = threading.Lock()
        self.spent: dict[str, list[float]] = {}  # by stage: predicted and real seconds of what has run

    def run(self) -> None:
        """All rows that fit; the others are in `not_run`, with the reason."""
        # Its threads live as long as the run, since a worker ends with the thread that started it.
        with ThreadPoolExecutor(workers_for(self.device)) as self.pool:
            kept = self._worker({})
            try:
                for (alone, environment), rows in itertools.groupby(self.rows, self._kind):
                    if kept.environment != dict(environment):
                        kept.close()
                        kept = self._worker(dict(environment))
                    tasks = [task for row in rows for task in self._tasks(kept, row)]
                    if alone or workers_for(self.device) == 1:
                        for task in tasks:
                            self._one(kept, task)
                    else:
                        self._together(kept, tasks)
            except BaseException:
                self.end = 0.0  # what other threads have not begun is not run
                raise
            finally:
                kept.close()

    def _kind(self, row: Row) -> tuple[bool, tuple]:
        """What rows have in common that run one after another in one process."""
        return row.alone, tuple(row.environment.items()) if self.device == "cpu" else ()

    def _worker(self, environment: dict[str, str]) -> Worker:
        return Worker(self.source, self.device, self.log, environment)

    def _tasks(self, worker: Worker, row: Row) -> list[Task]:
        """The parts of a row, where there is time for one."""
        if row.parts is None:
            return [Task(row)]
        if self.left() <= 0:
            self.not_run[row.name] = "no time left"
            return []
        parts = worker.parts(row)
        return [Task(row, part, 1 / len(parts)) for part in parts]

    def _together(self, kept: Worker, tasks: list[Task]) -> None:
        """Tasks by several workers; `kept` is one of them, the others end with this."""
        waiting = iter(tasks)

        def work(worker: Worker) -> None:
            try:
                while True:
                    with self.lock:
                        task = next(waiting, None)
                    if task is None:
                        return
                    self._one(worker, task)
            finally:
                if worker is not kept:
                    worker.close()

        count = min(workers_for(self.device), len(tasks))
        more = [self._worker(kept.environment) for _ in range(count - 1)]
        for done in [self.pool.submit(work, worker) for worker in (kept, *more)]:
            done.result()

    def left(self) -> float:
        return self.end - time.monotonic()

    def expected(self, task: Task) -> float:
        """Seconds, corrected by how the stage's prediction has held so far."""
        predicted, real = self.spent.get(task.row.stage, (0.0, 0.0))
        return task.cost(self.device) * (min(10.0, max(0.2, real / predicted)) if predicted else 1.0)

    def _one(self, worker: Worker, task: Task) -> None:
        if task.name in self.journal.results:
            return
        expected, left = self.expected(task), self.left()
        if expected > left:
            self.not_run[task.name] = f"takes about {expected:.0f} s, {max(0, left):.0f} s were left"
            return
        limit = min(task.limit(self.device), left)
        # What measures no time asks for nothing that was measured before.
        result = worker.run(task, self.journal.results if task.row.alone else {}, limit)
        if result["state"] == HUNG and limit < task.limit(self.device):
            self.not_run[task.name] = f"not done after {limit:.0f} s, when the minutes were over"
            return
        with self.lock:
            self.journal.add(result)
            before = self.spent.get(task.row.stage, (0.0, 0.0))
            self.spent[task.row.stage] = [
                before[0] + task.cost(self.device),
                before[1] + result["seconds"],
            ]
            self.say(line(result, time.monotonic() - self.begin))


def line(result: dict, now: float) -> str:
    """A result for the terminal."""
    head = f"{now / 60:5.1f} min {result['seconds']:6.1f} s  {result['state']:8} {result['name']}"
    return f"{head}: {result['detail']}" if result["detail"] else head
