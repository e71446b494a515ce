"""`prfl encode`: a data set from videos, images and prompts.

Processes share nothing but the folder: process R of W has the rows R, R + W, ..., and the one that ends last
writes the list. So they may be started by torchrun, by an array of batch jobs, or one after another.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from prfl_engine.build import pick_device
from prfl_engine.config import load_config
from prfl_engine.encode import encoders, work
from prfl_engine.encode.buckets import Size, parse_sizes
from prfl_engine.encode.places import LIST, Places, Report
from prfl_engine.encode.sources import Row, Skipped, read_rows
from prfl_engine.encode.text import clean, negative_prompt
from prfl_engine.errors import TrainingError, check, one_line
from prfl_engine.inputs import make_folder

SKIPPED = 3
"""Exit code where rows were left out."""
SHOWN = 20
"""How many of them a summary names."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    models: str
    size: str = "480p"
    frames: int = 81
    min_frames: int | None = None  # None: frames
    fps: str = "16"
    i2v: bool = False
    no_clip: bool = False
    negative: str | None = None  # None: that of Wan2.1
    store: str = "float32"
    text_dtype: str = "bfloat16"
    text_batch: int = 8
    device: str = "auto"

    def __post_init__(self):
        for option, value in ("--frames", self.frames), ("--min-frames", self.fewest):
            check(value >= 1 and value % 4 == 1, option, value, "1, 5, 9, ...: 4n + 1")
        check(self.fewest <= self.frames, "--min-frames", self.fewest, f"at most {self.frames} = --frames")
        check(self.i2v or not self.no_clip, "--no-clip", True, "--i2v with it")
        check(self.text_batch >= 1, "--text-batch", self.text_batch, "a whole number from 1 on")
        try:
            good = 0 < Fraction(self.fps) <= 1000
        except (ValueError, ZeroDivisionError):
            good = False
        check(good, "--fps", self.fps, "a positive number such as 16 or 24000/1001")
        taken = "none with Wan2.2's VAE: TI2V takes the first frame of the latent (data.first_frame)"
        check(not self.i2v or self.latents == encoders.LATENTS[16], "--i2v", True, taken)
        parse_sizes(self.size, self.latents.token)

    @property
    def fewest(self) -> int:
        """The fewest frames that a video may have."""
        return self.frames if self.min_frames is None else self.min_frames

    @property
    def latents(self) -> encoders.Latents:
        """What the VAE makes."""
        return encoders.latents_of(self.models)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The buckets."""
        return parse_sizes(self.size, self.latents.token)

    @property
    def clip(self) -> bool:
        """Whether CLIP features are encoded."""
        return self.i2v and not self.no_clip

    @property
    def against(self) -> str:
        """The negative prompt."""
        return negative_prompt(self.i2v) if self.negative is None else self.negative

    def settings(self, source: str) -> dict[str, Any]:
        """All that arrays depend on, and the name of the source: a data set has one of each."""
        kinds = [encoders.VAE, encoders.TEXT] + [encoders.IMAGE] * self.clip
        found = {kind.what: encoders.digest(encoders.find(kind, self.models)) for kind in kinds}
        return found | {
            "tokenizer": encoders.digest(encoders.find_tokenizer(self.models)),
            "source": source,
            "sizes": [f"{h}x{w}" for h, w in self.sizes],
            "frames": self.frames,
            "min_frames": self.fewest,
            "fps": str(Fraction(self.fps)),
            "i2v": self.i2v,
            "clip": self.clip,
            "negative": self.against,
            "store": self.store,
            "text_dtype": self.text_dtype,
        }


class Summary(NamedTuple):
    """What a run says, and its exit code."""

    lines: list[str]
    code: int


def encode(source: str | Path, out: str | Path, options: Options) -> Summary:
    """Encode the rows of `source` into the data set `out`, which may hold a part of it already.

    Every process calls this with the same arguments. UserError for settings other than those of `out`;
    TrainingError where no row at all can be encoded.
    """
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    return encode_rows(*read_rows(source), Path(source).absolute().name, out, options, rank, world)


def encode_rows(
    rows: Sequence[Row],
    wrong: Sequence[Skipped],
    source: str,
    out: str | Path,
    options: Options,
    rank: int = 0,
    world: int = 1,
    option: str = "--out",
) -> Summary:
    """Encode process `rank`'s part of these rows of a source of that name; `wrong`: those of it that are
    none. option: which names `out`, for messages."""
    rows, repeated = _distinct(rows)
    prompts = {row.where: work.prompts_of(row) for row in rows}
    negative, settings = clean(options.against), options.settings(source)
    device = pick_device(load_config(None, [f"train.device={options.device}"]))
    places = Places(make_folder(out, option), option)
    places.check(settings)
    places.report(rank, world).unlink(missing_ok=True)
    share = work.Share(places, options, device)
    texts = {places.text(text): text for both in prompts.values() for text in both}
    texts |= {places.null: "", places.negative: negative}
    share.texts(dict(sorted(texts.items())[rank::world]))
    skipped = [*wrong, *repeated] if rank == 0 else []
    samples, unusable = share.videos(rows[rank::world])
    for sample in samples:
        work.write_meta(places, sample, prompts[sample.row.where], options)
    places.write_report(rank, world, Report(len(samples), (*skipped, *unusable)))
    return _summary(places, rows, rank, world)


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[Skipped]]:
    """The rows without those that say what an earlier one says, labels apart."""
    first: dict[tuple, Row] = {}
    repeated = []
    for row in rows:
        key = row.video, row.image, row.prompt, row.long
        if (other := first.setdefault(key, row)) is not row:
            repeated.append(Skipped(row.where, f"says what {other.where} says"))
    return list(first.values()), repeated


def _summary(places: Places, rows: Sequence[Row], rank: int, world: int) -> Summary:
    """Of the whole data set by the process that ends last, else of this one's rows.

    Under torchrun the exit code is 0, since another would end processes that still work.
    """
    reports = places.reports(world)
    own = [places.read_report(rank, world)] if reports is None else reports
    made, skipped = sum(r.made for r in own), [s for r in own for s in r.skipped]
    lines = [f"left out: {one_line(s.where)}: {one_line(s.reason)}" for s in skipped[:SHOWN]]
    if len(skipped) > SHOWN:
        lines.append(f"and {len(skipped) - SHOWN} more: {places.out / 'ranks'}")
    if reports is None:
        done = f"{made} samples, {len(skipped)} rows left out"
        lines.append(f"process {rank} of {world}: {done}; the one that ends last writes {LIST}")
    else:
        listed = places.write_list(rows, skipped)
        if skipped and not listed:
            reason = f"{skipped[0].where}: {skipped[0].reason}"
            raise TrainingError(f"no sample: all {len(skipped)} rows were left out; the first: {reason}")
        lines.append(f"{places.out / LIST}: {listed} samples, {len(skipped)} rows left out")
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return Summary(lines, SKIPPED if skipped and not torchrun else 0)
