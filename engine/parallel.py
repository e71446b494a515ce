"""Several processes at work on one model: sharded weights (FSDP2), and a sequence cut over ranks.

Every rank computes the whole loss of its samples, every collective has its true adjoint, and FSDP averages
gradients over all ranks. So nothing is divided by the size of a group anywhere.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from prfl_engine import checksums
from prfl_engine.agree import Agreed, gathered, patiently, reduced, shared_folder, watched_groups
from prfl_engine.checkpoint_shards import INDEX
from prfl_engine.checks import check_stored
from prfl_engine.config import Config, ParallelConfig
from prfl_engine.errors import TrainingError, UserError, check
from prfl_engine.interrupt import Interrupts, Stopped, interrupts
from prfl_engine.metrics import note
from prfl_engine.model.experts import Experts
from prfl_engine.model.layers import Block
from prfl_engine.model.reward import QueryPool, RewardModel, TokenPool
from prfl_engine.model.wan import WanTransformer
from prfl_engine.together import Together
from prfl_kernels.exchange import SequenceGroup, group_of


@dataclass(frozen=True)
class World:
    """The processes of a run. One without torchrun is a world of its own, with no mesh: `World()`."""

    rank: int = 0
    size: int = 1
    sequence: int = 1  # neighbouring ranks that share every sample
    resident: bool = False
    mesh: DeviceMesh | None = None  # [shard] or [replicate, shard], over all ranks
    group: dist.ProcessGroup | None = None  # the ranks that share this one's samples
    control: dist.ProcessGroup | None = None  # all ranks, over gloo, for what the host knows
    saves: dist.ProcessGroup | None = None  # the same for checkpoints that a thread writes
    signals: Interrupts | None = None  # of several processes: what `stop_if_asked` asks
    reduce_dtype: torch.dtype | None = None  # of sums of gradients over ranks; None: that of the weights
    limit: timedelta | None = None  # parallel.timeout

    @property
    def leads(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    @property
    def readers(self) -> int:
        """How many ranks, or groups of ranks, have samples of their own."""
        return self.size // self.sequence

    @property
    def reader(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.sequence

    @property
    def copies(self) -> int:
        """Copies of the sharded weights."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim > 1 else 1

    def check_checkpoint(self, folder: Path | None) -> None:
        """UserError for a checkpoint that processes of another kind have written, sharded or not, and for one
        that is not as it was written. Every rank reads its part of the files."""
        if folder is None:
            return
        sharded = (folder / INDEX).is_file()
        if sharded and self.mesh is None:
            raise UserError(f"{folder}: got a sharded checkpoint, want torchrun (any number of processes)")
        if not sharded and self.mesh is not None:
            raise UserError(f"{folder}: got a checkpoint of one process, want it without torchrun")
        with self.agreed():
            checksums.check([*checksums.listed(folder)][self.rank :: self.size])

    def agreed(self) -> Agreed:
        """A with block that all ranks leave together: if it raises on one, it raises on all."""
        return Agreed(self.control)

    def patiently(self, work: Callable[[], None]) -> None:
        """work() on every rank, which may take longer than the time-out."""
        work() if self.mesh is None else patiently(work, self.control)

    def folder(self, folder: Path) -> AbstractContextManager[Path]:
        """A folder that all ranks write into and that takes its name when all have done so."""
        return shared_folder(folder, self.control)

    def all(self, value: Any) -> list[Any]:
        """`value`, which can be pickled, of every rank; every rank must ask."""
        return gathered(value, self.control) if self.mesh is not None else [value]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank; every rank must ask."""
        return any(self.all(flag))

    def most(self, number: float) -> float:
        """The largest `number` of all ranks; every rank must ask."""
        return max(self.all(number))

    def union(self, found: dict) -> dict:
        """What all ranks have found, of equal keys the lowest rank's; every rank must ask."""
        return {k: v for theirs in reversed(self.all(found)) for k, v in theirs.items()}

    def stop_if_asked(self) -> None:
        """Stopped on all ranks where a signal has come to one of them, with nothing to save yet; every
        rank must ask. One process by itself is stopped when the signal comes."""
        if (name := self.signal(self.signals)) is not None:
            raise Stopped(f"{name}: stopped; nothing to save")

    def signal(self, signals: Interrupts | None) -> str | None:
        """The name of a signal that has come to some rank; every rank must ask."""
        return next((asked.name for asked in self.all(signals and signals.asked) if asked), None)

    def who_is_lost(self) -> str:
        """After a collective that broke or timed out: which ranks do not answer, in words; every rank that is
        left asks."""
        try:
            self.all(None)
        except TrainingError as error:
            return str(error)
        return "all processes still answer"

    def to_first(self, value: list[Any], rank: int) -> list[Any]:
        """On the first rank the list of another rank, which has to ask, too; nothing on all others."""
        if rank and self.rank == rank:
            dist.send_object_list([value], 0, self.control)
        elif rank and self.leads:
            got = [None]
            dist.recv_object_list(got, rank, self.control)
            return got[0]
        return value if self.leads and not rank else []

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, on the device."""
        return values if self.mesh is None else reduced(values) / self.size

    def together(self, model: WanTransformer | Experts, keep: bool = False) -> Together | None:
        """What the rollouts of a model that `place` has sharded need, see Together; None for one process."""
        return None if self.mesh is None else Together(self, model, keep)

    def last(self, key: int, accumulate: int) -> bool:
        """Whether micro-batch `key` is the last of an optimizer step on its rank; accumulate: those of all
        ranks together."""
        return key % accumulate + self.readers >= accumulate

    def add_up_copies(self, model: nn.Module, now: bool) -> None:
        """Whether the next backwards add up the gradients of blocks over the copies of the weights, too. If
        not, a rank keeps the sum over the shards of its copy until then; so it must be in the last backwards
        of an optimizer step, and only there.

        The rest of the model, 2 % of 14B, is added up in every backward: not all of its parameters have a
        gradient in each, and FSDP adds what it keeps by position. So are both of two experts: the last
        backward may be of one alone.
        """
        if self.mesh is not None and self.mesh.ndim > 1 and not isinstance(model, Experts):
            for m in model.modules():
                if isinstance(m, Block):
                    m.set_requires_all_reduce(now, recurse=False)

    @property
    def shard(self) -> Callable[[nn.Module], nn.Module] | None:
        """What shards a model as it is loaded; None for one process."""
        return None if self.mesh is None else lambda model: shard(model, self.mesh, self.reduce_dtype)

    def place(self, model: WanTransformer | Experts | RewardModel) -> nn.Module:
        """Shard a model over the ranks and cut its sequences, as the configuration says; returns it. Two
        experts are sharded both, and all ranks ask each at the same time."""
        if self.mesh is None:
            return model
        for whole in (model.high, model.low) if isinstance(model, Experts) else (model,):
            if not isinstance(whole.mlp if isinstance(whole, RewardModel) else whole, FSDPModule):
                shard(whole, self.mesh, self.reduce_dtype)
        if isinstance(model, Experts):
            model.agree = lambda asked: set(self.union(dict.fromkeys(asked)))
        return model if self.group is None else cut_sequence(model, self.group, self.limit)


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def copies(config: ParallelConfig, size: int, here: int, nodes: int) -> int:
    """parallel.replicate, or one copy of the weights for each of so many nodes with `here` processes.
    UserError for nodes with different numbers of them."""
    if config.replicate is not None:
        return config.replicate
    if here * nodes != size:
        why = f"{size} processes on {nodes} nodes are not {here} on each"
        raise UserError(f"parallel.replicate: got null, want a number: {why}")
    return nodes


def nodes_of(size: int) -> tuple[int, int]:
    """(processes of this node, nodes), as torchrun or Slurm says; without a word one node."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return here, int(os.environ.get("GROUP_WORLD_SIZE", size // here))


