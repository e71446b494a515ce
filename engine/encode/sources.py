"""What is to be encoded: rows of a video, an image and a prompt, from a folder, a file or a table.

    folder    every video and image below it; NAME.txt next to NAME.mp4 holds its prompt, NAME.png next to it
              is its first frame
    NAME.mp4  that video or image alone, with the files next to it in the same way
    .csv      a header with the columns of COLUMNS, and any others
    .jsonl    a JSON object a line, of the same names
    .json     a list of such objects, as HY-Video-PRFL's preprocessing takes it

Paths count from the working directory, or else from the folder of the table.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prfl_engine.data import CLIP_KEYS, CONDITION_KEYS, LATENT_KEYS, REWARD_TEXT_KEYS, label_of
from prfl_engine.errors import UserError, check, show
from prfl_engine.inputs import check_file, find_from, read_bytes, read_lines
from prfl_engine.media import IMAGES, VIDEOS

COLUMNS = {
    "video": ("video", "video_path"),
    "image": ("image", "image_path"),
    "prompt": ("prompt", "short_caption", "caption"),
    "long": ("long_prompt", "long_caption"),
}
"""What a row says, and the names that it may have; the first one that a row has counts."""
TABLES = (".csv", ".jsonl", ".json")
"""The ends of the names of tables."""
LABELS = ("label", "physics_quality", "human_quality", "text_alignment", "blur_quality")
"""Columns that must hold 0, 1, good, poor or nothing."""
_OURS = {*LATENT_KEYS, *CONDITION_KEYS, *CLIP_KEYS, *REWARD_TEXT_KEYS, "textlong_path"}


@dataclass(frozen=True)
class Row:
    """One sample to be."""

    where: str  # the place in the source, for messages
    video: Path | None
    image: Path | None
    prompt: str
    long: str | None
    fields: dict[str, Any]  # the other columns, labels among them


class Skipped(NamedTuple):
    """A row that is left out."""

    where: str
    reason: str


def read_rows(source: str | Path, prompt: str | None = None) -> tuple[list[Row], list[Skipped]]:
    """The rows of a source, and those that cannot be one (no prompt, no such file, a wrong label).

    prompt: of files without a NAME.txt, and of rows of a table without one. UserError for a source that
    cannot be read at all, or has neither videos nor images.
    """
    source = Path(source)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    found = _table(source, prompt)
    if source.is_dir():
        found = _files(source.rglob("*"), prompt)
    elif is_media(source):
        check_file(source, "a video or an image")
        found = _files([source, *_first_frames(source)], prompt)
    for where, values in found:
        try:
            rows.append(_row(where, values, source if source.is_dir() else source.parent, prompt))
        except UserError as error:
            skipped.append(Skipped(where, str(error)))
    if not rows and not skipped:
        raise UserError(f"{source}: got no videos or images, want {' '.join(VIDEOS + IMAGES)} or their table")
    return rows, skipped


def _row(where: str, values: Any, folder: Path, prompt: str | None) -> Row:
    if isinstance(values, UserError):
        raise values
    check(isinstance(values, dict), "row", values, "a JSON object")
    texts = {what: _text(values, names) for what, names in COLUMNS.items()}
    paths = {what: texts[what] and find_from(texts[what], folder) for what in ("video", "image")}
    for what, path in paths.items():
        if path is not None:
            check_file(path, f"the {what}")
    if not any(paths.values()):
        raise UserError("got no video and no image")
    if (own := texts["prompt"] or prompt) is None:
        raise UserError("no prompt")
    known = {name for names in COLUMNS.values() for name in names}
    fields = {k: v for k, v in values.items() if k not in known}
    if taken := sorted(_OURS & fields.keys()):
        raise UserError(f"{taken[0]}: is encoded already, want no such column")
    for name in LABELS:
        if isinstance(value := fields.get(name), str):
            fields[name] = {"0": 0, "1": 1, "": None}.get(value.strip(), value.strip())
        label_of(fields, name)
    return Row(where, paths["video"], paths["image"], own, texts["long"], fields)


def _text(values: dict, names: tuple[str, ...]) -> str | None:
    """The first of some columns that is filled."""
    for name in names:
        value = values.get(name)
        check(value is None or isinstance(value, str), name, value, "text")
        if value and value.strip():
            return value.strip()
    return None


def is_media(path: Path) -> bool:
    """Whether a path names a video or an image."""
    return path.suffix.lower() in VIDEOS + IMAGES


def _first_frames(video: Path) -> list[Path]:
    """The images next to a video that have its name; none of an image."""
    if video.suffix.lower() not in VIDEOS:
        return []
    return [p for p in video.parent.iterdir() if p.stem == video.stem and p.suffix.lower() in IMAGES]


def _files(paths: Iterable[Path], prompt: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of the videos and images among paths."""
    files = sorted(p for p in paths if is_media(p) and p.is_file())
    videos = {p.with_suffix("") for p in files if p.suffix.lower() in VIDEOS}
    images = {p.with_suffix(""): p for p in files if p.suffix.lower() in IMAGES}
    for path in files:
        stem, is_video = path.with_suffix(""), path.suffix.lower() in VIDEOS
        if not is_video and stem in videos:
            continue  # the first frame of that video
        sidecar = path.with_suffix(".txt")
        own = " ".join(read_lines(sidecar, "a prompt")) if sidecar.is_file() else prompt
        image = images.get(stem) if is_video else path
        if not (own or "").strip():
            yield str(path), UserError(f"no prompt, want one in {sidecar.name}")
            continue
        yield str(path), {
            "video": str(path.absolute()) if is_video else None,
            "image": image and str(image.absolute()),
            "prompt": own,
        }


