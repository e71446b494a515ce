"""Data in the official format: .list files of meta JSON paths, fp32 .npy arrays.

`Reader` reads single samples; micro_batches.py makes the sequence of training batches of them.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from prfl_engine.batch import Batch, collate, to_device
from prfl_engine.bounds import PathText
from prfl_engine.errors import UserError, check, named
from prfl_engine.flow import rounded
from prfl_engine.inputs import check_file, check_finite, find_from, read_array, read_json, read_lines
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.wan import WanConfig

LATENT_KEYS = ("video_vae_latent_path", "vae_latent_path", "latents_path")
CONDITION_KEYS = ("f1_black_path", "latents_condition_path")
CLIP_KEYS = ("image_embeds", "imgclip_path")
TEXT_KEY = "text_en_path"
REWARD_TEXT_KEYS = ("save_textshort_path", "textshort_path", TEXT_KEY)
MASK_CHANNELS, CONDITION_CHANNELS = 4, 16
T = TypeVar("T", bound=Sequence)


def read_lists(paths: Sequence[str], field: str) -> list[Path]:
    """The meta JSON paths of some .list files; a relative path counts from the working directory,
    or else from the .list file's folder. UserError where one of them is not there, or is no file."""
    if not paths:
        raise UserError(f"{field}: got no file, want at least one .list of meta JSON paths")
    found = []
    for name in paths:
        with named(field):
            lines = read_lines(name, "a .list of meta JSON paths")
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line:
                continue
            with named(f"{field}: {name}, line {number}"):
                check(not line.startswith(("{", "[")), "JSON", line, "the path of a meta JSON")
                found.append(check_file(find_from(line, Path(name).parent), "a meta JSON"))
    if not found:
        raise UserError(f"{field}: {', '.join(paths)}: empty, want meta JSON paths")
    return found


def read_meta(path: Path) -> dict:
    """The JSON object of one sample."""
    return read_json(path, "a meta JSON")


def label_of(meta: dict, name: str) -> float:
    """0 or 1. Missing and null are 0, "good" and "poor" are 1 and 0; motion_quality is
    physics_quality and human_quality."""
    if name == "motion_quality":
        return label_of(meta, "physics_quality") * label_of(meta, "human_quality")
    value = meta.get(name)
    known = {None: 0.0, "poor": 0.0, "good": 1.0, 0: 0.0, 1: 1.0}
    ok = not isinstance(value, list | dict) and value in known
    check(ok, name, value, "0, 1, good, poor or null")
    return known[value]


def check_frames(shape: Sequence[int], name: str) -> None:
    """UserError where data.first_frame would leave nothing of a latent [C, T, h, w]."""
    check(shape[1] > 1, name, list(shape), "2 frames or more (data.first_frame keeps the first)")


class Kept:
    """What has been read of some samples, up to so many bytes. What comes later is not kept: of a list that
    is read again and again as many samples as fit are read once."""

    ENTRY = 2000
    """Bytes that an entry is counted with in addition to its tensors: its paths, and the object of a JSON."""

    def __init__(self, size: float = 0.0):
        self._left, self._found = size, {}

    def of(self, key: Hashable, read: Callable[[], T]) -> T:
        """What is kept by this key, or else what read() returns. Nobody may write into its tensors."""
        if key in self._found:
            return self._found[key]
        value = read()
        size = self.ENTRY + sum(a.nbytes for a in value if isinstance(a, Tensor))
        if size <= self._left:
            self._left -= size
            self._found[key] = value
        return value


