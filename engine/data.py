"""Data in the official format: .list files of meta JSON paths, fp32 .npy arrays.

Everything random about a sample (its place in the epoch, the dropped caption, the chosen caption,
the loser of a pair) follows from the seed and the sample's position in the sequence of micro-batches
(seeds.py), never from the state of a worker. A sequence that is started at position p goes on exactly as one
that reached p.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prfl_engine.batch import Batch, collate, to_device
from prfl_engine.errors import UserError, check, named
from prfl_engine.failures import lost_worker
from prfl_engine.inputs import check_file, check_finite, find_from, read_array, read_json, read_lines
from prfl_engine.interrupt import quiet_children, shield
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.wan import WanConfig
from prfl_engine.seeds import Purpose, each, seeded

LATENT_KEYS = ("video_vae_latent_path", "vae_latent_path", "latents_path")
CONDITION_KEYS = ("f1_black_path", "latents_condition_path")
CLIP_KEYS = ("image_embeds", "imgclip_path")
REWARD_TEXT_KEYS = ("save_textshort_path", "textshort_path", "text_en_path")
MASK_CHANNELS, CONDITION_CHANNELS = 4, 16


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


@dataclass(frozen=True)
class Reader:
    """Reads single samples for one model, as a Batch without the batch dimension."""

    config: WanConfig
    label: str | None = None  # name of the label; None for the generator's data
    null_text: str | None = None
    text_dropout: float = 0.0
    long_caption: float = 0.0
    null: Tensor | None = field(init=False, default=None)
    """The embedding of null_text, read when the reader is made."""

    def __post_init__(self):
        if self.null_text is not None and self.text_dropout > 0:
            object.__setattr__(self, "null", read_text(self.null_text, self.config))

    def read(self, path: Path, rng: np.random.Generator) -> Batch:
        """The sample of a meta JSON: latent [16, T, h, w], text [n, text_dim], and for an I2V model clip and
        condition, float32 on the CPU; label 0-dim. rng draws the dropped and the long caption. UserError
        where a file or key is missing or holds something else."""
        c, meta = self.config, read_meta(path)
        patch_h, patch_w = c.patch_size[1:]
        latent = self._tensor(path, meta, LATENT_KEYS, (1, c.out_dim, None, None, None), "latent")
        if latent.shape[-2] % patch_h or latent.shape[-1] % patch_w:
            raise UserError(
                f"{path}: latent is {list(latent.shape)}, want multiples of {patch_h} x {patch_w} "
                "in its last two dimensions"
            )
        # Both numbers are always drawn, so that one option never moves the other's choices.
        drop, long = rng.random() < self.text_dropout, rng.random() < self.long_caption
        text = self.null if drop else self._text(path, meta, long)
        clip = condition = None
        if c.image:
            shape = (1, IMAGE_TOKENS, IMAGE_DIM)
            clip = self._tensor(path, meta, CLIP_KEYS, shape, "CLIP features")
            shape = (1, CONDITION_CHANNELS, *latent.shape[1:])
            first = self._tensor(path, meta, CONDITION_KEYS, shape, "condition")
            mask = torch.zeros(MASK_CHANNELS, *latent.shape[1:])
            mask[:, 0] = 1
            condition = torch.cat([mask, first])
        label = None
        if self.label is not None:
            with named(str(path)):
                label = torch.tensor(label_of(meta, self.label))
        return Batch(latent, text, clip, condition, label)

    def shape(self, path: Path) -> tuple[int, ...]:
        """Shape of a sample's latent, from the header of its file."""
        shape = (1, self.config.out_dim, None, None, None)
        file, where = self._file(path, read_meta(path), LATENT_KEYS, "latent")
        with named(where):
            return read_array(file, shape, "latent").shape

    def _text(self, path: Path, meta: dict, long: bool) -> Tensor:
        if self.label is not None:
            keys = REWARD_TEXT_KEYS
        elif "textshort_path" in meta and "textlong_path" in meta:
            keys = ("textlong_path",) if long else ("textshort_path",)
        else:
            keys = ("text_en_path", "textshort_path", "textlong_path")
        return self._tensor(path, meta, keys, (1, None, self.config.text_dim), "text", self.config.text_len)

    def _tensor(
        self, path: Path, meta: dict, keys: Sequence[str], shape, what: str, longest: int | None = None
    ) -> Tensor:
        file, where = self._file(path, meta, keys, what)
        with named(where):
            return _read_tensor(file, shape, what, longest)

    def _file(self, path: Path, meta: dict, keys: Sequence[str], what: str) -> tuple[Path, str]:
        """The file of the first key that a sample has, and what names it in an error."""
        key = next((k for k in keys if meta.get(k) is not None), None)
        if key is None:
            raise UserError(f"{path}: got no {what}, want a key {' or '.join(keys)}")
        where, value = f"{path}: {key}", meta[key]
        check(isinstance(value, str) and value.strip() != "", where, value, f"the path of the {what}, a .npy")
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


