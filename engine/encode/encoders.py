"""Wan's three encoders, loaded from a folder on this machine: nothing is fetched, no code in a file is run.

                  diffusers          native                                         computes in
    VAE           vae/               Wan2.1_VAE.pth, or Wan2.2_VAE.pth of TI2V-5B   float32
    UMT5          text_encoder/      models_t5_umt5-xxl-enc-bf16.pth                bfloat16, or float32
                  tokenizer/         google/umt5-xxl/
    CLIP          image_encoder/     models_clip_open-clip-xlm-roberta-...14.pth    float32

A path names the folder of all of them, the subfolder of one, or a file in the native layout, which may have
been converted to safetensors. A14B has the VAE of Wan2.1, TI2V-5B one of its own.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from prfl_engine.encode import native
from prfl_engine.errors import UserError, check
from prfl_engine.inputs import read_json
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS

STRIDE_T = 4
"""Frames of a video, after the first one, in one frame of latents of Wan2.1's VAE."""
TEXT_LEN = 512
"""Tokens of the longest prompt; more are cut off, as the official code does."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ENDS = 2**16
"""Bytes at both ends of a file that `digest` reads."""


class Kind(NamedTuple):
    """One of the encoders: where it lies, and what its config.json says."""

    what: str
    folder: str
    native: tuple[str, ...]
    says: tuple[str, str]


VAE = Kind("VAE", "vae", ("Wan2.1_VAE", "Wan2.2_VAE"), ("_class_name", "AutoencoderKLWan"))
TEXT = Kind("text encoder", "text_encoder", ("models_t5_umt5-xxl-enc-bf16",), ("model_type", "umt5"))
IMAGE = Kind(
    "image encoder", "image_encoder", ("models_clip_open-clip-xlm-roberta-large-vit-huge-14",),
    ("model_type", "clip_vision_model"),
)  # fmt: skip


class Latents(NamedTuple):
    """What a VAE makes of a video [B, 3, 1+4k, H, W]: [B, channels, 1+k, H/stride, W/stride]."""

    channels: int
    stride: int

    @property
    def token(self) -> int:
        """Pixels a side of a token, a patch of 2 x 2."""
        return 2 * self.stride


LATENTS = {16: Latents(16, 8), 48: Latents(48, 16)}
"""Those of Wan2.1's VAE, and of Wan2.2's, by their channels."""


def latents_with(channels: object, what: str) -> Latents:
    """Those of so many channels. UserError, which calls the number `what`, where no VAE of Wan has them."""
    known = isinstance(channels, int) and channels in LATENTS
    check(known, what, channels, "16 of Wan2.1's VAE, or 48 of Wan2.2's")
    return LATENTS[channels]


def latents_of(path: str | Path) -> Latents:
    """What the VAE at a path makes; its weights are not read. UserError where there is none of Wan."""
    at = find(VAE, path)
    if at.is_dir():
        channels = read_json(at / "config.json", "an encoder's configuration").get("z_dim")
    else:
        channels = native.latent_channels(at)
    return latents_with(channels, f"{at}: z_dim")


def find(kind: Kind, path: str | Path) -> Path:
    """The folder of diffusers' layout or the native file of an encoder. UserError where there is neither."""
    check_libraries()
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / kind.folder, path):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json", "an encoder's configuration")
            if config.get(kind.says[0]) == kind.says[1]:
                return folder
    for end in (".pth", ".safetensors"):
        files = [path / f"{name}{end}" for name in kind.native if (path / f"{name}{end}").is_file()]
        if files:
            check(len(files) == 1, str(path), [file.name for file in files], "the path of one of them")
            return files[0]
    names = " or ".join(f"{name}.pth" for name in kind.native)
    raise UserError(f"{path}: has no {kind.what}, want {kind.folder}/ of diffusers or {names}")


def check_libraries() -> None:
    """UserError unless diffusers and transformers are installed."""
    for name in ("diffusers", "transformers"):
        if find_spec(name) is None:
            raise UserError(f"{name}: not installed, want it for Wan's encoders: pip install {name}")


def find_tokenizer(path: str | Path) -> Path:
    """The folder of the tokenizer that belongs to the text encoder at a path."""
    at = find(TEXT, path)
    places = (at.parent / "tokenizer", at.parent / "google/umt5-xxl", at)
    for folder in places:
        if (folder / "tokenizer.json").is_file() or (folder / "spiece.model").is_file():
            return folder
    raise UserError(f"{path}: has no tokenizer, want {places[0]} or {places[1]}")


def digest(path: Path) -> str:
    """16 digits of what a file or a folder of weights holds: names, sizes, and both ends of each file."""
    names = ("*.safetensors", "*.json", "*.model")
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for name in names for p in path.glob(name)):
        size = file.stat().st_size
        found.update(f"{file.name if path.is_dir() else ''} {size} ".encode())
        with open(file, "rb") as data:
            found.update(data.read(ENDS))
            data.seek(max(0, size - ENDS))
            found.update(data.read(ENDS))
    return found.hexdigest()[:16]