@contextmanager
def started(whole: Config, device: torch.device) -> Iterator[World]:
    """The world of the processes that torchrun has started, for as long as the block runs; without torchrun a
    world of one. UserError for sizes that do not divide each other."""
    config = whole.parallel
    if not launched():
        for name in ("replicate", "sequence"):
            given = getattr(config, name)
            check(given in (None, 1), f"parallel.{name}", given, "1 without torchrun")
        usual = ParallelConfig()
        idle = [name for name in ("resident", "timeout") if getattr(config, name) != getattr(usual, name)]
        if idle:
            note(f"{' and '.join(f'parallel.{n}' for n in idle)}: without torchrun this changes nothing")
        yield World()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    replicate = copies(config, size, *nodes_of(size))
    check_layout(config, replicate, size)
    limit, cuda = timedelta(seconds=config.timeout), device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=limit, device_id=device if cuda else None
    )
    try:
        mesh, group = mesh_of(device, size, replicate, limit), None
        if config.sequence > 1:
            group = group_of(torch.arange(size).view(-1, config.sequence), limit)
        dtype = torch.float32 if whole.optim.grad_dtype == "float32" else None
        with interrupts() as signals, signals.at_once(False), watched_groups(2, limit) as gloo:
            yield World(
                rank, size, config.sequence, config.resident, mesh, group, *gloo, signals, dtype, limit
            )
    finally:
        dist.destroy_process_group()


