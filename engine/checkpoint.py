"""Reading and writing models in the official formats.

Loads are strict (every key, every shape) and safe: safetensors, or torch.load(weights_only=True).
Weights go from the file to their parameter one tensor at a time, so no second copy of a model is
held. Whoever writes a folder does so inside files.atomic_folder.
"""

import json
import pickle
import re
import struct
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl_engine.dit import WanConfig, WanTransformer
from prfl_engine.errors import UserError
from prfl_engine.files import atomic_folder as atomic_folder  # importable from here too
from prfl_engine.files import checkpoints as checkpoints
from prfl_engine.reward import QueryPool, RewardModel

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 10 * 2**30


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trunk: bool = False,
    blocks: int | None = None,
) -> WanTransformer:
    """A Wan transformer from a folder with config.json and one or many native safetensors files.

    dtype None keeps that of the files. With `trunk` the model is the trunk of a reward model: no
    head, and as many blocks as the files hold (config.json of an official one still names all 40),
    or the first `blocks` of a whole generator, whose other weights are then left unread.
    Raises UserError where a key is missing, unexpected or of the wrong shape.
    """
    folder = Path(folder)
    config = WanConfig.from_json(folder / "config.json")
    where = _tensor_files(folder)
    if trunk:
        held = 1 + max((int(m[1]) for k in where if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
        if held < (blocks or 1):
            raise UserError(f"{folder}: got {held} blocks, want at least {blocks or 1}")
        if blocks is not None:
            cut = re.compile(r"head\.|blocks\.(\d+)\.")
            where = {
                k: f for k, f in where.items()
                if not (m := cut.match(k)) or (m[1] is not None and int(m[1]) < blocks)
            }  # fmt: skip
        blocks = blocks or held
    with torch.device("meta"):
        model = WanTransformer(config, blocks, head=not trunk)
    _assign(model, where, dtype, device, folder)
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
    num_heads: int = 8,
    dropout: float = 0.0,
    add_query: bool = True,
    feature_layer: int = 8,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """The reward model from its three official files.

    Either `folder`, which holds the transformer, query_attention*.ckpt and mlp*.ckpt, or the three
    paths. The pooling and the MLP keep float32.
    """
    if folder is not None:
        transformer = folder
        query_attention = _newest(Path(folder), "query_attention")
        mlp = _newest(Path(folder), "mlp")
    trunk = load_transformer(transformer, dtype, device, trunk=True)
    pool_state = load_pickle(query_attention, device)
    if "queries" not in pool_state or pool_state["queries"].dim() != 2:
        raise UserError(f"{query_attention}: got no key 'queries' [n, C], want the official pooling")
    with torch.device(device):
        pool = QueryPool(
            trunk.config.dim, len(pool_state["queries"]), num_heads, dropout, add_query
        )
        model = RewardModel(trunk, pool, feature_layer)
    load_strict(pool, pool_state, query_attention)
    load_strict(model.mlp, load_pickle(mlp, device), mlp)
    return model


def save_reward(model: RewardModel, folder: str | Path, step: int) -> None:
    """Write the official three files: transformer, query_attention_step_N.ckpt, mlp_step_N.ckpt."""
    folder = Path(folder)
    save_transformer(model.transformer, folder)
    torch.save(model.pool.state_dict(), folder / f"query_attention_step_{step}.ckpt")
    torch.save(model.mlp.state_dict(), folder / f"mlp_step_{step}.ckpt")


def new_reward(
    transformer: WanTransformer,
    blocks: int,
    num_queries: int = 1,
    num_heads: int = 8,
    dropout: float = 0.0,
    add_query: bool = True,
    feature_layer: int = 8,
) -> RewardModel:
    """An untrained reward model on a copy of the first blocks of a generator.

    With `blocks` = all of a trunk read by load_transformer(..., trunk=True) nothing is copied.
    """
    if transformer.head is None and len(transformer.blocks) == blocks:
        trunk = transformer
    else:
        if not 1 <= blocks <= len(transformer.blocks):
            raise UserError(
                f"reward.blocks: got {blocks}, want 1 to the generator's {len(transformer.blocks)}"
            )
        trunk = WanTransformer(replace(transformer.config), blocks, head=False)
        state = transformer.state_dict()
        trunk.load_state_dict({k: state[k] for k in trunk.state_dict()})
    pool = QueryPool(trunk.config.dim, num_queries, num_heads, dropout, add_query)
    return RewardModel(trunk, pool, feature_layer)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """module.load_state_dict with its complaints as one line that names the file."""
    own = module.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{source}: {key} is a {type(value).__name__}, want a tensor")
    _compare({k: tuple(v.shape) for k, v in own.items()},
             {k: tuple(v.shape) for k, v in state.items()}, source)  # fmt: skip
    module.load_state_dict(state)


def load_pickle(
    path: str | Path, device: torch.device | str = "cpu", mmap: bool = False
) -> dict[str, Tensor]:
    """A state dict saved by torch.save, read without executing code; one nested under 'state_dict'
    is unpacked. mmap leaves tensors in the file until they are read, for whoever copies them at once."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, want a saved state dict")
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except (  # what its unpickler raises at files of which a part is missing or changed
        pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError,
        ValueError, TypeError, LookupError, AttributeError,
    ) as error:  # fmt: skip
        reason = (str(error) or "empty file").splitlines()[0]
        raise UserError(f"{path}: not a safe state dict: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{path}: got a {type(state).__name__}, want a state dict")
    return state


def _newest(folder: Path, name: str) -> Path:
    """The file NAME.ckpt or NAME_step_N.ckpt with the largest N."""
    plain = folder / f"{name}.ckpt"
    found = [p for p in folder.glob(f"{name}_step_*.ckpt") if p.stem.rpartition("_")[2].isdigit()]
    if not found and not plain.is_file():
        raise UserError(f"{folder}: got no {name}_step_N.ckpt, want the official reward model files")
    return max(found, key=lambda p: int(p.stem.rpartition("_")[2]), default=plain)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds which key; any *.safetensors files, sharded or not."""
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index, want JSON with a weight_map") from None
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if (folder / f"{WEIGHTS}.safetensors").is_file():
        paths = [folder / f"{WEIGHTS}.safetensors"]
    where: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {index.name} names it")
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118
                if key in where:
                    raise UserError(f"{path}: holds {key}, which {where[key].name} holds too")
                where[key] = path
    if not where:
        raise UserError(f"{folder}: no safetensors file, want native Wan weights")
    return where


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None


def _assign(model, where, dtype, device, source) -> None:
    """Replace the meta parameters of the model by the tensors of the files, one at a time."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    by_file: dict[Path, list[str]] = {}
    for key, path in where.items():
        by_file.setdefault(path, []).append(key)
    files = {path: _open(path) for path in by_file}
    try:
        held = {k: tuple(files[p].get_slice(k).get_shape()) for k, p in where.items()}
        _compare(own, held, source)
        for path, keys in by_file.items():
            for key in keys:
                tensor = files[path].get_tensor(key)
                # clone: a mapped tensor of another one's file must not outlive the file.
                tensor = tensor.to(device, dtype or tensor.dtype, copy=True)
                name, _, leaf = key.rpartition(".")
                setattr(model.get_submodule(name), leaf, nn.Parameter(tensor))
    finally:
        files.clear()


def _compare(own: dict[str, tuple], held: dict[str, tuple], source) -> None:
    """UserError unless both have the same keys and shapes."""
    for kind, keys in (("misses", own.keys() - held.keys()), ("has unknown", held.keys() - own.keys())):
        if keys:
            first = sorted(keys)[0]
            raise UserError(f"{source}: {kind} {len(keys)} of {len(own)} keys, such as {first}")
    for key, shape in own.items():
        if held[key] != shape:
            raise UserError(f"{source}: {key} is {list(held[key])}, want {list(shape)}")
