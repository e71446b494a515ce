"""Reading files that users name. Every reader takes regular files only, so a folder, a pipe or a device is
never waited for, and raises UserError, one line that names the file, what it holds and what is wanted."""

import io
import json
import math
import mmap
import os
import pickle
import stat
import struct
import tempfile
import tokenize
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl_engine.bounds import check_path
from prfl_engine.errors import UserError, check, show
from prfl_engine.paths import KINDS, check_file, reason

MAX_HEADER = 2**16  # bytes of a .npy; numpy takes 10,000
MAX_TEXT = 2**28
"""Bytes of the longest text or JSON file that is read."""
# What the readers of numpy and torch raise at damaged files, by trial.
_DAMAGE = (
    OSError, ValueError, TypeError, EOFError, OverflowError, RuntimeError, MemoryError, LookupError,
    AttributeError, pickle.UnpicklingError, struct.error, tokenize.TokenError,
)  # fmt: skip
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def find_from(path: str, folder: Path) -> Path:
    """A path from the working directory, or, where nothing is there and `folder` has it, from that."""
    other = os.path.join(folder, path)
    return Path(other if not os.path.exists(path) and os.path.exists(other) else path)


def read_bytes(path: str | Path, want: str) -> bytes:
    """The content of a file of text."""
    try:
        with open(check_file(path, want), "rb") as file:
            data = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}, want {want}") from None
    if len(data) > MAX_TEXT:
        raise UserError(f"{path}: longer than {MAX_TEXT} bytes, want {want}")
    return data


def read_lines(path: str | Path, want: str) -> list[str]:
    """The lines of a file in UTF-8, with or without a byte order mark; LF or CRLF ends them."""
    data = read_bytes(path, want)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}, line 1: UTF-16, want {want} in UTF-8")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: not UTF-8: {error.reason}, want {want} in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: holds a NUL byte, want {want} in UTF-8")
    return lines


def read_json(path: str | Path, want: str) -> dict[str, Any]:
    """The object of a JSON file."""
    return parse_json(read_bytes(path, want), str(path), want)


def parse_json(data: bytes | str, source: str, want: str) -> dict[str, Any]:
    """The object that JSON from `source` holds."""
    try:
        values = json.loads(data)
    except RecursionError:
        raise UserError(f"{source}: JSON nested too deeply, want {want}") from None
    except ValueError as error:
        raise UserError(f"{source}: not JSON: {' '.join(str(error).split())}, want {want}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: got a JSON {type(values).__name__}, want {want}")
    return values


def read_array(path: str | Path, shape: Sequence[int | None], what: str) -> np.ndarray:
    """A memory-mapped .npy of floating-point numbers whose shape is `shape`, None for any length from 1 on.

    float16, float32 and float64 are taken, in either byte order.
    """
    check_file(path, f"the {what}")
    try:
        with open(path, "rb") as file:
            head = _npy_head(file)
            if head.startswith(b"PK\3\4"):
                raise UserError(f"{path}: a zip archive (.npz or .pt), want the {what} as .npy")
            form = _npy_format(head)
            if form.dtype.kind != "f" or form.dtype.itemsize > 8:
                saved = {"V2": " (bfloat16 as numpy saves it)", "u2": " (perhaps the bits of bfloat16)"}
                kind = f"{form.dtype}{saved.get(form.dtype.str[1:], '')}"
                raise UserError(f"{path}: {what} is {kind}, want float32")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.ndarray(form.shape, form.dtype, content, len(head), order=form.order)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path}: not a .npy array: {reason(error)}") from None
    if array.ndim != len(shape) or any(
        g != w if w is not None else g < 1 for g, w in zip(array.shape, shape, strict=True)
    ):
        want = ", ".join("*" if n is None else str(n) for n in shape)
        raise UserError(f"{path}: {what} is {list(array.shape)}, want [{want}], none of them 0")
    return array


def _npy_head(file: BinaryIO) -> bytes:
    """The first bytes of a .npy, as far as its header goes; of another file some of the first."""
    start = file.read(12)
    counted = 8 + (2 if start[6:7] == b"\1" else 4)  # bytes, of which the last say how many more follow
    length = min(int.from_bytes(start[8:counted], "little"), MAX_HEADER)
    return start + file.read(max(0, counted + length - len(start)))


class _NpyFormat(NamedTuple):
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype


@lru_cache(1024)  # numpy compiles a header as Python, which takes longer than to read a small file
def _npy_format(head: bytes) -> _NpyFormat:
    """What the header of a .npy says."""
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"version {version} of the format")
    shape, by_columns, dtype = _NPY_HEADERS[version](file)
    return _NpyFormat(shape, "F" if by_columns else "C", dtype)


