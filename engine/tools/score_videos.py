"""Videos for `prfl score`: the latents and texts that `prfl encode` makes of them for a reward model."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prfl_engine.data import read_lists
from prfl_engine.encode.arguments import SCORE
from prfl_engine.encode.sources import TABLES, is_media, read_rows
from prfl_engine.errors import check
from prfl_engine.inputs import read_json
from prfl_engine.metrics import note
from prfl_engine.model.wan import WanConfig


class Encoded(NamedTuple):
    """Videos as samples."""

    files: dict[str, str]
    """The video, or the image, of each meta JSON."""
    code: int
    """The exit code of `prfl encode`: not 0 where some are left out."""


@dataclass(frozen=True)
class Videos:
    """What the command line says of videos; but for prompt and encoded as `prfl encode` takes it."""

    models: str | None = None  # None: there are no videos
    prompt: str | None = None  # of videos without a NAME.txt
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
        rows, wrong = ([one for of in found for one in of[i]] for i in (0, 1))
        with tempfile.TemporaryDirectory(prefix="prfl-score-") as temporary:
            out = Path(self.encoded or temporary).absolute()
            summary = encode_rows(rows, wrong, "prfl score", out, options)
            for line in summary.lines[:-1]:
                note(line)
            metas = [str(path) for path in read_lists([str(out / LIST)], "samples")]
            yield Encoded({m: read_json(Path(m), "a meta JSON")["source"] for m in metas}, summary.code)


def _of_videos(path: Path) -> bool:
    """Whether a path is a video or an image, a table of them, or a folder that has some and no latents."""
    if not path.is_dir():
        return is_media(path) or path.suffix.lower() in TABLES
    return not any(path.glob("*.npy")) and any(is_media(p) for p in path.rglob("*"))
