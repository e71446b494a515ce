"""Reading and writing models in the official formats.

Loads are strict (every key, every shape) and safe: safetensors, or torch.load(weights_only=True).
Weights go from the file to their parameter one tensor at a time, and back, so no second copy of a model is
held. Whoever writes a folder does so inside files.atomic_folder, of several ranks agree.shared_folder.

A sharded model (parallel.shard) is loaded and written by all ranks together, in the same files:
every rank reads its own rows; the first rank writes what is gathered parameter by parameter.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prfl_engine import checksums
from prfl_engine.agree import Agreed, leads
from prfl_engine.errors import UserError
from prfl_engine.inputs import check_finite, read_state
from prfl_engine.model.layers import Linear
from prfl_engine.model.reward import RewardModel, make_pool
from prfl_engine.model.reward_files import find_reward, head_files, settle, write_settings
from prfl_engine.model.sources import WEIGHTS, Stored, check_blocks, count_blocks, find, sharded
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.shards import local, put, reshard, rows, whole
from prfl_engine.tensor_files import divide, in_order, write_divided

SHARD_BYTES = 10 * 2**30
_COMPUTED = {
    torch.float64: torch.float32, torch.float16: torch.float32,
    torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16,
}  # fmt: skip
"""The dtype in which weights are held whose own the kernels do not compute in."""
Shard = Callable[[nn.Module], object]
"""Shards a model, such as lambda model: parallel.shard(model, mesh). It gets a transformer whose parameters
are on the meta device, in their final dtypes. Values of parameters that it adds are left to its caller."""


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trunk: bool = False,
    blocks: int | None = None,
    shard: Shard | None = None,
) -> WanTransformer:
    """A Wan transformer from a folder or a file in any layout that sources.find reads.

    dtype None keeps float32, bfloat16 and, in the matrices of layers.Linear, which converts them as it
    computes, float16 and fp8; elsewhere fp8 becomes bfloat16, all others float32. With `trunk` the model is
    the trunk of a reward model: no head, and as many blocks as the files hold (config.json of an official one
    still names all 40), or the first `blocks` of a whole generator, whose other weights are then left unread.
    With `shard` every rank reads its own rows alone; all ranks load together, and fail together.
    Raises UserError where a key is missing, unexpected, of the wrong shape or not finite, for a file that is
    not as checksums.json says, and for a generator that is not run, which it names.
    """
    source = find(folder)
    if shard is None:
        checksums.check(source.files)
    else:
        with Agreed():  # every rank reads its part of the files
            checksums.check(source.files[dist.get_rank() :: dist.get_world_size()])
    config, where, held = source.config, source.tensors, count_blocks(source.tensors)
    if trunk:
        if held < (blocks or 1):
            raise UserError(f"{folder}: got {held} blocks, want at least {blocks or 1}")
        if blocks is not None:
            cut = re.compile(r"head\.|blocks\.(\d+)\.")
            where = {
                k: f for k, f in where.items()
                if not (m := cut.match(k)) or (m[1] is not None and int(m[1]) < blocks)
            }  # fmt: skip
        held = blocks or held
    else:
        check_blocks(where, f"{source.path}: config.json", config.num_layers)
    return build(config, where, source.path, dtype, device, held, head=not trunk, shard=shard)


def build(
    config: WanConfig,
    where: dict[str, Stored],
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    blocks: int | None = None,
    head: bool = True,
    shard: Shard | None = None,
) -> WanTransformer:
    """A transformer of `blocks` blocks (None: all) from the tensors of these native names; `shard` as
    load_transformer takes it."""
    model = fitting(config, where, source, blocks, head)
    _assign(model, where, dtype, device, shard)
    return model


def fitting(
    config: WanConfig,
    where: dict[str, Stored],
    source: str | Path,
    blocks: int | None = None,
    head: bool = True,
) -> WanTransformer:
    """The transformer without memory (device meta) that tensors are for; UserError unless they fit."""
    with torch.device("meta"):
        model = WanTransformer(config, blocks, head)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    _compare(own, {k: s.shape for k, s in where.items()}, source)
    return model


def save_transformer(
    model: WanTransformer, folder: str | Path, values: dict[str, Tensor] | None = None
) -> None:
    """Write config.json and native safetensors (in shards of 10 GiB, with an index) to `folder`.

    values: what to write in place of the model's parameters, such as ema.average. Of a sharded model all
    ranks call it, the first one writes, and all raise if that fails.
    """
    folder, state = Path(folder), _state(model, values)
    layouts = divide({k: (v.dtype, tuple(v.shape)) for k, v in state.items()}, SHARD_BYTES)
    whole_values = (whole(state[key]) for layout in layouts for key in in_order(layout))
    with _written_by_first(state, whole_values) as first:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            model.config.to_json(folder / "config.json")
            write_divided(folder, WEIGHTS, layouts, whole_values)


def _state(module: nn.Module, values: dict[str, Tensor] | None, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module, with those of `values` that are named after `prefix`."""
    reshard(module)
    values = {} if values is None else values
    return {k: values.get(prefix + k, v).detach() for k, v in module.state_dict().items()}


