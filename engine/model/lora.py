"""LoRA: low-rank updates of linear layers, trained in place of the weights.

    y = W x + b + (alpha / r) B A x          W [N, K] frozen, A [r, K], B [N, r] in float32

Every layers.Linear of a transformer can have one. In self-attention and FFN, A and B go into the fused
sublayers: two more thin products, no gradient of W, and nothing saved that a trained W would not save
(prfl_kernels.sublayers.products). B starts at zero, A as PEFT draws it. All other parameters, modulation
and norms included, are frozen. Source: Hu et al. 2021, arXiv 2106.09685. Files: prfl_engine.model.lora_files.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prfl_engine.agree import Agreed, leads
from prfl_engine.config import LoraConfig
from prfl_engine.errors import UserError, check
from prfl_engine.files import atomic_folder
from prfl_engine.inputs import check_new
from prfl_engine.model.checkpoint import load_transformer, save_transformer
from prfl_engine.model.layers import Linear
from prfl_engine.model.lora_files import read, write_peft, write_shared
from prfl_engine.model.wan import WanTransformer
from prfl_engine.seeds import Purpose, torch_seed
from prfl_engine.shards import local, put, reshard, whole
from prfl_kernels.sublayers.products import LowRank

PARTS = ("lora_A", "lora_B")


def linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, Linear]:
    """The linear layers whose name is a target or ends with one after a dot, as PEFT matches them.

    UserError for a target that no layer has.
    """
    found: dict[str, Linear] = {}
    for target in targets:
        hits = {
            name: m for name, m in model.named_modules()
            if isinstance(m, Linear) and (name == target or name.endswith(f".{target}"))
        }  # fmt: skip
        if not hits:
            raise UserError(f"lora.targets: got {target!r}, want the end of a linear layer's name")
        found |= hits
    return found


def attach(model: WanTransformer, config: LoraConfig, seed: int = 0) -> WanTransformer:
    """Freeze the model and give the layers of lora.targets their updates, which are zero. Returns it."""
    i2v_only = set() if model.config.clip else {"k_img", "v_img"}
    layers = linears(model, tuple(t for t in config.targets if t not in i2v_only))
    for name, m in layers.items():
        most = max(m.in_features, m.out_features)
        check(config.rank <= most, "lora.rank", config.rank, f"at most {most}, the width of {name}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(torch_seed(Purpose.LORA, seed))
    for m in layers.values():
        bound = 1 / math.sqrt(m.in_features)  # PEFT: kaiming_uniform_ with a = sqrt(5)
        drawn = torch.rand(config.rank, m.in_features, generator=generator, device="cpu")
        up = torch.zeros(m.out_features, config.rank, device="cpu")
        scale = (config.rank if config.alpha is None else config.alpha) / config.rank
        _set(m, LowRank((2 * drawn - 1) * bound, up, scale))
    return model


def _set(m: Linear, low: LowRank) -> None:
    """Give a layer an update, in float32 on the device of its weight; a sharded one gets its rows of it."""
    if isinstance(m.lora_A, DTensor):
        for own, value in ((m.lora_A, low.down), (m.lora_B, low.up)):
            put(own.detach(), value)
            own.requires_grad_(True)
        m.lora_scale = low.scale
        return
    down, up = (a.to(m.weight.device, torch.float32) for a in low[:2])
    m.lora_A, m.lora_B, m.lora_scale = nn.Parameter(down), nn.Parameter(up), low.scale


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer by their names in the model."""
    return {k: p for k, p in model.named_parameters() if k.rpartition(".")[2] in ("lora_A", "lora_B")}


def updates(model: nn.Module) -> dict[str, LowRank]:
    """The update of every layer that has one."""
    return {name: m.low for name, m in _attached(model).items()}


def named(updates: dict[str, LowRank]) -> dict[str, Tensor]:
    """The A and B that `read` gives under the names of `parameters`."""
    return {f"{k}.{part}": a for k, low in updates.items() for part, a in zip(PARTS, low[:2], strict=True)}


