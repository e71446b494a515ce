"""What test_sharded_checkpoints.py runs on every rank."""

import errno
import hashlib
import json
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from unittest import mock

import torch
import torch.distributed as dist
from helpers import random_batch, rows, tiny_config, tiny_model, tiny_reward
from ranks import LIMIT
from shard_cases import mesh_of
from torch.distributed.tensor import DTensor

from prfl_engine import agree, tensor_files
from prfl_engine.agree import gathered, patiently, shared_folder, watched_groups
from prfl_engine.checkpoint_shards import load_sharded, save_sharded
from prfl_engine.config import LoraConfig, OptimConfig
from prfl_engine.errors import TrainingError, UserError
from prfl_engine.model import checkpoint, lora, sources
from prfl_engine.model.checkpoint import load_reward, load_transformer, save_reward, save_transformer
from prfl_engine.objectives import sft_loss
from prfl_engine.optim import block_adamw
from prfl_engine.optim.optimizer import EMA, make_optimizer, update
from prfl_engine.parallel import shard
from prfl_engine.shards import reshard

SIZES = dict(dim=256, num_heads=4, ffn_dim=256, num_layers=1)  # rows of 256: moments in 8 bits
MODES = {
    "plain": ({}, torch.float32),
    "bits": ({"name": "adamw8bit", "rounding": "master", "offload": "states"}, torch.bfloat16),
}


class Trained:
    """A sharded model, its optimizer and its average, after some steps. Blocks are small, and of another size
    in every world."""

    def __init__(self, mode: str, replicate: int = 1, steps: int = 0):
        settings, dtype = MODES[mode]
        block_adamw.BLOCK = 256 * (32 + dist.get_world_size())
        self.model = shard(tiny_model(tiny_config(**SIZES), seed=steps).to(dtype), mesh_of(replicate))
        self.optimizer = make_optimizer([(self.model, 1e-3)], OptimConfig(**settings))
        self.ema = EMA(self.model, 0.5)
        self.step(steps)

    def loss(self) -> torch.Tensor:
        torch.manual_seed(0)
        batch, noise = random_batch(tiny_config(**SIZES), 4), torch.randn(4, 16, 1, 4, 4)
        mine, sigma = slice(dist.get_rank(), dist.get_rank() + 1), torch.tensor([0.3, 0.8, 0.5, 0.6])
        return sft_loss(self.model, rows(batch, mine), noise[mine], sigma[mine]).mean()

    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.loss().backward()
            update(self.optimizer, 1.0)
            self.ema.update()

    @property
    def parts(self):
        return self.model, self.optimizer, self.ema

    def digests(self) -> dict[str, str]:
        """A digest of every whole tensor, put together from the ranks in their order."""
        reshard(self.model)
        names = {p: name for name, p in self.model.named_parameters()}
        found = {f"model/{name}": p.full_tensor() for p, name in names.items()}
        found |= {f"ema/{name}": a.full_tensor() for name, a in self.ema.average.items()}
        for p, state in self.optimizer.state.items():
            found[f"{names[p]}/step"] = state["step"]
            for key in state["blocks"][0]:
                mine = torch.cat([block[key] for block in state["blocks"]])
                group = p.device_mesh.get_group(p.placements[-1].is_shard() and p.device_mesh.ndim - 1)
                parts = [None] * dist.get_world_size(group)
                dist.all_gather_object(parts, mine, group)
                found[f"{names[p]}/{key}"] = torch.cat(parts)
        made = {
            k: f"{a.dtype} {a.numel()} {hashlib.sha1(a.reshape(-1).view(torch.uint8).numpy()).hexdigest()}"
            for k, a in ((k, a.detach().contiguous()) for k, a in found.items())
        }
        return made | {"updates": str([g["updates"] for g in self.optimizer.param_groups])}


def write(folder: str, mode: str, replicate: int = 1) -> dict[str, str]:
    """Train two steps and save; the digests."""
    run = Trained(mode, replicate, steps=2)
    with torch.no_grad():
        run.loss()  # leaves the weights of the root gathered
    with shared_folder(Path(folder)) as place:
        save_sharded(place, *run.parts)
    return run.digests()


