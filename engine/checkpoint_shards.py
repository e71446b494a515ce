"""Sharded checkpoints: weights, optimizer states, averaged weights; every rank writes its part to a file.

A tensor is a row of values here, as flat as the optimizer sees it. A rank writes what it holds of it to
shard-R.safetensors, as pieces NAME@FIRST; FIRST is the place of a piece's first value in the whole. The first
rank writes shards.json last, which names the files and gives dtype and shape of every whole tensor. A reader
takes from every file what overlaps its own part, so any number of ranks reads what any other has written.

torch.distributed.checkpoint does the same, but its reader unpickles the file `.metadata`, which can execute
code. Its safetensors storage keeps one piece of a tensor in a file; a state of the optimizer is many blocks.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prfl_engine import checksums, files, phases
from prfl_engine.agree import Agreed, gathered, leads, patiently, several
from prfl_engine.checksums import Sums
from prfl_engine.errors import UserError, check
from prfl_engine.model.shard_files import INDEX, Piece, copy, found_in, read_index, stored_pieces
from prfl_engine.optim.block_adamw import GROUP, BlockAdamW
from prfl_engine.optim.optimizer import EMA
from prfl_engine.optim.states import check_moments
from prfl_engine.shards import local, offset, reshard
from prfl_engine.tensor_files import in_order, write_tensors


class Saving:
    """A save that may still be running."""

    def __init__(self, future: Future | None = None):
        self._future = future

    def done(self) -> bool:
        """Whether `wait` returns at once; ranks may differ for a moment."""
        return self._future is None or self._future.done()

    @property
    def failed(self) -> bool:
        """Whether it is done and `wait` raises."""
        return self.done() and self._future is not None and self._future.exception() is not None

    def wait(self) -> None:
        """Wait until all ranks have written all; raises on all ranks if one has failed."""
        if self._future is not None:
            self._future.result()


def save_sharded(
    folder: Path,
    model: nn.Module,
    optimizer: BlockAdamW | None = None,
    ema: EMA | None = None,
    trained: bool = False,
    background: dist.ProcessGroup | None = None,
    then: Callable[[Sums], None] | None = None,
) -> Saving:
    """Write this rank's part of a checkpoint into an existing folder, which all ranks see.

    Every rank calls it, on a model that parallel.shard has sharded. trained: of the weights only those that
    require gradients. Raises on every rank if one has failed.

    background, a gloo group of all ranks that serves nothing else meanwhile: copies everything to host memory
    and returns; a thread writes the copies. Weights and states may change at once. Before the group is used
    again, wait for what is returned. then: called on every rank after all have written, in that thread,
    with the checksums of their files.

    The folder becomes a checkpoint when its owner renames it. With agree.shared_folder:

        stack = ExitStack()
        folder = stack.enter_context(shared_folder(out / "checkpoint-5", group))
        saving = save_sharded(folder, model, optimizer, background=group, then=lambda sums: stack.close())
        ...
        with stack:  # before the next save, and before the process ends
            saving.wait()
    """
    found = list(pieces(model, optimizer, ema, trained))
    index = {
        "tensors": {p.name: [str(p.values.dtype).removeprefix("torch."), list(p.shape)] for p in found},
        "updates": [] if optimizer is None else [g["updates"] for g in optimizer.param_groups],
    }
    mine = {f"{p.name}@{p.first}": p.values for p in found if p.mine and len(p.values)}
    if background is None:
        _write(folder, mine, index, None, then)
        return Saving()
    with Agreed(background):
        mine = {name: a.to("cpu", copy=True) for name, a in mine.items()}
    thread = ThreadPoolExecutor(1, thread_name_prefix="prfl-save", initializer=phases.apart)
    saving = Saving(thread.submit(_write, folder, mine, index, background, then))
    thread.shutdown(wait=False)
    return saving


@torch.no_grad()
def load_sharded(
    folder: Path,
    model: nn.Module,
    optimizer: BlockAdamW | None = None,
    ema: EMA | None = None,
    trained: bool = False,
) -> None:
    """Read this rank's part of a checkpoint that any number of ranks has written; to the bit what was saved.

    Arguments as save_sharded takes them; what the checkpoint holds in addition is left unread. UserError on
    every rank, before anything has changed, for files that are not there, and names, shapes, dtypes or places
    that do not fit; and for states that are read and are not finite.
    """
    with Agreed():
        index = read_index(folder)
        found = list(pieces(model, optimizer, ema, trained))
        _check(folder, found, index, optimizer)
        stored = stored_pieces(folder, index)
        for parts in [found_in(folder, p, stored[p.name]) for p in found]:
            copy(parts)
        if optimizer is not None:
            for group, updates in zip(optimizer.param_groups, index["updates"], strict=True):
                group["updates"] = updates
            _check_moments(folder, model, optimizer)


def _check_moments(folder: Path, model: nn.Module, optimizer: BlockAdamW) -> None:
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        try:
            check_moments(f"optimizer/{names[p]}", state)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from None


def pieces(
    model: nn.Module, optimizer: BlockAdamW | None, ema: EMA | None, trained: bool = False
) -> Iterator[Piece]:
    """What this rank holds, in the memory of its owners: model/NAME, optimizer/NAME/STATE, ema/NAME.

    Gathered weights are dropped first. A state has a value for each of a parameter's, or for each 256.
    """
    reshard(model)
    names = {p: name for name, p in model.named_parameters()}
    for p, name in names.items():
        if p.requires_grad or not trained:
            yield _piece(f"model/{name}", p)
    for name, a in ema.average.items() if ema is not None else ():
        yield _piece(f"ema/{name}", a)
    if optimizer is None:
        return
    if optimizer.host is not None:
        optimizer.host.wait()
    for p, state in optimizer.state.items():
        of, first = f"optimizer/{names[p]}", offset(p)
        yield Piece(f"{of}/step", 0, state["step"].view(1), (1,), leads())
        for block in state["blocks"]:
            for key, a in block.items():
                per = GROUP if key.endswith("_scale") else 1
                yield Piece(f"{of}/{key}", first // per, a, (p.numel() // per,), _first_replica(p))
            first += len(next(iter(block.values())))


def _piece(name: str, a: Tensor) -> Piece:
    return Piece(name, offset(a), local(a.detach()).view(-1), tuple(a.shape), _first_replica(a))


def _first_replica(a: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    if not isinstance(a, DTensor):
        return leads()
    same = [dim for dim, placement in enumerate(a.placements) if placement.is_replicate()]
    return all(a.device_mesh.get_local_rank(dim) == 0 for dim in same)


def _write(folder: Path, mine: dict[str, Tensor], index: dict, group, then) -> None:
    """Write this rank's pieces; the first rank, after all, the index."""
    sums: Sums = {}

    def write() -> None:
        file = f"shard-{dist.get_rank(group) if several() else 0:05d}.safetensors"
        layout = {name: (a.dtype, tuple(a.shape)) for name, a in mine.items()}
        write_tensors(folder / file, layout, (mine[name] for name in in_order(layout)))
        files.sync(folder / file)
        sums[file] = checksums.of(folder / file)

    patiently(write if mine else lambda: None, group)
    sums = {name: value for theirs in gathered(sums, group) for name, value in theirs.items()}
    with Agreed(group):
        if leads(group):
            index = {"files": list(sums), **index}
            files.write_whole(folder / INDEX, json.dumps(index))
    if then is not None:
        then(sums)


def _check(folder: Path, found: list[Piece], index: dict, optimizer: BlockAdamW | None) -> None:
    """UserError unless the checkpoint has the tensors of which this rank has pieces, and no others of their
    kind."""
    held, own = index["tensors"], {p.name: p for p in found}
    kinds = {name.partition("/")[0] for name in own}
    others = {name for name in held if name.partition("/")[0] in kinds}
    if "ema" in kinds and not any(name.startswith("ema/") for name in held):
        raise UserError(f"{folder}: holds no averaged weights, want a checkpoint with them or train.ema=0")
    for what, names in (("misses", own.keys() - held.keys()), ("has unknown", others - own.keys())):
        if names:
            raise UserError(f"{folder}: {what} {len(names)} tensors, such as {min(names)}")
    for name, p in own.items():
        want = [str(p.values.dtype).removeprefix("torch."), list(p.shape)]
        check(held[name] == want, f"{folder}: {name}", held[name], str(want))
    if optimizer is not None:
        got, want = len(index["updates"]), len(optimizer.param_groups)
        check(got == want, f"{folder}: groups of the optimizer", got, str(want))