class VideoVAE:
    """The VAE of Wan2.1 or of Wan2.2. Latents are normalised by its mean and standard deviation, as Wan's
    training has them. It works on one latent frame, four frames, at a time, however long a video is."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        import diffusers
        from diffusers import AutoencoderKLWan

        at = find(VAE, path)
        if at.is_dir():
            with _loading(at):
                model, report = AutoencoderKLWan.from_pretrained(
                    at, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True,
                    output_loading_info=True,
                )  # fmt: skip
            _check_whole(report, at)
        else:
            arguments, state = native.vae(native.read(at), at)
            new = "is_residual" in arguments and "is_residual" not in signature(AutoencoderKLWan).parameters
            check(not new, "diffusers", diffusers.__version__, "0.35 or later for Wan2.2's VAE")
            with torch.device("meta"):
                model = AutoencoderKLWan(**arguments)
            _assign(model, {name: value.float() for name, value in state.items()}, at)
        c, self.latents = model.config, latents_with(model.config.z_dim, f"{at}: z_dim")
        stride = 2 ** (len(c.dim_mult) - 1) * (getattr(c, "patch_size", None) or 1)
        want = f"{self.latents.stride} with {c.z_dim} channels"
        check(stride == self.latents.stride, f"{at}: pixels a side of a latent", stride, want)
        self.model = model.to(device).eval().requires_grad_(False)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(model.config.latents_mean, device=device).view(shape)
        self.std = torch.tensor(model.config.latents_std, device=device).view(shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 1+4k, H, W] in [0, 1] -> [B, C, 1+k, H/s, W/s], C and s of `latents`, float32: the mean of
        the posterior."""
        video = video.to(self.mean.device, torch.float32) * 2 - 1
        return (self.model.encode(video).latent_dist.mode() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """[B, C, 1+k, h, w] -> [B, 3, 1+4k, s h, s w] in [0, 1], C and s of `latents`, float32."""
        latent = latent.to(self.mean.device, torch.float32) * self.std + self.mean
        return self.model.decode(latent).sample.clamp(-1, 1) / 2 + 0.5


class TextEncoder:
    """UMT5's encoder and its tokenizer."""

    def __init__(
        self, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ):
        from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

        at = find(TEXT, path)
        model = _transformer(UMT5EncoderModel, UMT5Config, at, native.text_encoder, dtype)
        shared, own = model.shared.weight, model.encoder.embed_tokens.weight
        if shared is not own and not torch.equal(shared, own):  # transformers 5.0 and 5.1 left it at zero
            raise UserError(f"{at}: transformers did not load its embeddings, want another version of it")
        tokenizer = find_tokenizer(path)
        with _loading(tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        known = model.config.vocab_size
        check(len(self.tokenizer) <= known, f"{tokenizer}: tokens", len(self.tokenizer), f"at most {known}")
        self.model, self.device = model.to(device).eval().requires_grad_(False), device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Clean prompts -> embeddings [n, text_dim] without padding, n at most TEXT_LEN, on the CPU."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TEXT_LEN, return_attention_mask=True,
            return_tensors="pt",
        )  # fmt: skip
        mask = tokens.attention_mask
        found = self.model(tokens.input_ids.to(self.device), mask.to(self.device)).last_hidden_state.cpu()
        return [text[rows.bool()] for text, rows in zip(found, mask, strict=True)]


class ImageEncoder:
    """CLIP's image encoder without its last block, as Wan's I2V takes it."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        at = find(IMAGE, path)
        model = _transformer(CLIPVisionModel, CLIPVisionConfig, at, native.image_encoder, torch.float32)
        c = model.config
        got = 1 + (c.image_size // c.patch_size) ** 2, c.hidden_size
        check(got == (IMAGE_TOKENS, IMAGE_DIM), f"{at}: features", got, f"{IMAGE_TOKENS, IMAGE_DIM}")
        self.model, self.device = model.to(device).eval().requires_grad_(False), device

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> features [B, 257, 1280], float32.

        The whole image is squeezed into a square by bicubic interpolation without antialiasing, as the
        official code does; diffusers' processor crops it.
        """
        side = self.model.config.image_size
        image = F.interpolate(image.to(self.device, torch.float32), (side, side), mode="bicubic")
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return self.model((image - mean) / std, output_hidden_states=True).hidden_states[-2]


def _transformer(kind: type, config: type, at: Path, table: Callable, dtype: torch.dtype) -> nn.Module:
    """A model of transformers from a folder of its own layout, or through a table from a native file."""
    if at.is_dir():
        where, more = at, {"local_files_only": True, "use_safetensors": True}
    else:
        arguments, state = table(native.read(at), at)
        where, more = None, {"config": config(**arguments), "state_dict": state}
    with _loading(at):
        model, report = kind.from_pretrained(where, dtype=dtype, output_loading_info=True, **more)
    _check_whole(report, at)
    return model


def _assign(model: nn.Module, state: dict[str, Tensor], at: Path) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(own.keys() | state.keys()):
        got = tuple(state[name].shape) if name in state else "nothing"
        check(own.get(name) == got, f"{at}: {name}", got, f"{own.get(name, 'no such tensor')}")
    model.load_state_dict(state, assign=True)


def _check_whole(report: dict, at: Path) -> None:
    """UserError for weights that the library would have left at random values, or ignored."""
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape of")):
        if report[kind]:
            raise UserError(f"{at}: {what} {sorted(map(str, report[kind]))[0]}, want whole weights")


@contextmanager
def _loading(at: Path) -> Iterator[None]:
    """Turns what the libraries raise at files into UserError, and keeps their reports and bars quiet."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [log.get_verbosity() for log in logs]
    bars = transformers_log.is_progress_bar_enabled()
    try:
        for log in logs:
            log.set_verbosity(50)
        transformers_log.disable_progress_bar()
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{at}: cannot be read: {' '.join(str(error).split())[:300]}") from None
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
        if bars:
            transformers_log.enable_progress_bar()