def pass_on(source: str, folder: str, mode: str, replicate: int = 1) -> dict[str, str]:
    """Load, and save again; the digests."""
    run = Trained(mode, replicate)
    load_sharded(Path(source), *run.parts)
    with shared_folder(Path(folder)) as place:
        save_sharded(place, *run.parts)
    return run.digests()


def same_steps(folder: str, mode: str) -> bool:
    """Whether the steps after a load are those after the save."""
    run, other = Trained(mode, steps=2), Trained(mode)
    with shared_folder(Path(folder)) as place:
        save_sharded(place, *run.parts)
    load_sharded(Path(folder), *other.parts)
    run.step(2)
    other.step(2)
    return run.digests() == other.digests()


def in_background(folder: str, mode: str) -> tuple[bool, bool, dict, dict]:
    """(was the folder there while training went on?, after?, digests at the save, those loaded)."""
    group, run, stack = dist.new_group(backend="gloo"), Trained(mode, steps=2), ExitStack()
    before, path = run.digests(), Path(folder)
    place = stack.enter_context(shared_folder(path, group))
    go = Event()

    def then(sums):
        go.wait()
        stack.close()

    saving = save_sharded(place, *run.parts, background=group, then=then)
    run.step(1)
    early = path.exists() or saving.done()
    go.set()
    with stack:
        saving.wait()
    changed = run.digests()
    other = Trained(mode)
    load_sharded(path, *other.parts)
    assert changed != before
    return early, path.exists(), before, other.digests()


class Counted:
    """A safetensors file that counts the bytes that are read of it."""

    total = 0

    def __init__(self, file):
        self.file = file

    def keys(self):
        return self.file.keys()

    def get_slice(self, key):
        return CountedSlice(self.file.get_slice(key))


class CountedSlice:
    def __init__(self, source):
        self.get_shape, self.get_dtype, self.source = source.get_shape, source.get_dtype, source

    def __getitem__(self, index):
        found = self.source[index]
        Counted.total += found.nbytes
        return found


def load(kind: str, folder: str, dtype) -> tuple[bool, int]:
    """(equal to the model that one process loads?, bytes that this rank has read of the transformer)."""
    mesh, original = mesh_of(1), sources.open_tensors
    read = load_reward if kind == "reward" else load_transformer
    want = read(folder, dtype=dtype)
    sources.open_tensors, Counted.total = lambda path: Counted(original(path)), 0
    try:
        model = read(folder, dtype=dtype, shard=lambda model: shard(model, mesh))
    finally:
        sources.open_tensors = original
    own, whole = dict(model.named_parameters()), dict(want.named_parameters())
    same = [isinstance(own[k], DTensor) and own[k].dtype == p.dtype for k, p in whole.items()]
    same += [torch.equal(own[k].full_tensor(), p) for k, p in whole.items()]
    return own.keys() == whole.keys() and all(same), Counted.total


def refused_load(folder: str) -> tuple[str, int]:
    """(what a rank says, bytes that it has read before)."""
    mesh, original = mesh_of(1), sources.open_tensors
    sources.open_tensors, Counted.total = lambda path: Counted(original(path)), 0
    try:
        load_transformer(folder, shard=lambda model: shard(model, mesh))
    except UserError as error:
        return str(error), Counted.total
    finally:
        sources.open_tensors = original
    return "loaded", Counted.total


def refused_read(folder: str, mode: str) -> tuple[str, bool]:
    """(what a rank says of a checkpoint, whether everything is as it was)."""
    run = Trained(mode)
    before = run.digests()
    try:
        load_sharded(Path(folder), *run.parts)
    except UserError as error:
        return str(error), run.digests() == before
    return "loaded", False


def export(kind: str, folder: str, size: int) -> None:
    """Write a sharded model, in files of that size, and twice its weights as its average."""
    model = tiny_reward(blocks=2) if kind == "reward" else tiny_model(tiny_config(kind))
    save = partial(save_reward, step=7) if kind == "reward" else save_transformer
    ema = EMA(shard(model, mesh_of(1)), 0.5)
    for a in ema.average.values():
        a.mul_(2)
    usual, checkpoint.SHARD_BYTES = checkpoint.SHARD_BYTES, size
    try:
        save(model, f"{folder}/now")
        save(model, f"{folder}/ema", values=ema.average)
    finally:
        checkpoint.SHARD_BYTES = usual


