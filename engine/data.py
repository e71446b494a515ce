"""Data in the official format: .list files of meta JSON paths, fp32 .npy arrays.

Everything random about a sample (its place in the epoch, the dropped caption, the chosen caption,
the loser of a pair) follows from the seed and the sample's position in the stream, never from the
state of a worker. A stream that is started at position p goes on exactly as the one that reached p.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from prfl_engine.dit import WanConfig
from prfl_engine.errors import UserError
from prfl_engine.failures import lost_worker
from prfl_engine.interrupt import quiet_children, shield
from prfl_engine.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.objectives import Batch

LATENT_KEYS = ("video_vae_latent_path", "vae_latent_path", "latents_path")
CONDITION_KEYS = ("f1_black_path", "latents_condition_path")
CLIP_KEYS = ("image_embeds", "imgclip_path")
REWARD_TEXT_KEYS = ("save_textshort_path", "textshort_path", "text_en_path")
MASK_CHANNELS, CONDITION_CHANNELS = 4, 16


def seeded(*key: int) -> np.random.Generator:
    """A random generator of its own for every key (non-negative integers)."""
    return np.random.default_rng(key)


def noise_like(latent: Tensor, *key: int) -> Tensor:
    """Gaussian noise of the latent's shape, the same for a key on every device."""
    generator = torch.Generator().manual_seed(int(seeded(*key).integers(2**62)))
    # Pinned: from other memory a copy of this size may wait for what the device has queued before it.
    noise = torch.randn(latent.shape, generator=generator, pin_memory=latent.is_cuda)
    return noise.to(latent.device, non_blocking=True)


def read_lists(paths: Sequence[str], field: str) -> list[Path]:
    """The meta JSON paths of some .list files; a relative path counts from the working directory,
    or else from the .list file's folder."""
    if not paths:
        raise UserError(f"{field}: got no file, want at least one .list of meta JSON paths")
    found = []
    for name in paths:
        if not Path(name).is_file():
            raise UserError(f"{field}: {name}: no such file, want a .list of meta JSON paths")
        for line in Path(name).read_text().splitlines():
            if line.strip():
                path = Path(line.strip())
                beside = Path(name).parent / path
                found.append(beside if not path.exists() and beside.exists() else path)
    if not found:
        raise UserError(f"{field}: {', '.join(paths)}: empty, want meta JSON paths")
    return found


def read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, want a meta JSON") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path}: got a {type(meta).__name__}, want a JSON object")
    return meta


def read_array(path: Path, shape: Sequence[int | None], what: str) -> np.ndarray:
    """A memory-mapped .npy whose shape is `shape`, None standing for any length."""
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, want the {what}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy array: {error}") from None
    if array.ndim != len(shape) or any(
        w is not None and g != w for g, w in zip(array.shape, shape, strict=True)
    ):
        want = ", ".join("*" if n is None else str(n) for n in shape)
        raise UserError(f"{path}: {what} is {list(array.shape)}, want [{want}]")
    return array


def label_of(meta: dict, name: str) -> float:
    """0 or 1. Missing and null are 0, "good" and "poor" are 1 and 0; motion_quality is
    physics_quality and human_quality."""
    if name == "motion_quality":
        return label_of(meta, "physics_quality") * label_of(meta, "human_quality")
    value = meta.get(name)
    known = {None: 0.0, "poor": 0.0, "good": 1.0, 0: 0.0, 1: 1.0}
    if isinstance(value, list | dict) or value not in known:
        raise UserError(f"{name}: got {value!r}, want 0, 1, good, poor or null")
    return known[value]


@dataclass(frozen=True)
class Reader:
    """Reads single samples for one model, as a Batch without the batch dimension."""

    config: WanConfig
    label: str | None = None  # name of the label; None for the generator's data
    null_text: str | None = None
    text_dropout: float = 0.0
    long_caption: float = 0.0

    def read(self, path: Path, rng: np.random.Generator) -> Batch:
        c, meta = self.config, read_meta(path)
        patch_h, patch_w = c.patch_size[1:]
        latent = _tensor(self._array(path, meta, LATENT_KEYS, (1, c.out_dim, None, None, None), "latent"))
        if latent.shape[-2] % patch_h or latent.shape[-1] % patch_w:
            raise UserError(
                f"{path}: latent is {list(latent.shape)}, want multiples of {patch_h} x {patch_w} "
                "in its last two dimensions"
            )
        # Both numbers are always drawn, so that one option never moves the other's choices.
        drop, long = rng.random() < self.text_dropout, rng.random() < self.long_caption
        text = self._null() if drop else self._text(path, meta, long)
        clip = condition = None
        if c.image:
            shape = (1, IMAGE_TOKENS, IMAGE_DIM)
            clip = _tensor(self._array(path, meta, CLIP_KEYS, shape, "CLIP features"))
            shape = (1, CONDITION_CHANNELS, *latent.shape[1:])
            first = _tensor(self._array(path, meta, CONDITION_KEYS, shape, "condition"))
            mask = torch.zeros(MASK_CHANNELS, *latent.shape[1:])
            mask[:, 0] = 1
            condition = torch.cat([mask, first])
        label = None
        if self.label is not None:
            try:
                label = torch.tensor(label_of(meta, self.label))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        return Batch(latent, text, clip, condition, label)

    def shape(self, path: Path) -> tuple[int, ...]:
        """Shape of a sample's latent, from the header of its file."""
        shape = (1, self.config.out_dim, None, None, None)
        return self._array(path, read_meta(path), LATENT_KEYS, shape, "latent").shape

    def _text(self, path: Path, meta: dict, long: bool) -> Tensor:
        if self.label is not None:
            keys = REWARD_TEXT_KEYS
        elif "textshort_path" in meta and "textlong_path" in meta:
            keys = ("textlong_path",) if long else ("textshort_path",)
        else:
            keys = ("text_en_path", "textshort_path", "textlong_path")
        return self._checked(self._array(path, meta, keys, (1, None, self.config.text_dim), "text"), path)

    def _null(self) -> Tensor:
        return read_text(self.null_text, self.config)

    def _checked(self, array: np.ndarray, path: Path | str) -> Tensor:
        if array.shape[1] > self.config.text_len:
            raise UserError(
                f"{path}: text has {array.shape[1]} tokens, want at most {self.config.text_len}"
            )
        return _tensor(array)

    def _array(self, path: Path, meta: dict, keys: Sequence[str], shape, what: str) -> np.ndarray:
        for key in keys:
            if meta.get(key) is not None:
                file = Path(meta[key])
                beside = path.parent / file
                return read_array(beside if not file.exists() and beside.exists() else file, shape, what)
        raise UserError(f"{path}: got no {what}, want a key {' or '.join(keys)}")


