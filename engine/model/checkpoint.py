"""Reading and writing models in the official formats.

Loads are strict (every key, every shape) and safe: safetensors, or torch.load(weights_only=True).
Weights go from the file to their parameter one tensor at a time, so no second copy of a model is
held. Whoever writes a folder does so inside files.atomic_folder.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl_engine.errors import UserError, check
from prfl_engine.inputs import check_file, check_finite, check_float, open_tensors, read_json, read_state
from prfl_engine.model.layers import Linear
from prfl_engine.model.layout import name_layout
from prfl_engine.model.reward import QueryPool, RewardModel
from prfl_engine.model.reward_files import check_steps, find_heads, settle, write_settings
from prfl_engine.model.wan import WanConfig, WanTransformer

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 10 * 2**30
_COMPUTED = {
    torch.float64: torch.float32, torch.float16: torch.float32,
    torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16,
}  # fmt: skip
"""The dtype in which weights are held whose own the kernels do not compute in."""


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trunk: bool = False,
    blocks: int | None = None,
) -> WanTransformer:
    """A Wan transformer from a folder with config.json and one or many native safetensors files.

    dtype None keeps float32, bfloat16 and, in the matrices of layers.Linear, which converts them as it
    computes, float16 and fp8; elsewhere fp8 becomes bfloat16, all others float32. With `trunk` the model is
    the trunk of a reward model: no head, and as many blocks as the files hold (config.json of an official one
    still names all 40), or the first `blocks` of a whole generator, whose other weights are then left unread.
    Raises UserError where a key is missing, unexpected, of the wrong shape or not finite, and for a
    generator in another layout, which it names.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file, want a folder with config.json and safetensors files")
    where = tensor_files(folder)
    shapes = _shapes(where)
    layout = name_layout(shapes)
    if layout is not None:
        raise UserError(f"{folder}: {layout}")
    config = WanConfig.from_json(folder / "config.json")
    held = _blocks(where)
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
        check_blocks(where, folder / "config.json", config.num_layers)
    return build(config, where, folder, dtype, device, held, head=not trunk)


def build(
    config: WanConfig,
    where: dict[str, Path],
    source: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    blocks: int | None = None,
    head: bool = True,
) -> WanTransformer:
    """A transformer of `blocks` blocks (None: all) from tensors of {key: its safetensors file}."""
    shapes = _shapes(where)
    with torch.device("meta"):
        model = WanTransformer(config, blocks, head)
    _compare({k: tuple(v.shape) for k, v in model.state_dict().items()}, shapes, source)
    _assign(model, where, dtype, device)
    return model


def save_transformer(model: WanTransformer, folder: str | Path) -> None:
    """Write config.json and native safetensors (in shards of 10 GiB, with an index) to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.to_json(folder / "config.json")
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for key, value in model.state_dict().items():
        if shards[-1] and value.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = value.detach().contiguous()
        room -= value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{WEIGHTS}.safetensors", {"format": "pt"})
        return
    index = {}
    for i, shard in enumerate(shards, 1):
        name = f"{WEIGHTS}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    total = sum(v.nbytes for shard in shards for v in shard.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(text)


def load_reward(
    folder: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    query_attention: str | Path | None = None,
    mlp: str | Path | None = None,
    num_heads: int | None = None,
    dropout: float = 0.0,
    add_query: bool | None = None,
    feature_layer: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """The reward model from its three official files.

    Either `folder`, which holds the transformer, query_attention*.ckpt and mlp*.ckpt, or the three
    paths. num_heads, add_query and feature_layer None: as reward.json next to the transformer says, or
    without one the official 8, True and 8. The pooling and the MLP keep float32. Raises UserError where
    reward.json says otherwise, and where the files are not of one step.
    """
    if folder is not None:
        transformer = folder
        query_attention, mlp = find_heads(Path(folder))
    check_steps(Path(transformer), Path(query_attention), Path(mlp))
    given = {"num_heads": num_heads, "feature_layer": feature_layer}
    given = {name: value for name, value in given.items() if value is not None}
    if add_query is not None:
        given["return_type"] = "query" if add_query else None
    settings = settle(Path(transformer), given)
    trunk = load_transformer(transformer, dtype, device, trunk=True)
    return with_heads(trunk, query_attention, mlp, **settings, dropout=dropout, device=device)


def with_heads(
    trunk: WanTransformer,
    query_attention: str | Path,
    mlp: str | Path,
    num_heads: int,
    feature_layer: int,
    return_type: str | None,
    dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """The reward model of a trunk and the files of its pooling and MLP. UserError unless they fit."""
    state = read_pooling(query_attention, device)
    with torch.device(device):
        queries, add_query = len(state["queries"]), return_type == "query"
        pool = QueryPool(trunk.config.dim, queries, num_heads, dropout, add_query)
        model = RewardModel(trunk, pool, feature_layer)
    load_strict(pool, state, query_attention)
    load_strict(model.mlp, read_state(mlp, device), mlp)
    return model


def read_heads(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, dict[str, Tensor]]:
    """The state dicts of the pooling and the MLP in the folder of a reward model: {"pool": .., "mlp": ..}."""
    pool, mlp = find_heads(Path(folder))
    return {"pool": read_pooling(pool, device), "mlp": read_state(mlp, device)}


def load_heads(model: RewardModel, folder: str | Path) -> None:
    """Give a reward model the pooling and the MLP of a folder; UserError unless they fit."""
    for part, state in read_heads(folder, model.pool.queries.device).items():
        load_strict(model.get_submodule(part), state, f"{folder}: {part}")


def read_pooling(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state dict of an official query_attention file."""
    state = read_state(path, device)
    if "queries" not in state or state["queries"].dim() != 2:
        raise UserError(f"{path}: got no key 'queries' [n, C], want the official pooling")
    return state


