"""Bytes between optimizer steps, on the device and on the host: loading, resuming, checkpoints, processes."""

import math

from prfl_engine.config import Config
from prfl_engine.optim.optimizer import in_blocks
from prfl_engine.planner.entries import COUNTED, ESTIMATED, Entry, entries
from prfl_engine.planner.machine import COMMUNICATOR, CONTEXT, PROCESS, WORKER, Machine
from prfl_engine.planner.models import batch_bytes
from prfl_engine.planner.setup import Setup
from prfl_engine.planner.sharded import Shards
from prfl_engine.planner.standing import (
    Models,
    Parameter,
    generator_here,
    idle_bytes,
    is_narrow,
    pinned,
    reward_here,
    rounded,
    start_bytes,
    state_bytes,
)

PREFETCHED = 4  # batches of a loader process, micro_batches.MicroBatches.loader


def values(found: list[Parameter]) -> int:
    """Values of whole parameters."""
    return sum(p.count * math.prod(p.shape) for p in found)


def communicators(shards: Shards) -> int:
    """Groups of ranks for which NCCL keeps buffers: all, those of shards and of copies, those of a sample."""
    return 0 if not shards.many else 1 + 2 * (shards.replicate > 1) + (shards.sequence > 1)


def of_libraries(gpu: Machine | None, shards: Shards) -> list[tuple[str, int, str, str]]:
    """What CUDA and NCCL take on the device."""
    if gpu is None:
        return []
    buffers = communicators(shards) * COMMUNICATOR
    basis = "256 MiB a group: 32 channels, 4 MiB each way (NCCL_BUFFSIZE)"
    return [
        ("CUDA context", CONTEXT, ESTIMATED, "assumed 0.6 GB: context, kernels, cuBLAS work space"),
        ("NCCL buffers", buffers, ESTIMATED, basis),
    ]


def load(
    c: Config, setup: Setup, models: Models, gpu: Machine | None, shards: Shards
) -> tuple[Entry, ...]:
    """Files are read tensor by tensor; random weights are made whole in float32, then converted or
    sharded."""
    drawn = c.model.path is None  # random weights are stored when they have been drawn
    generator = models.generator if drawn else generator_here(setup, models)
    weights = sum(p.bytes() for p in generator) - idle_bytes(setup, models).either
    if c.model.path is None and shards.many:
        weights = sum(4 * p.count * math.prod(p.shape) for p in models.generator)
    reward = sum(p.bytes() for p in reward_here(setup, models))
    found = [("weights", weights, COUNTED, "shapes of the parameters"), ("reward model", reward, COUNTED, "")]
    found.append(("frozen start", start_bytes(setup, models)[0], COUNTED, ""))
    if c.model.path is None and c.model.weights_dtype != "float32" and not shards.many:
        found.append(("temporaries", max(0, weights - reward), COUNTED, "random weights in float32 first"))
    return entries([*found, *of_libraries(gpu, shards)])


def resume(c: Config, setup: Setup, models: Models, shards: Shards) -> tuple[Entry, ...]:
    """In addition to what stands: averaged weights are read while those of the start are still there. torch's
    AdamW has no states by then. A sharded checkpoint is copied into what is there."""
    if c.train.ema == 0 or shards.many:
        return ()
    read = models.trained if c.lora.rank or setup.experts is not None else models.generator
    again = sum(p.bytes(4) for p in read)
    if not in_blocks(c.optim, is_narrow(models), shards.many):
        again = max(0, again - state_bytes(models, c.optim, shards.many).device)
    return entries([("averaged weights, read", again, COUNTED, "float32, as `ema` of the checkpoint holds")])


def checkpoint(c: Config, setup: Setup, models: Models, shards: Shards) -> tuple[Entry, ...]:
    """In addition to what stands: of sharded weights the best are written whole, one after another; adapters
    of a reward model are added to its weights in float32."""
    sizes = [math.prod(p.shape) for p in models.generator]
    if setup.trains is not None and c.lora.rank:
        if shards.many:
            whole = sum(p.count * rounded(4 * p.values) for p in models.generator)
            return entries([("merged weights", whole, COUNTED, "the reward model with its updates, float32")])
        return entries([("merged weights", 2 * 4 * max(sizes), COUNTED, "one matrix, and its update")])
    whole = 4 * max(sizes) if shards.many else 0
    return entries([("one whole weight", whole, COUNTED, "gathered to be written")])


def on_disk(c: Config, setup: Setup, models: Models, shards: Shards) -> int:
    """Bytes of a checkpoint, of all processes together: weights, states, averaged weights."""
    states = state_bytes(models, c.optim, shards.many).saved * shards.shards
    average = 4 * values(models.trained) * (c.train.ema > 0)
    written = models.trained
    if setup.trains is not None and not shards.many:
        written = models.generator
        if c.lora.rank:  # and all of it in float32, with the updates
            return 4 * values(written) * (1 + (c.train.ema > 0)) + states
    weights = sum(p.count * math.prod(p.shape) * p.dtype.itemsize for p in written)
    return weights + states + average


def of_processes(
    c: Config, setup: Setup, models: Models, gpu: Machine | None, shards: Shards
) -> list[tuple[str, int, str, str]]:
    """Host memory in addition to pinned memory: the process and its loaders, batches on their way, and the
    larger of what a resume reads and what a checkpoint copies."""
    ahead, batch = PREFETCHED * c.data.num_workers, batch_bytes(setup)
    reading, writing = 0, 4 * max(math.prod(p.shape) for p in models.generator)
    if not shards.many and not in_blocks(c.optim, is_narrow(models), shards.many):
        reading = 8 * values(models.trained)
    if shards.many and c.parallel.save_async:
        part = c.lora.rank > 0 or setup.experts is not None
        written = models.trained if part else models.generator
        writing = sum(p.count * p.values * p.dtype.itemsize for p in written)
        writing += state_bytes(models, c.optim, True).saved
        writing += sum(4 * p.count * p.values for p in models.trained) * (c.train.ema > 0)
    elif setup.trains is not None and c.lora.rank and not shards.many:
        writing = 4 * values(models.generator)
    basis = "copies before a checkpoint is written"
    if reading > writing:
        basis = "states as a resume reads them"
    found = [
        ("batches on their way", (ahead + 1) * batch, COUNTED, f"{PREFETCHED} a loader process, and one"),
        ("checkpoints", max(reading, writing), COUNTED, basis),
    ]
    if c.data.keep_gb:
        kept = int(1e9 * c.data.keep_gb) * max(1, c.data.num_workers)
        found.append(("kept samples", kept, COUNTED, "data.keep_gb of each process that reads, at most"))
    if gpu is not None:
        count = c.data.num_workers
        size = PROCESS + count * WORKER
        basis = f"assumed {PROCESS / 1e9:g} GB, and {WORKER / 1e9:g} GB a loader process (0.38 on a CPU)"
        found.append(("processes", size, ESTIMATED, basis))
    return found


def noise_bytes(setup: Setup) -> int:
    """Pinned noise of a micro-batch; two are on their way at a time."""
    return 2 * pinned(4 * math.prod(setup.latent))
