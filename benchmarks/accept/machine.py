"""What the results of a run hold for."""

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from prfl_bench.timing import machine

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "kernels", "benchmarks", "csrc")


def device() -> str:
    """ "cuda" where torch finds a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def identity() -> dict[str, str]:
    """The machine, the versions and the sources, by which results of one folder belong together."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": device(),
        "name": machine(device()),
        "torch": torch.__version__,
        "triton": triton,
        "sources": sources(),
    }


@cache
def sources() -> str:
    """A digest of all source files."""
    found = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".cu", ".cpp", ".h", ".txt"):
                found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]
