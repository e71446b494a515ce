"""Files and folders that a kill, a power cut, a full disk or a second run leaves whole.

Everything is written under another name, flushed to the disk (files, their folder), and then renamed; the
folder that holds it is flushed after that. So a run that dies at any point leaves the old one or the new.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prfl_engine.errors import UserError, named
from prfl_engine.paths import check_file

LOCK = "run.lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def checkpoints(out: Path) -> list[Path]:
    """The folders checkpoint-N of a run, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if re.fullmatch("checkpoint-(0|[1-9][0-9]*)", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_whole(path: Path, content: str | bytes, writer: str = "") -> None:
    """Write a file; it has its old content or the new one, and no other. Processes that may write the same
    file at the same time each have a name, `writer`."""
    part = path.with_name(f".{path.name}{writer and '.' + writer}.tmp")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` (replacing it) when the block ends well.

    A folder that is replaced is swapped with the new one by renameat2, so the name is never absent. Where the
    file system or the libc has no such call, the old one is renamed first; a run that is killed before the
    second rename leaves it as .NAME.old, and `clear_leftovers` gives it its name back.
    """
    temporary = _beside(folder, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for root, _, names in os.walk(temporary, topdown=False):
            for name in names:
                sync(Path(root, name))
            sync(Path(root))
        if not folder.exists():
            os.replace(temporary, folder)
        elif not _exchange(temporary, folder):
            old = _beside(folder, "old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill in the middle leaves no half of it under its name."""
    temporary = _beside(folder, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def clear_leftovers(out: Path) -> None:
    """Delete what a killed run was writing in `out`; for whoever holds its lock."""
    for path in [p for name in ("best", "checkpoint-*") for p in out.glob(f".{name}.old")]:
        folder = out / path.name.removeprefix(".").removesuffix(".old")
        shutil.rmtree(path) if folder.exists() else os.replace(path, folder)
    for path in [p for name in ("best", "checkpoint-*") for p in out.glob(f".{name}.tmp")]:
        shutil.rmtree(path)
    for name in ("config.yaml", "metrics.jsonl"):
        (out / f".{name}.tmp").unlink(missing_ok=True)


def check_free(out: Path) -> None:
    """UserError if another process has the lock of `out`; writes nothing."""
    if os.path.lexists(out / LOCK):
        file = _lock(out)
        if file is not None:
            os.close(file)


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold the lock of the folder `out`; False where its file system has no locks.

    It is a POSIX lock on out/run.lock, which the kernel takes from a dead process; loader processes that
    outlive theirs do not inherit it. UserError if another process has it.
    """
    file = _lock(out)
    if file is None:
        yield False
        return
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield True
    finally:
        (out / LOCK).unlink(missing_ok=True)
        os.close(file)


def _lock(out: Path) -> int | None:
    """A descriptor that holds the lock; None where there are no locks."""
    path = out / LOCK
    if os.path.lexists(path):
        with named("train.out"):
            check_file(path, "the lock of a run, or nothing there")
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have deleted the file between our two calls.
            if os.fstat(file).st_nlink > 0:
                return file
            os.close(file)
        except OSError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"train.out: {out} is in use by {holder}, want a folder without a running run"
                ) from None
            if error.errno in _NO_LOCKS:
                return None
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(b))


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