@contextmanager
def _written_by_first(state: dict[str, Tensor], gathers: Iterator[Tensor]) -> Iterator[bool]:
    """A block that writes `gathers`, which is drawn to its end on every rank where `state` is sharded.

    Gives True to who writes: the first rank, or everyone where nothing is sharded.
    """
    if not any(isinstance(v, DTensor) for v in state.values()):
        yield True
        return
    with Agreed():
        try:
            yield leads()
        finally:
            deque(gathers, maxlen=0)  # the other ranks wait in each of them


def load_reward(
    folder: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    query_attention: str | Path | None = None,
    mlp: str | Path | None = None,
    num_heads: int | None = None,
    dropout: float = 0.0,
    add_query: bool | None = None,
    feature_layer: int | Sequence[int] | None = None,
    pool: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    shard: Shard | None = None,
) -> RewardModel:
    """The reward model from its three official files.

    `folder` holds the transformer, query_attention*.ckpt (unless pool is mean or max) and mlp*.ckpt, those
    aside for which a path is given. num_heads, add_query, feature_layer and pool None: as reward.json next to
    the transformer says, or without one the official 8, True, 8 and query. Of a feature_layer with one entry
    that entry counts. The pooling and the MLP keep float32. With `shard` every rank
    reads its rows of the transformer, and the files of pooling and MLP whole, which have no slices; it is
    called for the transformer, then for the reward model. Raises UserError where reward.json says otherwise,
    and where the files are not of one step.
    """
    transformer = Path(transformer or folder)
    settings, query_attention, mlp = find_reward(
        transformer, query_attention, mlp, num_heads, add_query, feature_layer, pool
    )
    trunk = load_transformer(transformer, dtype, device, trunk=True, shard=shard)
    if mlp is None:
        states, sources = read_heads(transformer, device), heads_of(transformer)
        model = assembled(trunk, states, sources, **settings, dropout=dropout, device=device)
    else:
        model = with_heads(trunk, query_attention, mlp, **settings, dropout=dropout, device=device)
    if shard is not None:
        shard(model)
    return model


