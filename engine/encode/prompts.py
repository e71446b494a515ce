"""`prfl sample` from prompts in words, and its samples as videos."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from prfl_engine.build import pick_device
from prfl_engine.config import Config
from prfl_engine.config_method import scales
from prfl_engine.data import CLIP_KEYS, CONDITION_KEYS, LATENT_KEYS, TEXT_KEY
from prfl_engine.encode import encoders
from prfl_engine.encode.buckets import Size, parse_sizes
from prfl_engine.encode.encoders import STRIDE_T, ImageEncoder, TextEncoder, VideoVAE
from prfl_engine.encode.places import save
from prfl_engine.encode.text import clean, negative_prompt
from prfl_engine.encode.work import condition_of, floats
from prfl_engine.errors import UserError, check
from prfl_engine.files import sync
from prfl_engine.inputs import check_file, check_new
from prfl_engine.media.video import pixels, read_image, write_video
from prfl_engine.metrics import progress
from prfl_engine.model.experts import pair_at
from prfl_engine.model.sources import read_config
from prfl_engine.model.wan import WanConfig
from prfl_engine.sample import sample


@dataclass(frozen=True)
class Prompts:
    """What the command line says. Paths of encoders are as `encoders.find` takes them."""

    prompts: tuple[str, ...] = ()
    text_encoder: str | None = None
    negative: str | None = None
    size: str | None = None  # one height x width; None: 480x832
    frames: int | None = None  # None: 81
    image: str | None = None
    image_encoder: str | None = None
    vae: str | None = None

    def __post_init__(self):
        if self.text_encoder is None:
            for option, value in ("--prompt", self.prompts), ("--negative", self.negative):
                check(value in (None, ()), option, value, "--text-encoder DIR with it")
        if not self.prompts:
            for option in ("size", "frames", "image", "image_encoder"):
                _check_none(self, option, "--prompt TEXT with it")
        sizes = parse_sizes("480x832" if self.size is None else self.size)
        check(len(sizes) == 1, "--size", self.size, "one such as 480x832")
        good = self.length >= 1 and self.length % STRIDE_T == 1
        check(good, "--frames", self.frames, "1, 5, 9, ...: 4n + 1")
        if self.vae is not None:
            encoders.latents_of(self.vae)

    def pixels(self, token: int) -> Size:
        """Height and width of a sample, in whole tokens of so many pixels a side."""
        return parse_sizes("480x832" if self.size is None else self.size, token)[0]

    @property
    def length(self) -> int:
        """Frames of a sample."""
        return 81 if self.frames is None else self.frames

    def check_image(self, config: WanConfig) -> None:
        """UserError unless there is all that an I2V generator needs, or a TI2V one with an image, or nothing
        for it where the generator takes none."""
        ti2v = config.model_type == "ti2v"
        if config.image and not config.clip or ti2v:
            _check_none(self, "image_encoder", "none: the generator takes no CLIP features")
        if not (config.image or ti2v):
            for option in ("image", "image_encoder"):
                _check_none(self, option, "none: the generator is text-to-video")
        if config.image or self.image is not None:
            for option in ("image", *["image_encoder"] * config.clip, "vae"):
                name, there = option.replace("_", "-"), getattr(self, option) is not None
                check(there, f"--{name}", None, "one: the generator needs a first frame")
            if config.clip:
                encoders.find(encoders.IMAGE, self.image_encoder)
            check_file(self.image, "the first frame")
            check(not ti2v or self.length > 1, "--frames", self.length, "5 or more after a first frame")


def _check_none(given: Prompts, option: str, want: str) -> None:
    value = getattr(given, option)
    check(value is None, f"--{option.replace('_', '-')}", value, want)


@contextmanager
def prompted(config: Config, given: Prompts) -> Iterator[Config]:
    """The configuration with the prompts in words as data.val, and the negative prompt as data.negative_text,
    encoded into a temporary folder. UserError where the generator needs an image that is not given."""
    if given.text_encoder is None:
        yield config
        return
    if config.model.path is None:
        raise UserError("model.path: got null, want the folder of a generator")
    device, data, model = pick_device(config), config.data, _generator(config)
    if given.prompts:
        latents = encoders.latents_with(model.out_dim, "model.path: latent channels")
        given.pixels(latents.token)
        given.check_image(model)
        if model.model_type == "ti2v":
            fixed = given.image is not None
            check(fixed or not data.first_frame, "--image", None, "one: data.first_frame is true")
            data = replace(data, first_frame=fixed)
    guided = scales(config.sample.guidance) != (1, 1)
    check(guided or given.negative is None, "--negative", given.negative, "--guidance S with it")
    texts = dict(enumerate(given.prompts))
    if guided and (given.negative is not None or data.negative_text is None):
        texts["negative"] = negative_prompt(model.image) if given.negative is None else given.negative
    check(bool(texts), "--text-encoder", given.text_encoder, "--prompt TEXT or --negative TEXT with it")
    with tempfile.TemporaryDirectory(prefix="prfl-prompts-") as name:
        folder = Path(name)
        files = _texts(folder, given.text_encoder, texts, device, model.text_dim)
        if "negative" in files:
            data = replace(data, negative_text=files.pop("negative"))
        if files:
            frame = _frame(folder, given, model, latents, device)
            data = replace(data, val=(_listed(folder, given.prompts, files, frame),))
        yield replace(config, data=data)


def _generator(config: Config) -> WanConfig:
    """That of model.path, or of its high-noise expert."""
    m = config.model
    return read_config(m.path if m.boundary is None else pair_at(m.path, m.low)[0])


def _texts(
    folder: Path, path: str, texts: dict, device: torch.device, width: int
) -> dict[int | str, str]:
    """The files of embeddings, by the keys of `texts`; width: of the generator's texts."""
    encoder, files = TextEncoder(path, device), {}
    got = encoder.model.config.d_model
    check(width == got, "--text-encoder: width", got, f"{width}, the generator's")
    for key, text in texts.items():
        save(folder / f"text-{key}.npy", encoder([clean(text)])[0], torch.float32)
        files[key] = str(folder / f"text-{key}.npy")
    return files


