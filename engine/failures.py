"""Failures of the machine, not of the program: a full disk, too little memory, a lost loader process, a lost
rank."""

import errno
import re

import torch
from safetensors import SafetensorError

from prfl_engine.errors import TrainingError

KINDS = (RuntimeError, OSError, MemoryError, SafetensorError)
"""Types of the exceptions among which `reason` finds them."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# By torch's sources: its zip writer, its allocators on CPU, on CUDA and for pinned memory, gloo and NCCL, its
# loader.
_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error|unexpected pos \d+ vs")
_MEMORY = re.compile(r"[Cc]an(no|')t allocate memory|not enough memory|out of memory|std::bad_alloc")
_RANK = re.compile(r"gloo/\w+[./]|Gloo connectFullMesh|NCCL (error|communicator)")
_WORKER = re.compile(r"DataLoader worker \(pid")


class WorkerLost(RuntimeError):
    """A loader process has died."""


def lost_worker(error: Exception) -> WorkerLost | None:
    """What an error of the loader in the training process says about a dead worker; None: nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "in DataLoader worker process" in line:
        return None
    if isinstance(error, RuntimeError):
        return WorkerLost(line) if _WORKER.search(line) else None
    return WorkerLost(f"the connection to it broke ({type(error).__name__})")


def lost_rank(error: BaseException) -> bool:
    """Whether a collective of several processes has failed: one has ended, or did not come in time."""
    return isinstance(error, RuntimeError) and _RANK.search(str(error)) is not None


def reason(error: BaseException) -> str | None:
    """What failed, in one line; None for every other error."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {line}"
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return f"out of memory: {line}"
        if error.errno not in _DISK:
            return None
        where = f"{error.filename}: " if error.filename else ""
        return f"cannot write: {where}{error.strerror}"
    if isinstance(error, SafetensorError):
        return f"cannot write: {line}" if "serializing" in line and "I/O error" in line else None
    if not isinstance(error, RuntimeError) or isinstance(error, TrainingError):
        return None
    if _WRITER.search(line):
        return f"cannot write: {line} (torch.save; is the disk full?)"
    if _MEMORY.search(line):
        return f"out of memory: {line}"
    if lost_rank(error):
        return f"lost another process: {line}"
    return f"lost a loader process: {line}" if isinstance(error, WorkerLost) else None
