"""Tile choices of the Triton kernels: a module's constants, unless `prfl tune` measured better ones here.

A launcher asks `choice` with the name of its kernel, a key of what the best tile depends on, its constant
and the device of its tensors. Without a tuned file the constant comes back, so every fresh process computes
the same bits. Tuned choices lie in one file for every kind of GPU, in the folder PRFL_TUNING (~/.cache/prfl
by default; empty: none is read), made by benchmarks/tune.py. Where GPUs of a machine differ, each has the
choices of its kind. A file is read once a process: within it a choice never changes.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from prfl_kernels.jit import triton

Key = tuple[int | str, ...]
Hook = Callable[[str, Key, tuple], tuple]
CURRENT = torch.device("meta")  # of no tensor: the current GPU's choices
_hook: list[Hook] = []


def bucket(length: int) -> int:
    """Lengths up to the next power of two share a choice: ceil(log2(length))."""
    return max(0, length - 1).bit_length()


def choice(kernel: str, key: Key, default: tuple, device: torch.device = CURRENT) -> tuple:
    """The tile of `kernel` for `key`: the tuned one of `device`, else `default`.

    A device that is no GPU, as that of meta tensors, has the choices of the current GPU. Raises ValueError,
    naming the file, if the file cannot be read or was made for something else.
    """
    if _hook:
        return _hook[-1](kernel, key, default)
    index = device.index if device.type == "cuda" else None
    found = tuned(index).get((kernel, key), default)
    if len(found) != len(default):
        got = f"got {list(found)} for {kernel}, want {len(default)} numbers"
        raise ValueError(f"tuning: {file(index)}: {got}")
    return found


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Let `hook` answer in place of `choice`: to record what is asked and to try candidates."""
    _hook.append(hook)
    try:
        yield
    finally:
        _hook.pop()


def file(index: int | None = None) -> Path | None:
    """Where the tuned choices of GPU `index`, or the current one, lie; None without a GPU or with PRFL_TUNING
    empty."""
    folder = os.environ.get("PRFL_TUNING", os.path.expanduser("~/.cache/prfl"))
    if not folder or triton is None or not torch.cuda.is_available():
        return None
    return Path(folder) / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()) + ".json")


@cache
def tuned(index: int | None = None) -> dict[tuple[str, Key], tuple]:
    """{(kernel, key): choice} of the file of GPU `index`, or the current one, empty where there is none."""
    path = file(index)
    if path is None:
        return {}
    if index is None:
        return tuned(torch.cuda.current_device())
    return read(path, index) if path.exists() else {}


def _identity(index: int | None = None) -> dict[str, str]:
    """What a measured choice holds for, beside its key."""
    return {
        "gpu": torch.cuda.get_device_name(index),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def read(path: Path, index: int | None = None) -> dict[tuple[str, Key], tuple]:
    """{(kernel, key): choice} of a file that `write` made on GPU `index` with these versions.

    Raises ValueError for any other file.
    """
    try:
        held = json.loads(path.read_text())
        made_for = {name: held[name] for name in _identity(index)}
        found = {(row["kernel"], tuple(row["key"])): tuple(row["choice"]) for row in held["choices"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"tuning: {path}: got no file of tuned choices ({error!r}), want it deleted or made by prfl tune"
        ) from None
    for name, want in _identity(index).items():
        if made_for[name] != want:
            raise ValueError(
                f"tuning: {path}: got {name} {made_for[name]!r}, want {want!r}: delete it and run prfl tune"
            )
    return found


def write(path: Path, choices: dict[tuple[str, Key], tuple]) -> None:
    """Store all choices of the current GPU; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"kernel": kernel, "key": key, "choice": made} for (kernel, key), made in choices.items()]
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(_identity() | {"choices": rows}, indent=1) + "\n")
    os.replace(part, path)