def save(model: WanTransformer, folder: Path, values: dict[str, Tensor] | None = None) -> None:
    """Write the adapter as PEFT does, and as ComfyUI and diffusers read it.

    values: what to write in place of A and B, by their names in the model. Of a sharded model all ranks call
    it, the first one writes, and all raise if that fails.
    """
    write(model, folder, values, write_peft, write_shared)


def write(model: nn.Module, folder: Path, values: dict[str, Tensor] | None, *writers: Callable) -> None:
    """`save` by these of lora_files' writers alone."""
    found = {
        name: LowRank(*(whole(a) for a in low[:2]), low.scale) for name, low in _valued(model, values).items()
    }
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    with Agreed() if sharded else nullcontext():
        if leads() or not sharded:
            for writer in writers:
                writer(found, folder)


def _valued(model: nn.Module, values: dict[str, Tensor] | None) -> dict[str, LowRank]:
    """The updates of a model, sharded as they are, with `values` in place of A and B by their names."""
    values, found = {} if values is None else values, {}
    for name, low in updates(model).items():
        parts = (values.get(f"{name}.{part}", a) for part, a in zip(PARTS, low[:2], strict=True))
        found[name] = LowRank(*(a.detach() for a in parts), low.scale)
    return found


def start(model: WanTransformer, config: LoraConfig, seed: int, resume: Path | None) -> None:
    """Attach updates with the values of the adapter `resume`, or else of lora.path, or else zero.

    With load_transformer(..., shard=...) it is called twice: by `shard`, before the model is sharded, and for
    the values after the load.
    """
    adapter = resume or config.path
    # What is sharded is attached, with the ranks of its adapter.
    if adapter is None or not any(isinstance(p, DTensor) for p in model.parameters()):
        attach(model, config, seed)
    if adapter is not None:
        load(model, adapter)


def check_path(config: LoraConfig) -> None:
    """UserError for an adapter that a training would not use."""
    check(
        config.rank > 0 or config.path is None, "lora.path", config.path,
        "null with lora.rank 0, which trains the weights (prfl merge-lora adds an adapter to them)",
    )  # fmt: skip


