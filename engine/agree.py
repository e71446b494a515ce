"""Ranks that must go on together or fail together, and a folder that all of them write to."""

import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from prfl_engine import files
from prfl_engine.errors import TrainingError, UserError
from prfl_kernels.waits import waiting


def several() -> bool:
    """Whether this process is one of several ranks, even of one."""
    return dist.is_available() and dist.is_initialized()


def leads(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this is the first rank of a group (None: all), or the only process."""
    return not several() or dist.get_rank(group) == 0


class _Watch(NamedTuple):
    limit: timedelta
    hosts: list[str]


_watched: dict[dist.ProcessGroup, _Watch] = {}


@contextmanager
def watched_groups(count: int, limit: timedelta) -> Iterator[list[dist.ProcessGroup]]:
    """So many gloo groups of all ranks. Where a rank does not come to `gathered` or `Agreed` within the
    limit, the others raise TrainingError, and the line of the first one names the rank and its host."""
    hosts = gathered(socket.gethostname())
    groups = [dist.new_group(backend="gloo", timeout=limit) for _ in range(count)]
    _watched.update(dict.fromkeys(groups, _Watch(limit, hosts)))
    try:
        yield groups
    finally:
        for group in groups:
            del _watched[group]


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value`, which can be pickled, of every rank of a group (None: all)."""
    if not several():
        return [value]
    found = [None] * dist.get_world_size(group)
    with waiting():
        if group in _watched:
            _await_all(group, _watched[group])
        dist.all_gather_object(found, value, group)
    return found


def reduced(values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """The sum of `values` over all ranks, or what op says; on the device."""
    values = values.clone()
    with waiting():
        dist.all_reduce(values, op)
    return values


def _await_all(group: dist.ProcessGroup, watch: _Watch) -> None:
    try:
        dist.monitored_barrier(group, watch.limit, wait_all_ranks=True)
    except RuntimeError as error:  # gloo's, which has no type of its own
        limit = f"within {watch.limit.total_seconds():g} s (parallel.timeout)"
        found = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", str(error))
        if found is None:  # the first rank waits for all, the others for it alone
            line = f"rank 0 on {watch.hosts[0]} ended or gave no answer {limit}; it may name another rank"
            raise TrainingError(line) from None
        lost = (f"rank {rank} on {watch.hosts[int(rank)]}" for rank in re.findall(r"\d+", found[1]))
        raise TrainingError(f"{' and '.join(lost)} ended or gave no answer {limit}") from None


class Agreed:
    """A with block that all ranks of a group (None: all) leave together.

    If it raises on some ranks, it raises on the others, too: the UserError or TrainingError of the lowest
    such rank, whose number its line has. So no rank waits for one that has failed. Inside the block there
    must be no collective after a point where one rank alone can fail.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        line = None if error is None else " ".join(str(error).split()) or kind.__name__
        said = gathered(None if error is None else (issubclass(kind, UserError), line), self.group)
        if error is None:
            for rank, theirs in enumerate(said):
                if theirs is not None:
                    raise (UserError if theirs[0] else TrainingError)(f"rank {rank}: {theirs[1]}")


PATIENCE = 0.25
"""Seconds after which ranks that wait for the work of others ask for each other."""


def patiently(work: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """work() on every rank of a group (None: all), which all leave together as an `Agreed` block.

    It may take longer than the time-out: a thread works while the ranks ask for each other. So a rank that
    is lost is found as ever, and one whose disk is slow is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prfl-work") as thread:
        working, pause = thread.submit(work), PATIENCE / 64
        while not all(gathered(working.done(), group)):
            wait([working], pause)
            pause = min(2 * pause, PATIENCE)
        with Agreed(group):
            working.result()


@contextmanager
def shared_folder(folder: Path, group: dist.ProcessGroup | None = None) -> Iterator[Path]:
    """files.atomic_folder for all ranks of a group (None: all), which must share the file system.

    The first rank makes the temporary folder. It takes its name after the block has ended well on every rank;
    otherwise nothing is left of it, and every rank raises.
    """
    with ExitStack() as stack:
        with Agreed(group):
            path = stack.enter_context(files.atomic_folder(folder)) if leads(group) else None
        path = next(p for p in gathered(path, group) if p is not None)
        with Agreed(group):
            yield path
        with Agreed(group):
            stack.close()  # here it takes its name
