"""Videos for `prfl score`: the latents and texts that `prfl encode` makes of them for a reward model."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prfl_engine.data import read_lists
from prfl_engine.encode.arguments import SCORE
from prfl_engine.encode.sources import TABLES, Row, Skipped, is_media, read_rows
from prfl_engine.errors import UserError, check
from prfl_engine.inputs import read_json
from prfl_engine.metrics import note
from prfl_engine.model.wan import WanConfig
from prfl_engine.sample import LIST as SAMPLES


class Encoded(NamedTuple):
    """Videos as samples."""

    files: dict[str, str]
    """The name of each meta JSON in the ranking: its video or image; its own where several are of one video
    and what is encoded is kept."""
    code: int
    """The exit code of `prfl encode`: not 0 where some are left out."""


@dataclass(frozen=True)
class Videos:
    """What the command line says of videos; but for prompt and encoded as `prfl encode` takes it."""

    models: str | None = None  # None: there are no videos
    prompt: str | None = None  # of videos without a NAME.txt, and of rows of a table without one
    encoded: str | None = None  # folder of what is encoded; None: a temporary one
    size: str = "480p"
    frames: int = 81
    min_frames: int | None = None
    fps: str = "16"

    def __post_init__(self):
        for name in SCORE if self.models is None else ():
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            check(value == getattr(Videos, name), option, value, "--models DIR with it")

    def divided(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """(paths of latents, those of videos) of the samples on a command line."""
        videos = [name for name in names if self.models is not None and _of_videos(Path(name))]
        check(self.models is None or bool(videos), "--models", self.models, "videos to score, or none")
        return [name for name in names if name not in videos], videos

    @contextmanager
    def samples(self, names: Sequence[str], model: WanConfig, device: str) -> Iterator[Encoded]:
        """The videos of files, folders and tables, encoded for a reward model on `model` as long as the block
        runs. UserError for what cannot be read at all; a line for each video that is left out."""
        if not names:
            yield Encoded({}, 0)
            return
        from prfl_engine.encode import encoders  # they import diffusers and transformers
        from prfl_engine.encode.command import Options, encode_rows
        from prfl_engine.encode.places import LIST

        options = Options(
            self.models, self.size, self.frames, self.min_frames, self.fps, i2v=model.image,
            no_clip=model.image and not model.clip, negative="", device=device,
        )  # fmt: skip
        made, want = encoders.latents_of(self.models).channels, model.out_dim
        check(made == want, "--models: latent channels", made, f"{want}, the reward model's")
        found = [read_rows(name, self.prompt) for name in names]
        rows, wrong = (_once(one for of in found for one in of[i]) for i in (0, 1))
        with tempfile.TemporaryDirectory(prefix="prfl-score-") as temporary:
            out = Path(self.encoded or temporary).absolute()
            summary = encode_rows(rows, wrong, "prfl score", out, options, option="--encoded")
            for line in summary.lines[:-1]:
                note(line)
            metas = [str(path) for path in read_lists([str(out / LIST)], "samples")]
            files = {m: read_json(Path(m), "a meta JSON")["source"] for m in metas}
            if self.encoded is not None:
                often = Counter(files.values())
                files = {m: file if often[file] == 1 else m for m, file in files.items()}
            yield Encoded(files, summary.code)


def _once(found: Iterable[Row | Skipped]) -> list[Row | Skipped]:
    """Those of several sources without those of a place that an earlier one has named."""
    first: dict[str, Row | Skipped] = {}
    for one in found:
        first.setdefault(os.path.abspath(one.where), one)
    return list(first.values())


def _of_videos(path: Path) -> bool:
    """Whether a path is a video or an image, a table of them, or a folder that has some. UserError for one
    that has latents, too, and no list of samples."""
    if not path.is_dir():
        return is_media(path) or path.suffix.lower() in TABLES
    if (path / SAMPLES).exists():
        return False
    latent = min(path.glob("*.npy"), default=None)
    media = min((p for p in path.rglob("*") if is_media(p)), default=None)
    if latent is not None and media is not None:
        both = f"{latent.name} and {media.relative_to(path)}"
        raise UserError(f"{path}: got {both}, want latents or videos, each in a folder of their own")
    return media is not None