def _table(source: Path, prompt: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a table and their places; a UserError in place of one that is no JSON. With a `prompt` of
    rows without one no column has to hold any."""
    want = f"a folder, or a table {' or '.join(TABLES)}"
    check_file(source, want)
    check(source.suffix.lower() in TABLES, str(source), source.suffix, want)
    if source.suffix.lower() == ".csv":
        yield from _csv(source, [("video", "image"), *([("prompt",)] if prompt is None else [])])
    else:
        yield from (_jsonl if source.suffix.lower() == ".jsonl" else _json)(source)


def _csv(source: Path, wanted: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """wanted: keys of COLUMNS, of each group of which a column must be there."""
    reader = csv.DictReader(f"{line}\n" for line in read_lines(source, "a CSV table"))
    names = [name.strip() for name in reader.fieldnames or ()]
    for needed in wanted:
        columns = [name for what in needed for name in COLUMNS[what]]
        check(bool(set(names) & set(columns)), f"{source}: columns", names, f"one of {', '.join(columns)}")
    reader.fieldnames = names
    try:
        for values in reader:
            where = f"{source}, line {reader.line_num}"
            if None in values or None in values.values():
                yield where, UserError(f"got another number of columns, want {len(names)}")
            else:
                yield where, {k: v for k, v in values.items() if v != ""}
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not CSV: {error}") from None


def _jsonl(source: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_lines(source, "a JSON object a line"), 1):
        if line.strip():
            yield f"{source}, line {number}", _parsed(line)


def _json(source: Path) -> Iterator[tuple[str, Any]]:
    values = _parsed(read_bytes(source, "a JSON list of rows"))
    if isinstance(values, UserError):
        raise UserError(f"{source}: {values}")
    check(isinstance(values, list), str(source), show(values), "a JSON list of rows")
    for number, row in enumerate(values, 1):
        yield f"{source}, row {number}", row


def _parsed(text: str | bytes) -> Any:
    """What JSON says; UserError, not raised, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return UserError(f"not JSON: {' '.join(str(error).split())}")