def mesh_of(device: torch.device, size: int, replicate: int, limit: timedelta) -> DeviceMesh:
    """[shard] over all ranks, or [replicate, shard]."""
    if replicate == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    ranks = torch.arange(size).view(replicate, -1)
    groups = [group_of(ranks.T, limit), group_of(ranks, limit)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def check_layout(config: ParallelConfig, replicate: int, size: int) -> None:
    """UserError unless `replicate` copies and groups of parallel.sequence divide so many processes."""
    per_copy = size // replicate
    check(size % replicate == 0, "parallel.replicate", replicate, f"a divisor of {size} processes")
    check(
        per_copy % config.sequence == 0, "parallel.sequence", config.sequence,
        f"a divisor of the {per_copy} processes of a copy",
    )  # fmt: skip


def check_config(config: Config, world: World) -> None:
    """UserError for settings that do not fit the number of processes, or that several cannot have."""
    check_readers(config, world.readers)
    if world.mesh is not None:
        check_many(config, world.readers)


def check_readers(config: Config, readers: int) -> None:
    """UserError for settings that do not fit so many groups of processes with samples of their own."""
    if config.optim.in_backward:
        check(
            config.train.accumulate == readers, "train.accumulate", config.train.accumulate,
            f"{readers} with optim.in_backward: one backward of a process in an optimizer step",
        )  # fmt: skip


def check_many(config: Config, readers: int) -> None:
    """UserError for settings that several processes cannot have."""
    c, n, many = config, readers, "with several processes"
    check(
        c.train.accumulate % n == 0, "train.accumulate", c.train.accumulate,
        f"a multiple of {n}, the groups of processes with samples of their own",
    )  # fmt: skip
    stays = c.parallel.resident and c.parallel.sequence == 1
    check(
        not c.rollout.cuda_graph or stays, "rollout.cuda_graph", True,
        f"false {many}, or parallel.resident=true and parallel.sequence=1: a graph has no collectives",
    )  # fmt: skip
    check(
        c.model.idle == "device", "model.idle", c.model.idle,
        f"device {many}: shards of the idle expert stay there",
    )  # fmt: skip
    place, want = c.loss.anchor_place, f"device {many}: shards of the copy stay there"
    check(place == "device", "loss.anchor_place", place, want)
    check_stored(c, f"{many}, which share the weights")
    apart = c.chain.unconditional == "gradient" and not c.rollout.guidance_at_once
    want = f"detached, or rollout.guidance_at_once, {many}: a backward goes through one forward of a block"
    check(not apart, "chain.unconditional", c.chain.unconditional, want)
    check(
        c.optim.name != "apex", "optim.name", c.optim.name, f"adamw or adamw8bit {many}: apex has no shards"
    )


def shard(
    model: WanTransformer | RewardModel, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None
) -> nn.Module:
    """Shard the parameters of a generator or reward model over a mesh [shard], or [replicate, shard] (HSDP).

    A block is a unit, the rest of the transformer another, pooling and head of a reward model too. The
    gathered weights of a block are dropped after its forward. Weights travel in their dtypes: FSDP's mixed
    precision would cast norms and modulation, which compute in float32. Gradients are added up over ranks in
    reduce_dtype, None: that of their weights. Of a reward model whose transformer was sharded as it was
    loaded, pooling and head are left to shard. Returns the model.
    """
    dtypes = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    how = dict(mesh=mesh, reshard_after_forward=True, mp_policy=dtypes)
    # A latent that the model returns is a view; nothing here writes to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    transformer = model.transformer if isinstance(model, RewardModel) else model
    if not isinstance(transformer, FSDPModule):
        for block in transformer.blocks:
            fully_shard(block, **how)
        fully_shard(transformer, **how)
        # Called in addition to forward. None calls another: FSDP would end the outer with the inner one.
        for name in ("embed_context", "features", "layers"):
            register_fsdp_forward_method(transformer, name)
    if isinstance(model, RewardModel):
        for part in (model.pool, model.mlp):
            if next(part.parameters(), None) is not None:
                fully_shard(part, **how)
    return model


def cut_sequence(
    model: nn.Module, group: dist.ProcessGroup, limit: timedelta | None = None
) -> nn.Module:
    """Let a transformer or a reward model hold the tokens of this rank alone; all ranks of the group must get
    the same latents, and call it together. limit: the time-out of groups that are made for it. Returns the
    model. UserError for dropout in the pooling, whose random numbers would differ."""
    return cut_modules(model, partial(SequenceGroup, group, limit=limit))


def cut_modules(model: nn.Module, make: Callable[[int], SequenceGroup]) -> nn.Module:
    """`cut_sequence` over the group that `make` makes for so many heads."""
    sequence = make(next(m.self_attn.num_heads for m in model.modules() if isinstance(m, Block)))
    for module in model.modules():
        if isinstance(module, QueryPool) and module.training and module.multihead_attn.dropout > 0:
            dropout = module.multihead_attn.dropout
            raise UserError(f"reward.dropout: got {dropout:g} with parallel.sequence > 1, want 0")
        if isinstance(module, (Block, QueryPool, TokenPool, WanTransformer)):
            module.sequence = sequence
    return model