def adapter(base: str, folder: str, given: str) -> list[str]:
    """Load a sharded generator with an adapter, write the adapter, and what is trained; the names of that."""
    config = LoraConfig(rank=2, path=str(given))

    def make(model):
        lora.start(model, config, 0, None)
        return shard(model, mesh_of(1))

    model = load_transformer(base, shard=make)
    lora.start(model, config, 0, None)
    lora.save(model, Path(folder) / "made")
    optimizer = make_optimizer([(model, 1e-3)], OptimConfig())
    with shared_folder(Path(folder) / "sharded") as place:
        save_sharded(place, model, optimizer, trained=True)
    for p in lora.parameters(model).values():
        p.detach().zero_()
    load_sharded(Path(folder) / "sharded", model, optimizer, trained=True)
    lora.save(model, Path(folder) / "again")
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())
    return sorted(json.loads((Path(folder) / "sharded/shards.json").read_text())["tensors"])


def broken_export(folder: str, kind: str) -> str:
    """What a rank says of an export for which the first rank finds no room."""
    model = shard(tiny_reward() if kind == "reward" else tiny_model(), mesh_of(1))
    try:
        with shared_folder(Path(folder) / "made") as place, disk_full(dist.get_rank() == 0):
            save_reward(model, place, 7) if kind == "reward" else save_transformer(model, place)
    except (OSError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


@contextmanager
def disk_full(here: bool):
    """Here writing a file of tensors ends after some of it."""

    class Full:
        def __init__(self, path, mode):
            self.file, self.left = open(path, mode), 5  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def tell(self):
            return self.file.tell()

    tensor_files.open = Full if here else open
    try:
        yield
    finally:
        del tensor_files.open


def broken_save(folder: str, last: bool, background: bool) -> tuple[str, list[str]]:
    """What a rank says of a save for which the last rank finds no room, and what is left in the folder."""
    run, out, stack = Trained("plain"), Path(folder), ExitStack()
    group = dist.new_group(backend="gloo") if background else None
    full = last and dist.get_rank() == dist.get_world_size() - 1
    try:
        with disk_full(full), stack:
            place = stack.enter_context(shared_folder(out / "made", group))
            then = (lambda sums: stack.close()) if background else None
            save_sharded(place, *run.parts, background=group, then=then).wait()
    except (OSError, TrainingError) as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "saved"
    dist.barrier()
    return said, sorted(p.name for p in out.iterdir())


def slow_work(rounds: int) -> list[str]:
    """What a rank has done and says where the last one works until the ranks have asked for each other so
    many times, each within the time-out, and then fails."""
    said, asked, enough = [], [], Event()
    slow = dist.get_rank() == dist.get_world_size() - 1

    def asks(*given):
        asked.append(given)
        if len(asked) == rounds:
            enough.set()
        return gathered(*given)

    def works() -> None:
        if slow:
            enough.wait()
        said.append("waited" if slow else "worked")

    def fails() -> None:
        if slow:
            raise OSError("full")

    with watched_groups(1, timedelta(seconds=LIMIT)) as (group,), mock.patch.object(agree, "gathered", asks):
        patiently(works, group)
        try:
            patiently(fails, group)
        except (OSError, TrainingError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def stalled(limit: float) -> tuple[str, ...]:
    """What a rank says of the last one, which comes when the others have given up, and then of the first."""
    said, last = [], dist.get_world_size() - 1
    for late in (last, 0):
        with watched_groups(1, timedelta(seconds=limit)) as (group,):
            if dist.get_rank() == late:
                dist.barrier()
            try:
                said.append(str(gathered(0, group)))
            except TrainingError as error:
                said.append(str(error))
            if dist.get_rank() != late:
                dist.barrier()
        dist.barrier()
    return tuple(said)