def save_reward(model: RewardModel, folder: str | Path, step: int) -> None:
    """Write the official three files (transformer, query_attention_step_N.ckpt, mlp_step_N.ckpt) and
    reward.json."""
    folder = Path(folder)
    save_transformer(model.transformer, folder)
    torch.save(model.pool.state_dict(), folder / f"query_attention_step_{step}.ckpt")
    torch.save(model.mlp.state_dict(), folder / f"mlp_step_{step}.ckpt")
    write_settings(model, folder, step)


def new_reward(
    transformer: WanTransformer,
    blocks: int,
    num_queries: int = 1,
    num_heads: int = 8,
    dropout: float = 0.0,
    add_query: bool = True,
    feature_layer: int | None = None,
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
    pool = QueryPool(trunk.config.dim, num_queries, num_heads, dropout, add_query)
    return RewardModel(trunk, pool, blocks if feature_layer is None else feature_layer)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """module.load_state_dict with its complaints as one line that names the file."""
    _compare({k: tuple(v.shape) for k, v in module.state_dict().items()},
             {k: tuple(v.shape) for k, v in state.items()}, source)  # fmt: skip
    module.load_state_dict(state)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds which key; any *.safetensors files, sharded or not."""
    index, single = (folder / f"{WEIGHTS}.safetensors{end}" for end in (".index.json", ""))
    if os.path.lexists(single):
        paths = [single]
    elif os.path.lexists(index):
        names = read_json(index, "an index of safetensors files").get("weight_map")
        good = isinstance(names, dict) and all(isinstance(n, str) and "/" not in n for n in names.values())
        if not good:
            raise UserError(f"{index}: not an index, want JSON with a weight_map of file names")
        paths = [folder / name for name in sorted(set(names.values()))]
        for path in paths:
            check_file(path, f"a safetensors file, {index.name} names it")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    where: dict[str, Path] = {}
    for path in paths:
        for key in open_tensors(path).keys():  # noqa: SIM118
            if key in where:
                raise UserError(f"{path}: holds {key}, which {where[key].name} holds too")
            where[key] = path
    if not where:
        raise UserError(f"{folder}: no safetensors file, want native Wan weights")
    return where


def _shapes(where: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors, from the headers of their files; UserError for those that are no numbers."""
    files = {path: open_tensors(path) for path in set(where.values())}
    return {key: check_float(files[path], path, key) for key, path in where.items()}


def check_blocks(keys: Iterable[str], source: Path, blocks: int) -> None:
    """UserError unless tensors of these names are of so many blocks: said before a model is built."""
    held = _blocks(keys)
    check(held == blocks, f"{source}: num_layers", blocks, f"the {held} blocks that the tensors are of")


def _blocks(keys: Iterable[str]) -> int:
    """How many blocks there are, by the largest number."""
    return 1 + max((int(m[1]) for k in keys if (m := re.match(r"blocks\.(\d{1,9})\.", k))), default=-1)


def _assign(model: WanTransformer, where: dict[str, Path], dtype: torch.dtype | None, device) -> None:
    """Replace the meta parameters of the model by the tensors of the files, one at a time."""
    files = {path: open_tensors(path) for path in set(where.values())}
    for key, path in where.items():
        name, _, leaf = key.rpartition(".")
        module, tensor = model.get_submodule(name), files[path].get_tensor(key)
        matrix = type(module) is Linear and leaf == "weight" and tensor.dtype != torch.float64
        to = dtype or (tensor.dtype if matrix else _COMPUTED.get(tensor.dtype, tensor.dtype))
        # copy: a mapped tensor of another one's file must not outlive the file.
        tensor = tensor.to(device, to, copy=True)
        check_finite(tensor, path, key)
        setattr(module, leaf, nn.Parameter(tensor))


def _compare(own: dict[str, tuple], held: dict[str, tuple], source) -> None:
    """UserError unless both have the same keys and shapes."""
    for kind, keys in (("misses", own.keys() - held.keys()), ("has unknown", held.keys() - own.keys())):
        if keys:
            first = sorted(keys)[0]
            raise UserError(f"{source}: {kind} {len(keys)} of {len(own)} keys, such as {first}")
    for key, shape in own.items():
        if held[key] != shape:
            raise UserError(f"{source}: {key} is {list(held[key])}, want {list(shape)}")
