"""The files of an encoded data set, and the settings that it was made with.

    encode.json              the settings; a run with others is refused
    all.list                 the samples, in the order of the source
    null.npy negative.npy    embeddings of the empty and of the negative prompt
    meta/NAME.json           one sample
    latents/NAME-DIGEST.npy  and, for I2V, .first.npy and .clip.npy; DIGEST is of the video
    text/DIGEST.npy          by the prompt, so that equal prompts are encoded once
    ranks/R-of-W.json        what process R of W has made and left out

Every file is written whole or not at all, so what is there is done. Names follow from what a file is made of:
a changed prompt or label costs no video.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prfl_engine.encode.sources import Row, Skipped
from prfl_engine.errors import UserError, check, show
from prfl_engine.files import write_whole
from prfl_engine.inputs import read_json

MANIFEST, LIST = "encode.json", "all.list"


@dataclass(frozen=True)
class Sample:
    """The files of one row, once its video has been looked at."""

    name: str
    row: Row
    latent: Path
    first: Path
    clip: Path


@dataclass(frozen=True)
class Report:
    """What one process has done."""

    made: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Places:
    """The folder of a data set."""

    out: Path
    option: str = "--out"  # which names it

    def text(self, prompt: str) -> Path:
        """The embedding of a clean prompt."""
        return self.out / "text" / f"{_digest(prompt)}.npy"

    @property
    def null(self) -> Path:
        """The embedding of the empty prompt."""
        return self.out / "null.npy"

    @property
    def negative(self) -> Path:
        """The embedding of the negative prompt."""
        return self.out / "negative.npy"

    def meta(self, row: Row) -> Path:
        """The meta JSON of a row; equal rows have the same."""
        return self.out / "meta" / f"{name_of(row)}.json"

    def sample(self, row: Row, video: str | None, image: str | None) -> Sample:
        """The files of a row whose video and image have these digests, None where it has none."""
        latent = self.out / "latents" / f"{_safe(row.video or row.image)}-{video or image}"
        first = f"{latent}-{image}" if video and image else str(latent)
        paths = (Path(f"{latent}.npy"), Path(f"{first}.first.npy"), Path(f"{first}.clip.npy"))
        return Sample(name_of(row), row, *paths)

    def report(self, rank: int, world: int) -> Path:
        """The report of one process."""
        return self.out / "ranks" / f"{rank}-of-{world}.json"

    def check(self, settings: dict[str, Any]) -> None:
        """Write the settings of a new data set. UserError where the folder is that of another, or of none."""
        path = self.out / MANIFEST
        if not path.exists():
            there = [p.name for p in self.out.iterdir() if not p.name.startswith(".")]
            new = not there or MANIFEST in there
            check(new, f"{self.option}: {self.out}", there, "a new or empty folder")
            write(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        for folder in ("meta", "latents", "text", "ranks"):
            (self.out / folder).mkdir(exist_ok=True)
        found = read_json(path, "the settings of a data set")
        for name in sorted(found.keys() | settings.keys()):
            if found.get(name) != settings.get(name):
                made = f"{self.option}: {self.out} was made with {name} {show(found.get(name))}"
                raise UserError(f"{made}, got {show(settings.get(name))}, want it or another folder")

    def write_report(self, rank: int, world: int, report: Report) -> None:
        """Say what a process has done, once it is done."""
        write(self.report(rank, world), json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")

    def read_report(self, rank: int, world: int) -> Report:
        """What `write_report` has written."""
        of = read_json(self.report(rank, world), "the report of a process")
        return Report(of["made"], tuple(Skipped(*s) for s in of["skipped"]))

    def reports(self, world: int) -> list[Report] | None:
        """Those of all processes; None as long as one is missing."""
        if not all(self.report(rank, world).exists() for rank in range(world)):
            return None
        return [self.read_report(rank, world) for rank in range(world)]

    def write_list(self, rows: Sequence[Row], skipped: Sequence[Skipped]) -> int:
        """List the samples of `rows` without those that are left out; returns how many."""
        out = {s.where for s in skipped}
        metas = [self.meta(row) for row in rows if row.where not in out]
        metas = [path for path in metas if path.exists()]
        write(self.out / LIST, "".join(f"{path.relative_to(self.out)}\n" for path in metas))
        return len(metas)


def save(path: Path, array: Tensor, dtype: torch.dtype) -> None:
    """Write [...] as .npy [1, ...]. UserError where a number is not finite, in that dtype."""
    array = array[None].to(dtype)
    check(bool(array.isfinite().all()), path.name, "NaN or infinity", f"finite numbers in {dtype}")
    data = io.BytesIO()
    np.save(data, array.cpu().numpy())
    write(path, data.getvalue())


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole, while another process may write the same one."""
    write_whole(path, content, os.environ.get("RANK", "0"))


def name_of(row: Row) -> str:
    """The name of a sample: that of its file, and a digest of what the row says but for labels."""
    said = [str(row.video), str(row.image), row.prompt, row.long]
    return f"{_safe(row.video or row.image)}-{_digest(json.dumps(said))}"


def _safe(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem)[:80]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
