"""What test_sharded_checkpoints.py runs on every rank."""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import random_batch, rows, tiny_config, tiny_model
from shard_cases import mesh_of, sft

from prfl_engine.agree import shared_folder
from prfl_engine.checkpoint_shards import load_sharded, save_sharded
from prfl_engine.config import OptimConfig
from prfl_engine.optim import block_adamw
from prfl_engine.optim.optimizer import EMA, make_optimizer, update
from prfl_engine.optim.shards import reshard
from prfl_engine.parallel import shard

SIZES = dict(dim=256, num_heads=4, ffn_dim=256, num_layers=1)  # rows of 256: moments in 8 bits
MODES = {
    "plain": ({}, torch.float32),
    "bits": ({"name": "adamw8bit", "rounding": "master"}, torch.bfloat16),
    "host": ({"offload": "states", "rounding": "stochastic"}, torch.bfloat16),
}


class Trained:
    """A sharded model, its optimizer and its average, after some steps. Blocks are small, and of another size
    in every world."""

    def __init__(self, mode: str, replicate: int = 1, steps: int = 0):
        settings, dtype = MODES[mode]
        block_adamw.BLOCK = 256 * (8 + dist.get_world_size())
        self.model = shard(tiny_model(tiny_config(**SIZES), seed=steps).to(dtype), mesh_of(replicate))
        self.optimizer = make_optimizer([(self.model, 1e-3)], OptimConfig(**settings))
        self.ema = EMA(self.model, 0.5)
        self.step(steps)

    def step(self, steps: int) -> None:
        torch.manual_seed(0)
        batch, noise = random_batch(tiny_config(**SIZES), 4), torch.randn(4, 16, 1, 4, 4)
        mine, sigma = slice(dist.get_rank(), dist.get_rank() + 1), torch.tensor([0.3, 0.8, 0.5, 0.6])
        for _ in range(steps):
            sft(self.model, (rows(batch, mine), noise[mine], sigma[mine]), mine)
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
    with shared_folder(Path(folder)) as place:
        save_sharded(place, *run.parts)
    return run.digests()


def pass_on(source: str, folder: str, mode: str, replicate: int = 1) -> dict[str, str]:
    """Load, and save again; the digests."""
    run = Trained(mode, replicate)
    load_sharded(Path(source), *run.parts)
    with shared_folder(Path(folder)) as place:
        save_sharded(place, *run.parts)
    run.model.train()
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
    """(was the folder there before all had been written, after?, digests at the save, digests loaded) of a
    save during which training goes on."""
    group, run, stack = dist.new_group(backend="gloo"), Trained(mode, steps=2), ExitStack()
    before, path = run.digests(), Path(folder)
    place = stack.enter_context(shared_folder(path, group))
    hold = place / "hold"

    def then():
        stack.close()

    saving = save_sharded(place, *run.parts, background=group, then=then)
    early = path.exists()
    run.step(1)
    with stack:
        saving.wait()
    assert not hold.exists() and saving.done()
    changed = run.digests()
    other = Trained(mode)
    load_sharded(path, *other.parts)
    assert changed != before
    return early, path.exists(), before, other.digests()