def open_tensors(path: str | Path, want: str = "a safetensors file") -> safe_open:
    """An open safetensors file."""
    try:
        return safe_open(check_file(path, want), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file: {reason(error)}, want {want}") from None


def check_float(dtype: str, path: str | Path, key: str) -> None:
    """UserError unless a dtype, as safetensors names it, is one of floating-point numbers."""
    if dtype not in _FLOATS:
        raise UserError(f"{path}: {key} is {dtype}, want floating-point numbers")


def check_finite(tensor: Tensor, path: str | Path, key: str) -> None:
    """UserError where a tensor holds NaN or infinity. One pass over it, without a copy."""
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    if wide.numel() and not all(map(math.isfinite, torch.aminmax(wide.detach()))):
        raise UserError(f"{path}: {key} holds NaN or infinity, want finite numbers")


def read_tensors(path: str | Path, want: str = "a safetensors file") -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory; floating-point and finite."""
    found = {}
    with open_tensors(path, want) as file:
        for key in file.keys():  # noqa: SIM118
            check_float(file.get_slice(key).get_dtype(), path, key)
            found[key] = file.get_tensor(key).clone()
            check_finite(found[key], path, key)
    return found


def load_pickle(path: str | Path, device: torch.device | str = "cpu", mmap: bool = False) -> dict:
    """A dict saved by torch.save, read without executing code; one nested under 'state_dict' is unpacked.

    mmap leaves tensors in the file until they are read, for whoever copies them at once.
    """
    check_file(path, "a saved state dict")
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start not in (b"PK", b"\x80\x02"):  # the formats of torch.save, since 1.6 and before
            what = "an empty file" if not start else "not a file of torch.save"
            raise UserError(f"{path}: not a safe state dict: {what}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages that are no longer in use
            state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path}: not a safe state dict: {reason(error)}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{path}: got a {type(state).__name__}, want a state dict")
    return state


def read_state(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A state dict of floating-point, finite tensors that are wholly in the file, saved by torch.save."""
    state = open_state(path, device, mmap=False)
    for key, value in state.items():
        check_finite(value, path, show(key))
    return state


def open_state(
    path: str | Path, device: torch.device | str = "cpu", mmap: bool = True
) -> dict[str, Tensor]:
    """read_state, its values not yet checked, and with mmap left in the file until they are read."""
    state = load_pickle(path, device, mmap)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {show(key)} is a {type(value).__name__}, want a tensor")
        plain = value.layout == torch.strided and value.device.type != "meta" and not value.is_quantized
        if not plain or not value.is_floating_point():
            raise UserError(f"{path}: {show(key)} is {value.dtype} {value.layout}, want dense float32")
        if value.numel() == 0 or value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {show(key)} is {list(value.shape)}, want all its numbers in the file")
    return state


def check_new(path: str | Path, name: str) -> Path:
    """The path, if nothing is there yet and it can be made."""
    check_path(str(path), name)
    if os.path.lexists(path):
        raise UserError(f"{name}: {path} exists, want a new name")
    check(Path(path).name != "..", name, str(path), "a new name")  # whose folder is not there yet
    return check_out(path, name)


def check_new_file(path: str | Path, name: str) -> Path:
    """check_new of a file, whose folder is there."""
    path = check_new(path, name)
    if not path.parent.is_dir():
        raise UserError(f"{name}: {path.parent} is no folder")
    return path


def check_out(path: str | Path, name: str) -> Path:
    """The path of a folder, if it is there or can be made, and can be written to."""
    check_path(str(path), name)
    path = Path(path)
    check(len(os.fsencode(path.name)) < 250, name, path.name, "a shorter name")  # .NAME.tmp comes first
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    try:
        mode = os.stat(there).st_mode
    except OSError as error:
        raise UserError(f"{name}: {path}: {reason(error)}, want a folder") from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{name}: {there} is {KINDS.get(stat.S_IFMT(mode), 'a file')}, want a folder")
    # Only an attempt tells: root may do all to /proc, and a read-only disk or a quota says so here at last.
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".prfl-", dir=there))
    except OSError as error:
        why = error.strerror if os.access(there, os.W_OK | os.X_OK) else "no permission to write"
        raise UserError(f"{name}: {there} cannot be written to: {why}, want a folder that can") from None
    return path


def make_folder(path: str | Path, name: str) -> Path:
    """The path of a folder, made if it is not there."""
    path = check_out(path, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}: {path}: {reason(error)}, want a folder that can be made") from None
    return path