class MicroBatches:
    """The endless, reproducible sequence of micro-batches; item p is the p-th.

    Every epoch is a new permutation. A micro-batch holds samples of one latent shape; the last one
    of a shape in an epoch may be smaller. With `lose`, an item is a pair (winners, losers).
    """

    def __init__(
        self,
        reader: Reader,
        paths: list[Path],
        batch_size: int,
        seed: int,
        lose: list[Path] | None = None,
    ):
        self.reader, self.paths, self.batch_size, self.seed = reader, paths, batch_size, seed
        self.lose = lose
        mixed = batch_size > 1 or lose is not None  # only then do shapes matter
        self._shapes = [reader.shape(p) if mixed else () for p in paths]
        sizes = {s: self._shapes.count(s) for s in set(self._shapes)}
        self.batches_per_epoch = sum(-(-n // batch_size) for n in sizes.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._lose_by_shape = by_shape(reader, lose or [])

    def __getitem__(self, position: int) -> Batch | tuple[Batch, Batch]:
        batches = tuple(collate([sample for _, sample in part]) for part in self.samples(position))
        return batches[0] if self.lose is None else batches

    def samples(self, position: int) -> list[list[tuple[Path, Batch]]]:
        """(meta path, sample) of the samples of item `position`; with `lose`, of winners and of losers."""
        picked = [self.paths[i] for i in self.picked(position)]
        at = self.seed, position * self.batch_size, len(picked)
        draws = each(Purpose.CAPTION, *at)
        samples = [(p, self.reader.read(p, rng)) for p, rng in zip(picked, draws, strict=True)]
        if self.lose is None:
            return [samples]
        shape = self._shapes[self.picked(position)[0]]
        fitting = self._lose_by_shape.get(shape)
        if fitting is None:
            raise UserError(
                f"{self.lose[0]}: no latent of data.lose has the shape of {picked[0]}, {list(shape)}"
            )
        draws = [(fitting[rng.integers(len(fitting))], rng) for rng in each(Purpose.LOSER, *at)]
        return [samples, [(p, self.reader.read(p, rng)) for p, rng in draws]]

    def picked(self, position: int) -> list[int]:
        """Which of `paths` the samples of item `position` are; with `lose`, the winners."""
        epoch, place = divmod(position, self.batches_per_epoch)
        return self._plan(epoch)[place]

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes of latents that may have to share a micro-batch; batches of one sample mix nothing."""
        return set(self._shapes)

    def suspects(self, positions: Iterable[int]) -> str:
        """Which samples of these items hold a value that is not finite, or else what samples they are."""
        try:
            samples = [one for p in positions for part in self.samples(p) for one in part]
        except UserError as error:
            return str(error)
        for path, sample in samples:
            for name, a in zip(Batch._fields, sample, strict=True):
                if a is not None and not a.isfinite().all():
                    return f"{path}: its {name} is not finite"
        return f"samples: {', '.join(dict.fromkeys(str(path) for path, _ in samples))}"

    def loader(self, position: int, num_workers: int, device: torch.device, stride: int = 1) -> Iterator:
        """Every stride-th batch from `position` on, on the device; GPU copies are pinned and asynchronous."""
        pinned = device.type == "cuda"
        loader = DataLoader(
            _Caught(self),
            batch_size=None,
            sampler=range(position, 2**40, stride),
            num_workers=num_workers,
            pin_memory=pinned,
            generator=torch.Generator(),  # else it draws from the one that dropout goes on with
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=shield,
        )
        items = iter(loader)
        with quiet_children() if num_workers else nullcontext():
            while True:
                try:
                    item = next(items)
                except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                    failure = lost_worker(error) if num_workers else None
                    if failure is None:
                        raise
                    error.with_traceback(None)
                    break
                if isinstance(item, UserError):
                    failure = item
                    break
                if self.lose is None:
                    yield to_device(item, device)
                else:
                    yield tuple(to_device(b, device) for b in item)
            # The error's traceback refers to itself and to the loader, and a loader that dies by garbage
            # collection waits 5 s for its workers. So that is cut, and no handler holds the error here.
            del items
        raise failure

    def _plan(self, epoch: int) -> list[list[int]]:
        """The sample indices of every micro-batch of an epoch."""
        if self._epoch[0] != epoch:
            rng = seeded(Purpose.ORDER, self.seed, epoch)
            alike: dict[tuple, list[int]] = {}
            for i in rng.permutation(len(self.paths)).tolist():
                alike.setdefault(self._shapes[i], []).append(i)
            n = self.batch_size
            batches = [b[i : i + n] for b in alike.values() for i in range(0, len(b), n)]
            self._epoch = epoch, [batches[i] for i in rng.permutation(len(batches)).tolist()]
        return self._epoch[1]


class _Caught(Dataset):
    """Micro-batches, or the UserError in place of one: raised in a worker, torch would rewrite it."""

    def __init__(self, batches: MicroBatches):
        self.batches = batches

    def __getitem__(self, position: int) -> Batch | tuple[Batch, Batch] | UserError:
        try:
            return self.batches[position]
        except UserError as error:
            return error


def fixed_batches(reader: Reader, paths: list[Path], batch_size: int, device) -> Iterator[Batch]:
    """All samples once and in order, in batches of one shape, without dropout; for validation."""
    plain = Reader(reader.config, reader.label)
    run: list[Batch] = []
    for path in paths:
        one = plain.read(path, seeded(Purpose.CAPTION, 0, 0))  # nothing depends on it
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


