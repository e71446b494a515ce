"""What one process encodes. One encoder is in memory at a time: text, image features (I2V), then the VAE."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prfl_engine.build import DTYPES
from prfl_engine.encode import encoders
from prfl_engine.encode.buckets import Size, nearest, whole_frames
from prfl_engine.encode.encoders import ImageEncoder, TextEncoder, VideoVAE
from prfl_engine.encode.places import Places, Sample, save, write
from prfl_engine.encode.sources import Row, Skipped
from prfl_engine.encode.text import clean
from prfl_engine.errors import UserError, check
from prfl_engine.media.video import read_clip, read_image
from prfl_engine.metrics import note, progress

if TYPE_CHECKING:
    from prfl_engine.encode.command import Options

STORED = {"float32": torch.float32, "float16": torch.float16}
"""Dtypes of the arrays; .npy has no bfloat16."""


def prompts_of(row: Row) -> tuple[str, str]:
    """The clean short and long prompt of a row; the same text where it has one."""
    short = clean(row.prompt)
    return short, short if row.long is None else clean(row.long)


class Share:
    """The encoders at work on a part of the rows."""

    def __init__(self, places: Places, options: "Options", device: torch.device):
        self.places, self.options, self.device = places, options, device
        self.sizes, self.fps = options.sizes, Fraction(options.fps)
        self.dtype = STORED[options.store]

    def texts(self, wanted: dict[Path, str]) -> None:
        """Write the embeddings of clean prompts that are not there yet."""
        missing = sorted(((p, t) for p, t in wanted.items() if not p.exists()), key=lambda of: len(of[1]))
        if not missing:
            return
        encoder = TextEncoder(self.options.models, self.device, DTYPES[self.options.text_dtype])
        size, longest = self.options.text_batch, 0
        for i in _bar(range(0, len(missing), size), "texts"):
            batch = missing[i : i + size]
            for (path, _), text in zip(batch, encoder([text for _, text in batch]), strict=True):
                save(path, text, self.dtype)
                longest += len(text) == encoders.TEXT_LEN
        if longest:
            note(f"{longest} prompts have {encoders.TEXT_LEN} tokens; what came after them was cut off")

    def videos(self, rows: Sequence[Row]) -> tuple[list[Sample], list[Skipped]]:
        """Write the arrays of rows that are not there yet; (the samples, the rows that cannot be one)."""
        samples, skipped = [], []
        for row in rows:
            if self.options.i2v and row.video is None:
                skipped.append(Skipped(row.where, "an image alone, want a video with --i2v"))
                continue
            digests = (path and encoders.digest(path) for path in (row.video, row.image))
            samples.append(self.places.sample(row, *digests))
        if self.options.clip:
            samples = self._each(
                samples, skipped, "image features", ImageEncoder, lambda s: [s.clip], self._write_features
            )
        samples = self._each(
            samples, skipped, "latents", VideoVAE, lambda s: [s.latent] + [s.first] * self.options.i2v,
            self._write_latents,
        )  # fmt: skip
        return samples, skipped

    def _each(
        self,
        samples: Sequence[Sample],
        skipped: list[Skipped],
        what: str,
        kind: type,
        files: Callable[[Sample], list[Path]],
        make: Callable[[Sample, Any], None],
    ) -> list[Sample]:
        """The samples whose files are there in the end; an encoder is loaded for the first that has to be
        written."""
        encoder, done = None, []
        for sample in _bar(samples, what):
            if not all(file.exists() for file in files(sample)):
                encoder = encoder or kind(self.options.models, self.device)
                try:
                    make(sample, encoder)
                except UserError as error:  # of this row: the encoder is loaded
                    skipped.append(Skipped(sample.row.where, str(error)))
                    continue
            done.append(sample)
        return done

    def _write_features(self, sample: Sample, encoder: ImageEncoder) -> None:
        row = sample.row
        first = read_clip(row.video, self.fps, 1, self._size)
        save(sample.clip, encoder(floats(self._first(row, first))[:, :, 0])[0], self.dtype)

    def _write_latents(self, sample: Sample, vae: VideoVAE) -> None:
        frames = self._frames(sample.row)
        if self.options.i2v and not sample.first.exists():
            first = floats(self._first(sample.row, frames[:1]))
            save(sample.first, condition_of(vae, first, len(frames)), self.dtype)
        if not sample.latent.exists():
            save(sample.latent, vae.encode(floats(frames))[0], self.dtype)

    def _frames(self, row: Row) -> Tensor:
        """The 4n + 1 frames of a row, uint8 [F, H, W, 3]."""
        if row.video is None:
            return read_image(row.image, self._size)
        frames = read_clip(row.video, self.fps, self.options.frames, self._size)
        count, fewest = whole_frames(len(frames)), self.options.fewest
        check(count >= fewest, f"frames at {self.fps} a second", len(frames), f"{fewest} (--min-frames)")
        return frames[:count]

    def _first(self, row: Row, first: Tensor) -> Tensor:
        """The frame that I2V starts from, [1, H, W, 3]: the row's own image in the size of its video, or its
        first frame."""
        if row.image is None:
            return first
        return read_image(row.image, lambda *_: tuple(first.shape[1:3]))

    def _size(self, height: int, width: int) -> Size:
        return nearest(height, width, self.sizes)


def condition_of(vae: VideoVAE, first: Tensor, frames: int) -> Tensor:
    """What I2V is given of a first frame [1, 3, 1, H, W] in [0, 1]: the latent [16, T, h, w] of a video of so
    many frames, all others gray."""
    gray = torch.full_like(first, 0.5).expand(-1, -1, frames - 1, -1, -1)
    return vae.encode(torch.cat([first, gray], 2))[0]


def write_meta(
    places: Places, sample: Sample, prompts: tuple[str, str], options: "Options"
) -> None:
    """Write the meta JSON of a sample whose arrays are there, in the keys of HY-Video-PRFL."""
    path = places.meta(sample.row)
    keys = {"vae_latent_path": sample.latent}
    if options.i2v:
        keys["f1_black_path"] = sample.first
    if options.clip:
        keys["imgclip_path"] = sample.clip
    for key, text in zip(("textshort_path", "textlong_path"), prompts, strict=True):
        keys[key] = places.text(text)
    meta = {
        "source_id": sample.name,
        "short_caption": prompts[0],
        "long_caption": prompts[1],
        **sample.row.fields,
        **{key: f"../{file.relative_to(places.out)}" for key, file in keys.items()},
        "source": str((sample.row.video or sample.row.image).absolute()),
    }
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write(path, text)


def _bar(items: Sequence, what: str) -> Iterable:
    """A progress bar of the first process; the others have as much to do."""
    return progress(items, what) if os.environ.get("RANK", "0") == "0" else items


def floats(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, F, H, W] in [0, 1]."""
    return frames.permute(3, 0, 1, 2)[None].float() / 255
