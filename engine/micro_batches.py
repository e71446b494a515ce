"""The sequence of training batches, and the loader processes that read it.

Everything random about a sample (its place in the epoch, the dropped caption, the chosen caption, the loser
of a pair, what takes the place of a broken one) follows from the seed and the sample's position in the
sequence of micro-batches (seeds.py), never from the state of a worker. A sequence that is started at position
p goes on exactly as one that reached p.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prfl_engine.batch import Batch, collate, to_device
from prfl_engine.data import Reader
from prfl_engine.errors import UserError
from prfl_engine.failures import lost_worker
from prfl_engine.interrupt import held_back, quiet_children, shield
from prfl_engine.seeds import Purpose, each, seeded

START = "fork" if sys.platform.startswith("linux") else None
"""How loader processes start. On Linux they are children of the training process, however that was started
(Python 3.14 would take a fork server): a child of a fork server does not see that it is killed, and stays."""
Shape = tuple[int, ...]
Shapes = list[Shape | None]
Drawn = list[list[tuple[Path, np.random.Generator | None]]]
"""(meta path, what draws its caption) of the samples of an item; with losers, of winners and of losers."""


def _paths(drawn: Drawn) -> list[list[Path]]:
    return [[path for path, _ in part] for part in drawn]


class Item(NamedTuple):
    """A micro-batch, or with losers a pair of them, as one process has read it."""

    batch: Batch | tuple[Batch, Batch] | None  # None: too many samples are broken
    picked: list[list[Path]]  # the meta paths of its samples; with losers, of winners and of losers
    broken: dict[Path, str]  # samples that were to be in it, and why they are not

    def to(self, device: torch.device) -> "Item":
        """The item on the device; a copy from pinned memory does not block the host."""
        if self.batch is None:
            return self
        if isinstance(self.batch, Batch):
            return self._replace(batch=to_device(self.batch, device))
        return self._replace(batch=tuple(to_device(batch, device) for batch in self.batch))


class MicroBatches:
    """The endless, reproducible sequence of micro-batches; item p is the p-th.

    Every epoch is a new permutation. A micro-batch holds samples of one latent shape; the last one
    of a shape in an epoch may be smaller. With `lose`, an item is a pair (winners, losers): a loser is a
    random one of the winner's shape, or where `paired` the one at the same place of its list, and loses its
    caption where the winner does. `at_once` makes one batch of both, the winners first.

    Up to `skip` samples that are broken (reading them is a UserError) are left out: another one of the same
    shape, drawn by seed and position, takes the place. So no other sample moves, and an item follows from
    seed, position and `broken`. In `accept` all ranks decide together which samples those are. A resumed run
    goes on with the shapes and the broken samples of the one before it (`go_on`), whatever can be read now.
    """

    def __init__(
        self,
        reader: Reader,
        paths: list[Path],
        batch_size: int,
        seed: int,
        lose: list[Path] | None = None,
        skip: int = 0,
        paired: bool = False,
        agree: Callable[[dict[Path, str]], dict[Path, str]] = lambda found: found,
        at_once: bool = False,
    ):
        """agree: the union of what all ranks give it. Where samples have to share a shape, the headers of all
        are read. UserError where more than `skip` of them are broken, or a pair is none."""
        self.reader, self.paths, self.batch_size, self.seed = reader, paths, batch_size, seed
        self.lose, self.skip, self.paired, self.agree, self.at_once = lose, skip, paired, agree, at_once
        if paired and len(lose) != len(paths):
            want = f"one for each of the {len(paths)} of data.train"
            raise UserError(f"data.lose: got {len(lose)} samples, want {want}")
        self.broken: dict[Path, str] = {}
        """The samples that are left out, and why."""
        self._every = [*paths, *(lose or [])]
        # None may be left out as a whole: samples, or pairs of them.
        self._groups: list[list[tuple[Path, ...]]] = [[self._one(i) for i in range(len(paths))]]
        self.planned: Shapes | None = None
        """Shapes of all samples, those of `lose` last, where they matter; None: left out from the start."""
        if batch_size > 1 or lose is not None:
            found: dict[Path, str] = {}
            shapes = {path: self._shape(path, found) for path in dict.fromkeys(self._every)}
            self.leave_out(agree(found) if skip else {})
            one = {shape: shape for shape in shapes.values()}  # one object of equal ones: files are small
            self.planned = [None if path in self.broken else one[shapes[path]] for path in self._every]
        self._arrange()

    def _arrange(self) -> None:
        """What may share a micro-batch, by the shapes that are planned with."""
        n = len(self.paths)
        planned = [()] * n if self.planned is None else self.planned
        self._shapes, self._alike = planned[:n], {}
        self._losers: dict[Shape, list[Path]] = {}
        if self.paired:
            self._shapes = [self._both(i, planned[i], planned[n + i]) for i in range(n)]
        else:
            for path, shape in zip(self._every[n:], planned[n:], strict=True):
                if shape is not None:
                    self._losers.setdefault(shape, []).append(path)
        for i, shape in enumerate(self._shapes):
            if shape is not None:
                self._alike.setdefault(shape, []).append(i)
        self._groups[1:] = [[self._one(i) for i in some] for some in self._alike.values()]
        self._groups += [[(path,) for path in some] for some in self._losers.values()]
        self.batches_per_epoch = sum(-(-len(some) // self.batch_size) for some in self._alike.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def _one(self, index: int) -> tuple[Path, ...]:
        """What is drawn as one: a sample, or a pair of them."""
        return (self.paths[index], self.lose[index]) if self.paired else (self.paths[index],)

    def _both(self, index: int, win: Shape | None, lose: Shape | None) -> Shape | None:
        """The shape of a pair; None where one of it is left out."""
        if win is None or lose is None:
            return None
        if win != lose:
            want = f"{list(win)} as that of {self.paths[index]}"
            raise UserError(f"{self.lose[index]}: latent is {list(lose)}, want {want}")
        return win

    def left_out(self) -> dict[int, str]:
        """`broken` by place in `paths`, and `lose` after it, which stays where data move."""
        return {self._every.index(path): why for path, why in self.broken.items()}

    def go_on(self, left_out: dict[int, str], planned: Shapes | None) -> None:
        """Go on as a run with these `left_out` and `planned`. UserError where they are not of these data, or
        more than `skip` samples are broken."""
        count = len(self._every)
        if any(place >= count for place in left_out) or (planned is not None and len(planned) != count):
            raise UserError(f"data.train: got {count} samples, want those that the checkpoint was made with")
        if planned is not None and self.planned is not None:
            self.planned = planned
            self._arrange()
        self.leave_out({self._every[place]: why for place, why in left_out.items()})

    def __getstate__(self) -> dict:
        """Loader processes read; what ranks agree upon they never ask."""
        return self.__dict__ | {"agree": None}

    def __getitem__(self, position: int) -> Batch | tuple[Batch, Batch]:
        item = self.read(position)
        if item.batch is None:
            raise UserError(self._refusal(item.broken))
        return item.batch

    def read(self, position: int) -> Item:
        """Item `position` from the samples that this process can read; changes nothing here."""
        found: dict[Path, str] = {}
        while self._refusal(found) is None:
            drawn, shape = self._drawn(position, found), self._shapes[self._planned(position)[0]]
            parts = [[self._sample(path, rng, shape, found) for path, rng in part] for part in drawn]
            if all(sample is not None for part in parts for sample in part):
                batches = tuple(map(collate, [sum(parts, [])] if self.at_once else parts))
                return Item(batches[0] if len(batches) == 1 else batches, _paths(drawn), found)
        return Item(None, [], found)

    def accept(self, item: Item, position: int, device: torch.device) -> Item:
        """Item `position` without what any rank has found broken; `item` is what a loader has read. Every
        rank calls it for its own position. UserError on all ranks where more than `skip` are broken."""
        while self.skip:
            fits = self._refusal(item.broken) is None
            if fits and item.picked != _paths(self._drawn(position, item.broken)):
                item = self.read(position).to(device)  # a rank could not read what this one had read
            new = self.agree({p: why for p, why in item.broken.items() if p not in self.broken})
            if not new:
                break
            self.leave_out(new)
        return item

    def leave_out(self, broken: dict[Path, str]) -> None:
        """Use these samples no more. UserError, which names one, where that makes more than `skip`, or leaves
        none of a shape."""
        if (refusal := self._refusal(broken)) is not None:
            raise UserError(refusal)
        self.broken |= broken

    def _refusal(self, more: dict[Path, str]) -> str | None:
        """Why the run cannot go on without these samples, too; None if it can."""
        bad = self.broken | more
        if len(bad) > self.skip:
            return f"{list(bad.values())[self.skip]}; data.skip_broken: got {self.skip}, want more to go on"
        for group in self._groups:
            if bad and all(any(path in bad for path in one) for one in group):
                path = min(path for one in group for path in one if path in bad)
                return f"{bad[path]}; data.skip_broken: no other sample can take its place"
        return None

    def _shape(self, path: Path, found: dict[Path, str]) -> Shape | None:
        return self._try(lambda: self.reader.shape(path), path, found)

    def _sample(
        self, path: Path, rng: np.random.Generator | None, shape: Shape, found: dict[Path, str]
    ) -> Batch | None:
        def read() -> Batch:
            sample = self.reader.read(path, rng)
            if shape not in ((), got := (1, *sample.latent.shape)):
                raise UserError(f"{path}: latent is {list(got)}, want {list(shape)} as when the run began")
            return sample

        return self._try(read, path, found)

    def _try(self, read: Callable, path: Path, found: dict[Path, str]):
        """What read() gives; None where the sample is broken, which is noted in `found`."""
        try:
            return read()
        except UserError as error:
            if not self.skip:
                raise
            found[path] = str(error)
            return None

    def _drawn(self, position: int, found: dict[Path, str]) -> Drawn:
        """The samples of item `position`, none of which is left out or in `found`."""
        picked = self.picked(position, found)
        at = self.seed, position * self.batch_size, len(picked)

        def captioned(paths: list[Path]) -> list[tuple[Path, np.random.Generator | None]]:
            if not self.reader.draws:  # to make them takes as long as to read a small sample that is kept
                return [(paths[i], None) for i in picked]
            return [(paths[i], rng) for i, rng in zip(picked, each(Purpose.CAPTION, *at), strict=True)]

        winners = captioned(self.paths)
        if self.lose is None:
            return [winners]
        if self.paired:
            return [winners, captioned(self.lose)]
        shape = self._shapes[self._planned(position)[0]]
        fitting = self._losers.get(shape)
        if fitting is None:
            raise UserError(
                f"{self.lose[0]}: no latent of data.lose has the shape of {winners[0][0]}, {list(shape)}"
            )

        def loser(rng: np.random.Generator) -> Path:
            while (path := fitting[rng.integers(len(fitting))]) in self.broken or path in found:
                pass
            return path

        return [winners, [(loser(rng), rng) for rng in each(Purpose.LOSER, *at)]]

    def picked(self, position: int, found: dict[Path, str] | None = None) -> list[int]:
        """Which of `paths` the samples of item `position` are, none of them left out or in `found`; with
        `lose`, the winners."""
        bad, picked = self.broken | (found or {}), self._planned(position)
        return [self._standing(i, position * self.batch_size + row, bad) for row, i in enumerate(picked)]

    def _standing(self, index: int, position: int, bad: dict[Path, str]) -> int:
        """Sample `index`, or what takes its place at the position of a sample."""

        def out() -> bool:
            return any(path in bad for path in self._one(index))

        if out():
            alike = self._alike[self._shapes[index]]
            rng = seeded(Purpose.SUBSTITUTE, self.seed, position)
            while out():
                index = alike[rng.integers(len(alike))]
        return index

    def _planned(self, position: int) -> list[int]:
        epoch, place = divmod(position, self.batches_per_epoch)
        return self._plan(epoch)[place]

    @property
    def shapes(self) -> set[Shape]:
        """The shapes of latents that may have to share a micro-batch; batches of one sample mix nothing."""
        return set(self._alike)

    @property
    def full(self) -> bool:
        """Whether all micro-batches have data.batch_size samples."""
        return all(len(some) % self.batch_size == 0 for some in self._alike.values())

    def latents(self) -> list[Shape]:
        """The shapes of all samples that are not left out, from their headers."""
        found: dict[Path, str] = {}
        shapes = [self._shape(path, found) for path in self.paths if path not in self.broken]
        self.leave_out(self.agree(found) if self.skip else {})
        return [shape for shape in shapes if shape is not None]

    def suspects(self, positions: Iterable[int]) -> str:
        """Which samples of these items hold a value that is not finite, or else what samples they are."""
        samples: list[Path] = []
        for position in positions:
            try:
                batch, paths = self[position], _paths(self._drawn(position, {}))
            except UserError as error:
                return str(error)
            paths = [sum(paths, [])] if self.at_once else paths
            for one, some in zip([batch] if isinstance(batch, Batch) else batch, paths, strict=True):
                for name, a in zip(Batch._fields, one, strict=True):
                    finite = None if a is None else a.flatten(1).isfinite().all(1).tolist()
                    if finite is not None and not all(finite):
                        return f"{some[finite.index(False)]}: its {name} is not finite"
                samples += some
        return f"samples: {', '.join(dict.fromkeys(map(str, samples)))}"

    def loader(self, position: int, num_workers: int, device: torch.device, stride: int = 1) -> Iterator:
        """Every stride-th Item from `position` on, on the device; GPU copies are pinned and asynchronous."""
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
            multiprocessing_context=START if num_workers else None,
        )
        with held_back():
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
                yield item.to(device)
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
                if self._shapes[i] is not None:
                    alike.setdefault(self._shapes[i], []).append(i)
            n = self.batch_size
            batches = [b[i : i + n] for b in alike.values() for i in range(0, len(b), n)]
            self._epoch = epoch, [batches[i] for i in rng.permutation(len(batches)).tolist()]
        return self._epoch[1]


class _Caught(Dataset):
    """Items, or the UserError in place of one: raised in a worker, torch would rewrite it."""

    def __init__(self, batches: MicroBatches):
        self.batches = batches

    def __getitem__(self, position: int) -> Item | UserError:
        try:
            return self.batches.read(position)
        except UserError as error:
            return error