def load(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Set the updates of an attached model to those of an adapter. Returns the model.

    UserError unless both have the same layers, shapes and scales; but layers that the adapter's patterns name
    get its ranks and scales.
    """
    updates, own = read(path)
    attached = _attached(model)
    if updates.keys() != attached.keys():
        name = min(updates.keys() ^ attached.keys())
        side = "has an update that lora.targets does not name" if name in updates else "has no update"
        raise UserError(f"{path}: {name} {side}")
    for name, m in attached.items():
        down, up, scale = updates[name]
        rank = len(down if name in own else m.lora_A)
        got, want = [tuple(down.shape), tuple(up.shape)], [(rank, m.in_features), (m.out_features, rank)]
        if got != want:
            raise UserError(f"{path}: {name} has A {got[0]} and B {got[1]}, want {want[0]} and {want[1]}")
        if name not in own and not math.isclose(scale, m.lora_scale, rel_tol=1e-6):
            raise UserError(f"{path}: alpha / r is {scale:g}, want {m.lora_scale:g} (lora.alpha, lora.rank)")
        _set(m, updates[name] if name in own else LowRank(down, up, m.lora_scale))
    return model


def apply(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Freeze the model and give it the updates of an adapter, whatever its layers and ranks. Returns it."""
    updates, _ = read(path)
    model.requires_grad_(False)
    for name, m in _updated(model, updates, path).items():
        _set(m, updates[name])
    return model


def lend(model: WanTransformer, path: str | Path) -> None:
    """Give the layers that an adapter names its updates for rollouts, whatever their ranks: frozen, in the
    dtypes that the layers compute in, whole on every rank. They are no parameters: no checkpoint holds them,
    and outside of `with lent(model)` nothing computes with them."""
    updates, _ = read(path)
    for name, m in _updated(model, updates, path).items():
        factors = (a.to(m.weight.device, m.dtype) for a in updates[name].factors(torch.float32))
        m.lent = LowRank(*factors, 1.0)


@contextmanager
def lent(*models: nn.Module) -> Iterator[None]:
    """Inside a with block models compute with the updates that `lend` has given them, too. Without gradient
    alone: a backward would compute without them."""
    layers = [m for model in models for m in model.modules() if isinstance(m, Linear) and m.lent is not None]
    for m in layers:
        m.lent_on = True
    try:
        yield
    finally:
        for m in layers:
            m.lent_on = False


def _attached(model: nn.Module) -> dict[str, Linear]:
    """The layers with updates."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.low is not None}


@torch.no_grad()
def merge(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Add the updates of an adapter to the weights, in float32. Returns the model.

    UserError for an update of a layer that the model lacks or of another shape.
    """
    return _merge(model, read(path)[0], path)


def _merge(model: WanTransformer, updates: dict[str, LowRank], path: str | Path) -> WanTransformer:
    for name, m in _updated(model, updates, path).items():
        m.weight.copy_(_sum(m.weight, updates[name]))
    return model


def _updated(model: WanTransformer, updates: dict[str, LowRank], path: str | Path) -> dict[str, Linear]:
    """The layers that updates are for; UserError where the model lacks one, or has it in another shape."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    for name, low in updates.items():
        if name not in layers:
            raise UserError(f"{path}: {name} is no linear layer of the model")
        got, want = [len(low.up), low.down.shape[1]], list(layers[name].weight.shape)
        if got != want:
            raise UserError(f"{path}: {name} updates {got}, want {want}")
    return {name: layers[name] for name in updates}


def _sum(weight: Tensor, low: LowRank) -> Tensor:
    """The float32 weight with its update; of sharded ones the rows of a rank, by the same rows of B."""
    down, up = (a.to(weight.device, torch.float32) for a in (whole(low.down), local(low.up)))
    made = weight.detach().to(torch.float32, copy=True)
    local(made).addmm_(up, down, alpha=low.scale)
    return made


@contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Inside a with block the model computes without the updates that are trained. No backward may run there,
    which would recompute the forwards of others without them."""
    layers = [m for m in _attached(model).values() if m.lora_A.requires_grad]
    for m in layers:
        m.left_out = True
    try:
        yield
    finally:
        for m in layers:
            m.left_out = False


@contextmanager
@torch.no_grad()
def merged(model: WanTransformer, values: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Inside a with block the model's parameters are in float32, with the updates in the weights, and on the
    CPU unless they are sharded; after it they are what they were, the same objects. values as `save` takes
    them."""
    reshard(model)
    before = [(m, dict(m.named_parameters(recurse=False))) for m in model.modules()]
    lows = {model.get_submodule(name): low for name, low in _valued(model, values).items()}
    for m, own in before:
        weights = {name: p for name, p in own.items() if name not in PARTS}
        if m in lows:
            weights["weight"] = _sum(m.weight, lows[m])
            m.lora_A = m.lora_B = None
        for name, a in weights.items():
            a = a.detach().float() if isinstance(a, DTensor) else a.detach().to("cpu", torch.float32)
            setattr(m, name, nn.Parameter(a, requires_grad=False))
    try:
        yield
    finally:
        for m, own in before:
            for name, p in own.items():
                setattr(m, name, p)


@torch.no_grad()
def merge_folders(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the generator at `base`, native, with an adapter merged to `out`, which must not exist yet; in
    float32, since most of an update is below the last bit of a bfloat16 weight.

    UserError for values that are not finite, too; then nothing is written.
    """
    out = check_new(out, "--out")
    updates, _ = read(adapter)
    model = _merge(load_transformer(base, torch.float32), updates, adapter)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{base}: {name} has values that are not finite")
    with atomic_folder(out) as folder:
        save_transformer(model, folder)