def read_text(path: str | Path, config: WanConfig) -> Tensor:
    """A text embedding [n, text_dim] from a .npy [1, n, text_dim], n at most text_len."""
    array = read_array(Path(path), (1, None, config.text_dim), "text")
    return Reader(config)._checked(array, path)


class Stream(Dataset):
    """An endless, reproducible stream of micro-batches; item p is the p-th micro-batch.

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
        self._lose_by_shape: dict[tuple, list[Path]] = {}
        for p in lose or []:
            self._lose_by_shape.setdefault(reader.shape(p), []).append(p)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, position: int) -> Batch | tuple[Batch, Batch]:
        batches = tuple(collate([sample for _, sample in part]) for part in self.samples(position))
        return batches[0] if self.lose is None else batches

    def samples(self, position: int) -> list[list[tuple[Path, Batch]]]:
        """(meta path, sample) of the samples of item `position`; with `lose`, of winners and of losers."""
        epoch, place = divmod(position, self.batches_per_epoch)
        rng = seeded(self.seed, 1, position)
        picked = [self.paths[i] for i in self._plan(epoch)[place]]
        samples = [(p, self.reader.read(p, rng)) for p in picked]
        if self.lose is None:
            return [samples]
        shape = self._shapes[self._plan(epoch)[place][0]]
        fitting = self._lose_by_shape.get(shape)
        if fitting is None:
            raise UserError(
                f"{self.lose[0]}: no latent of data.lose has the shape of {picked[0]}, {list(shape)}"
            )
        chosen = [fitting[i] for i in rng.integers(len(fitting), size=len(picked))]
        return [samples, [(p, self.reader.read(p, rng)) for p in chosen]]

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

    def loader(self, position: int, num_workers: int, device: torch.device) -> Iterator:
        """Batches from `position` on, on the device; GPU copies are pinned and asynchronous."""
        pinned = device.type == "cuda"
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=_From(position),
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
                except UserError as error:  # a worker's arrives with its traceback as the message
                    line = str(error).strip().splitlines()[-1]
                    failure = UserError(line.removeprefix(f"{UserError.__module__}.UserError: "))
                    error.with_traceback(None)
                    break
                except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                    failure = lost_worker(error) if num_workers else None
                    if failure is None:
                        raise
                    error.with_traceback(None)
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
            rng = seeded(self.seed, 0, epoch)
            by_shape: dict[tuple, list[int]] = {}
            for i in rng.permutation(len(self.paths)).tolist():
                by_shape.setdefault(self._shapes[i], []).append(i)
            n = self.batch_size
            batches = [b[i : i + n] for b in by_shape.values() for i in range(0, len(b), n)]
            self._epoch = epoch, [batches[i] for i in rng.permutation(len(batches)).tolist()]
        return self._epoch[1]


class _From:
    """The positions p, p + 1, ... as a sampler."""

    def __init__(self, position: int):
        self.position = position

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.position, 2**40))


def fixed_batches(reader: Reader, paths: list[Path], batch_size: int, device) -> Iterator[Batch]:
    """All samples once and in order, in batches of one shape, without dropout; for validation."""
    plain = Reader(reader.config, reader.label)
    run: list[Batch] = []
    for path in paths:
        one = plain.read(path, seeded(0))
        if run and (len(run) == batch_size or one.latent.shape != run[0].latent.shape):
            yield to_device(collate(run), device)
            run = []
        run.append(one)
    if run:
        yield to_device(collate(run), device)


def collate(samples: list[Batch]) -> Batch:
    """Stack samples of one shape; shorter texts are zero-padded to the longest."""

    def joined(name: str, values: Sequence[Tensor | None]) -> Tensor | None:
        if values[0] is None:
            return None
        return pad_sequence(list(values), batch_first=True) if name == "text" else torch.stack(values)

    return Batch(*map(joined, Batch._fields, zip(*samples, strict=True)))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(None if a is None else a.to(device, non_blocking=True) for a in batch))


def _tensor(array: np.ndarray) -> Tensor:
    """The first and only entry of the leading dimension, copied out of the memory map as float32."""
    return torch.from_numpy(np.array(array[0], dtype=np.float32))