@dataclass(frozen=True)
class Reader:
    """Reads single samples for one model, as a Batch without the batch dimension."""

    config: WanConfig
    label: str | None = None  # name of the label; None for the generator's data
    null_text: str | None = None
    text_dropout: float = 0.0
    long_caption: float = 0.0
    dtype: torch.dtype | None = None
    """What the values of a sample are rounded to; they are held in float32."""
    first_frame: bool = False  # of every latent is the condition of a ti2v model
    kept: Kept = field(default_factory=Kept)
    null: Tensor | None = field(init=False, default=None)
    """The embedding of null_text, read when the reader is made, where a text may be dropped."""

    def __post_init__(self):
        kind = self.config.model_type
        if self.first_frame and kind != "ti2v":
            raise UserError(f"data.first_frame: got true for a model of type {kind}, want ti2v")
        if self.null_text is not None and self.text_dropout > 0:
            with named("data.null_text"):
                null = rounded(read_text(self.null_text, self.config), self.dtype)
            object.__setattr__(self, "null", null)

    @property
    def draws(self) -> bool:
        """Whether the caption of a sample is left to chance."""
        return self.text_dropout > 0 or self.long_caption > 0

    def read(self, path: Path, rng: np.random.Generator | None) -> Batch:
        """The sample of a meta JSON: latent [C, T, h, w], text [n, text_dim], for an I2V model the condition
        and, with a CLIP branch, clip, and with first_frame that of the latent as condition [C, 1, h, w],
        float32 on the CPU; label 0-dim. rng draws the dropped and the long caption, where the reader `draws`.
        The tensors may be kept: nobody may write into them. UserError where a file or key is missing or holds
        something else."""
        meta, latent, clip, condition, label = self.kept.of(path, lambda: self._read(path))
        drop = long = False
        if self.draws:  # both numbers, so that one option never moves the other's choices
            drop, long = rng.random() < self.text_dropout, rng.random() < self.long_caption
        text = self.null if drop else self._text(path, meta, self.text_keys(meta, long))
        return Batch(latent, text, clip, condition, label)

    def _read(self, path: Path) -> tuple[dict, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The object of a meta JSON, and all of its sample but the text: latent, clip, condition, label."""
        c, meta = self.config, self.meta(path)
        patch_h, patch_w = c.patch_size[1:]
        latent = self._tensor(path, meta, LATENT_KEYS, (1, c.out_dim, None, None, None), "latent")
        if latent.shape[-2] % patch_h or latent.shape[-1] % patch_w:
            raise UserError(
                f"{path}: latent is {list(latent.shape)}, want multiples of {patch_h} x {patch_w} "
                "in its last two dimensions"
            )
        clip = condition = None
        if c.image:
            if c.clip:
                shape = (1, IMAGE_TOKENS, IMAGE_DIM)
                clip = self._tensor(path, meta, CLIP_KEYS, shape, "CLIP features")
            condition = self._condition(path, meta, latent.shape[1:])
        if self.first_frame:
            check_frames(latent.shape, f"{path}: latent")
            condition = latent[:, :1].clone()
        label = None
        if self.label is not None:
            with named(str(path)):
                label = torch.tensor(label_of(meta, self.label))
        given = (None if a is None else rounded(a, self.dtype) for a in (latent, clip, condition))
        return meta, *given, label

    def _condition(self, path: Path, meta: dict, shape: tuple[int, ...]) -> Tensor:
        """Mask and encoded first frame [20, T, h, w]; the mask is made where a file has the frame alone."""
        first = self._tensor(path, meta, CONDITION_KEYS, (1, None, *shape), "condition")
        whole = MASK_CHANNELS + CONDITION_CHANNELS
        if len(first) not in (CONDITION_CHANNELS, whole):
            wanted = f"{CONDITION_CHANNELS} channels, or {whole} with the mask"
            raise UserError(f"{path}: condition is [1, {len(first)}, ...], want {wanted}")
        if len(first) == whole:
            return first
        mask = torch.zeros(MASK_CHANNELS, *shape)
        mask[:, 0] = 1
        return torch.cat([mask, first])

    def meta(self, path: Path) -> dict:
        """What describes the sample `path`: the object of its meta JSON."""
        return read_meta(path)

    def given(self, path: Path) -> dict[str, str]:
        """What the model is given besides the latent, as part of a meta JSON: the keys and absolute paths of
        the short text and, for an I2V model, of CLIP features and condition."""
        meta = self.meta(path)
        files = {TEXT_KEY: (self.text_keys(meta, False), "text")}
        if self.config.clip:
            files[CLIP_KEYS[0]] = CLIP_KEYS, "CLIP features"
        if self.config.image:
            files[CONDITION_KEYS[0]] = CONDITION_KEYS, "condition"
        found = {name: self._file(path, meta, keys, what)[0] for name, (keys, what) in files.items()}
        return {name: str(file.absolute()) for name, file in found.items()}

    def shape(self, path: Path) -> tuple[int, ...]:
        """Shape of a sample's latent, from the header of its file."""
        shape = (1, self.config.out_dim, None, None, None)
        file, where = self._file(path, self.meta(path), LATENT_KEYS, "latent")
        with named(where):
            return read_array(file, shape, "latent").shape

    def text_keys(self, meta: dict, long: bool) -> tuple[str, ...]:
        """The keys of a sample's text, the first that it has counts."""
        if self.label is not None:
            return REWARD_TEXT_KEYS
        if "textshort_path" in meta and "textlong_path" in meta:
            return ("textlong_path",) if long else ("textshort_path",)
        return (TEXT_KEY, "textshort_path", "textlong_path")

    def _text(self, path: Path, meta: dict, keys: tuple[str, ...]) -> Tensor:
        """The embedding of a sample's text; samples may share its file, which is then kept once."""
        file, where = self.kept.of((path, keys), lambda: self._file(path, meta, keys, "text"))

        def read() -> list[Tensor]:
            with named(where):
                return [rounded(read_text(file, self.config), self.dtype)]

        return self.kept.of((file,), read)[0]

    def _tensor(self, path: Path, meta: dict, keys: Sequence[str], shape, what: str) -> Tensor:
        file, where = self._file(path, meta, keys, what)
        with named(where):
            return _read_tensor(file, shape, what)

    def _file(self, path: Path, meta: dict, keys: Sequence[str], what: str) -> tuple[Path, str]:
        """The file of the first key that a sample has, and what names it in an error."""
        key = next((k for k in keys if meta.get(k) is not None), None)
        if key is None:
            raise UserError(f"{path}: got no {what}, want a key {' or '.join(keys)}")
        where, value = f"{path}: {key}", meta[key]
        good = isinstance(value, str) and PathText().holds(value)
        check(good, where, value, f"the path of the {what}, a .npy")
        return find_from(value, path.parent), where


def read_text(path: str | Path, config: WanConfig) -> Tensor:
    """A text embedding [n, text_dim] from a .npy [1, n, text_dim], n at most text_len."""
    return _read_tensor(path, (1, None, config.text_dim), "text", config.text_len)


def by_shape(reader: Reader, paths: Iterable[Path]) -> dict[tuple[int, ...], list[Path]]:
    """The meta paths by the shape of their latents, in order."""
    found: dict[tuple[int, ...], list[Path]] = {}
    for path in paths:
        found.setdefault(reader.shape(path), []).append(path)
    return found


def _read_tensor(path: str | Path, shape, what: str, longest: int | None = None) -> Tensor:
    """The only entry of the leading dimension of a .npy, copied out of the memory map as float32."""
    array = read_array(path, shape, what)
    if longest is not None and array.shape[1] > longest:
        raise UserError(f"{path}: {what} has {array.shape[1]} tokens, want at most {longest}")
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(np.array(array[0], dtype=np.float32))
    check_finite(tensor, path, what)
    return tensor


def fixed_batches(reader: Reader, paths: list[Path], batch_size: int, device) -> Iterator[Batch]:
    """All samples once and in order, in batches of one shape, without dropout; for validation."""
    plain = replace(reader, text_dropout=0.0, long_caption=0.0)
    run: list[Batch] = []
    for path in paths:
        one = plain.read(path, None)
        if run and (len(run) == batch_size or one.latent.shape != run[0].latent.shape):
            yield to_device(collate(run), device)
            run = []
        run.append(one)
    if run:
        yield to_device(collate(run), device)


def counted(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Every batch with the number of samples before it."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch.latent)