def _frame(
    folder: Path, given: Prompts, model: WanConfig, latents: encoders.Latents, device: torch.device
) -> dict[str, str]:
    """The files that all prompts share, by their keys in meta JSONs: a latent that only says its size, and
    what an I2V generator is given of the first frame; a TI2V one finds that in the latent."""
    pixels = given.pixels(latents.token)
    t, (h, w) = 1 + (given.length - 1) // STRIDE_T, (n // latents.stride for n in pixels)
    arrays = {LATENT_KEYS[0]: torch.zeros(latents.channels, t, h, w)}
    if given.image is not None:
        first = floats(read_image(given.image, lambda *_: pixels))
        if model.clip:
            arrays[CLIP_KEYS[0]] = ImageEncoder(given.image_encoder, device)(first[:, :, 0])[0]
        vae = VideoVAE(given.vae, device)
        if model.image:
            arrays[CONDITION_KEYS[0]] = condition_of(vae, first, given.length)
        else:
            arrays[LATENT_KEYS[0]][:, :1] = vae.encode(first)[0].cpu()
    for key, array in arrays.items():
        save(folder / f"{key}.npy", array, torch.float32)
    return {key: str(folder / f"{key}.npy") for key in arrays}


def _listed(folder: Path, prompts: Sequence[str], texts: dict, frame: dict[str, str]) -> str:
    metas = []
    for i, prompt in enumerate(prompts):
        metas.append(folder / f"prompt-{i}.json")
        meta = {"short_caption": prompt, TEXT_KEY: texts[i], **frame}
        metas[-1].write_text(json.dumps(meta), encoding="utf-8")
    (folder / "all.list").write_text("".join(f"{meta}\n" for meta in metas), encoding="utf-8")
    return str(folder / "all.list")


def sample_prompts(
    config: Config, out: str, count: int, step: int | None, given: Prompts, finish: int = 1
) -> list[Path]:
    """`sample.sample` with what the command line says about prompts and videos; returns the files."""
    codec = config.sample.codec
    check(codec is None or given.vae is None, "sample.codec", codec, "null with --vae")
    check_new(out, "--out")
    if given.vae is not None and config.model.path is not None:
        made, want = encoders.latents_of(given.vae).channels, _generator(config).out_dim
        check(made == want, "--vae: latent channels", made, f"{want}, the generator's")
    with prompted(config, given) as config:
        files = sample(config, out, count, step, bool(given.prompts), finish)
    return files if given.vae is None else files + decode(files, given.vae, config)


def decode(files: Sequence[Path], vae: str, config: Config) -> list[Path]:
    """Decode the latents sample-NN.npy among `files` to sample-NN.mp4 beside them; returns the videos."""
    model, videos = VideoVAE(vae, pick_device(config)), []
    latents = [file for file in files if re.fullmatch(r"sample-\d+\.npy", file.name)]
    for file in progress(latents, "decoding"):
        latent = torch.from_numpy(np.load(file))
        videos.append(file.with_suffix(".mp4"))
        part = file.with_name(f".{videos[-1].name}.tmp")
        write_video(part, pixels(model.decode(latent)[0].cpu()), fps=config.sample.fps)
        sync(part)
        os.replace(part, videos[-1])
    return videos