def with_heads(
    trunk: WanTransformer,
    query_attention: str | Path | None,
    mlp: str | Path,
    num_heads: int,
    feature_layer: int | Sequence[int],
    return_type: str | None,
    pool: str = "query",
    dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """The reward model of a trunk and the files of its pooling (None: it has no weights) and MLP. UserError
    unless they fit."""
    states = {"mlp": read_state(mlp, device)}
    if pool == "query":
        states["pool"] = read_pooling(query_attention, device)
    sources = {"pool": query_attention, "mlp": mlp}
    return assembled(trunk, states, sources, num_heads, feature_layer, return_type, pool, dropout, device)


def assembled(
    trunk: WanTransformer,
    states: dict[str, dict[str, Tensor]],
    sources: Mapping[str, str | Path | None],
    num_heads: int,
    feature_layer: int | Sequence[int],
    return_type: str | None,
    pool: str = "query",
    dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """The reward model of a trunk and of `states` as read_heads gives them, which messages call `sources`.
    UserError unless they fit."""
    with torch.device(device):
        queries, add_query = len(states.get("pool", {}).get("queries", ())), return_type == "query"
        made = make_pool(pool, trunk.config.dim, queries, num_heads, dropout, add_query)
        model = RewardModel(trunk, made, feature_layer)
    load_strict(made, states.get("pool", {}), sources["pool"])
    load_strict(model.mlp, states["mlp"], sources["mlp"])
    return model


def read_heads(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, dict[str, Tensor]]:
    """The state dicts of the pooling, if it has weights, and of the MLP in the folder of a reward model:
    {"pool": .., "mlp": ..}. UserError as reward_files.head_files has it."""
    folder = Path(folder)
    if sharded(folder) is not None:
        from prfl_engine.model.sharded import heads  # it reads other reward models by this module

        return {part: {k: a.to(device) for k, a in of.items()} for part, of in heads(folder).items()}
    query_attention, mlp = head_files(folder, settle(folder, {})["pool"])
    heads = {"mlp": read_state(mlp, device)}
    if query_attention is not None:
        heads["pool"] = read_pooling(query_attention, device)
    return heads


def heads_of(folder: str | Path) -> dict[str, str]:
    """What messages call the pooling and the MLP of a folder."""
    return {part: f"{folder}: {part}" for part in ("pool", "mlp")}


def load_heads(model: RewardModel, folder: str | Path) -> None:
    """Give a reward model the pooling and the MLP of a folder; UserError unless they fit."""
    for part, state in read_heads(folder, model.mlp.fc1.weight.device).items():
        load_strict(model.get_submodule(part), state, heads_of(folder)[part])


def read_pooling(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state dict of an official query_attention file."""
    state = read_state(path, device)
    if "queries" not in state or state["queries"].dim() != 2:
        raise UserError(f"{path}: got no key 'queries' [n, C], want the official pooling")
    return state


def save_reward(
    model: RewardModel, folder: str | Path, step: int, values: dict[str, Tensor] | None = None
) -> None:
    """Write the official three files (transformer, query_attention_step_N.ckpt, mlp_step_N.ckpt) and
    reward.json; values and sharded models as save_transformer takes them."""
    folder, values = Path(folder), {} if values is None else values
    inner = {k.removeprefix("transformer."): v for k, v in values.items() if k.startswith("transformer.")}
    save_transformer(model.transformer, folder, inner)
    write_heads(model, folder, step, values)


def write_heads(
    model: RewardModel, folder: Path, step: int, values: dict[str, Tensor] | None = None
) -> None:
    """Write the pooling, the MLP and reward.json of a reward model, as save_reward does."""
    values = {} if values is None else values
    for part, name in (("pool", "query_attention"), ("mlp", "mlp")):
        state = _state(model.get_submodule(part), values, f"{part}.")
        if not state:  # a pooling without queries
            continue
        gathers = (whole(v) for v in state.values())
        with _written_by_first(state, gathers) as first:
            if first:
                held = dict(zip(state, gathers, strict=False))
                torch.save(held, folder / f"{name}_step_{step}.ckpt")
    if leads() or not isinstance(next(model.parameters()), DTensor):
        write_settings(model, folder, step)


def new_reward(
    transformer: WanTransformer,
    blocks: int,
    num_queries: int = 1,
    num_heads: int = 8,
    dropout: float = 0.0,
    add_query: bool = True,
    feature_layer: int | Sequence[int] | None = None,
    pool: str = "query",
) -> RewardModel:
    """An untrained reward model on a copy of the first blocks of a generator; feature_layer None: the last.

    With `blocks` = all of a trunk read by load_transformer(..., trunk=True) nothing is copied.
    """
    if transformer.head is None and len(transformer.blocks) == blocks:
        trunk = transformer
    else:
        if not 1 <= blocks <= len(transformer.blocks):
            raise UserError(
                f"reward.blocks: got {blocks}, want 1 to the generator's {len(transformer.blocks)}"
            )
        trunk = WanTransformer(transformer.config, blocks, head=False)
        state = transformer.state_dict()
        trunk.load_state_dict({k: state[k] for k in trunk.state_dict()})
    made = make_pool(pool, trunk.config.dim, num_queries, num_heads, dropout, add_query)
    return RewardModel(trunk, made, blocks if feature_layer is None else feature_layer)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """module.load_state_dict with its complaints as one line that names the file."""
    _compare({k: tuple(v.shape) for k, v in module.state_dict().items()},
             {k: tuple(v.shape) for k, v in state.items()}, source)  # fmt: skip
    reshard(module)
    with torch.no_grad():
        for key, own in module.state_dict().items():
            put(own, state[key])


def _assign(model: WanTransformer, where: dict[str, Stored], dtype, device, shard: Shard | None) -> None:
    """Give the meta parameters of the model the tensors of the files, one at a time."""
    for key, source in where.items():
        name, _, leaf = key.rpartition(".")
        module, held = model.get_submodule(name), source.dtype
        matrix = type(module) is Linear and leaf == "weight" and held != torch.float64
        to = dtype or (held if matrix else _COMPUTED.get(held, held))
        empty = torch.empty(source.shape, dtype=to, device=device if shard is None else "meta")
        setattr(module, leaf, nn.Parameter(empty))
    if shard is not None:
        shard(model)
        model.to_empty(device=device)
    own = model.state_dict()
    with nullcontext() if shard is None else Agreed(), torch.no_grad():
        for key, source in where.items():
            here = local(own[key])
            if here.numel():
                here.copy_(source.values[rows(own[key])])
                check_finite(here, source.path, source.key)


def _compare(own: dict[str, tuple], held: dict[str, tuple], source) -> None:
    """UserError unless both have the same keys and shapes."""
    for kind, keys in (("misses", own.keys() - held.keys()), ("has unknown", held.keys() - own.keys())):
        if keys:
            first = sorted(keys)[0]
            raise UserError(f"{source}: {kind} {len(keys)} of {len(own)} keys, such as {first}")
    for key, shape in own.items():
        if held[key] != shape:
            raise UserError(f"{source}: {key} is {list(held[key])}, want {list(shape)}")
