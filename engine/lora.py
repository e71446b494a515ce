"""LoRA: low-rank updates of linear layers, trained in place of the weights, in the files of PEFT.

    y = W x + b + (alpha / r) B A x          W [N, K] frozen, A [r, K], B [N, r] in float32

Every layers.Linear of a transformer can have one. In self-attention and FFN, A and B go into the fused
branches: two thin products more, no gradient of W, and nothing kept that a trained W would not keep
(prfl_kernels.branch). B begins as zero, A as PEFT draws it. All other parameters, modulation and norms
included, are frozen. Source: Hu et al. 2021, arXiv 2106.09685.

Files: adapter_config.json and adapter_model.safetensors of PEFT, or the bare safetensors file that
HY-Video-PRFL writes (alpha = r); keys base_model.model.MODULE.lora_A.weight, or diffusion_model.MODULE....
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prfl_engine.checkpoint import atomic_folder, load_transformer, save_transformer
from prfl_engine.config import LoraConfig
from prfl_engine.dit import WanTransformer
from prfl_engine.errors import UserError
from prfl_engine.layers import Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BARE = "pytorch_lora_transformers_weights.safetensors"
_KEY = re.compile(
    r"(?:base_model\.model\.|diffusion_model\.|transformer\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight"
)
# What PEFT's configuration may hold that changes the arithmetic.
_PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none"} | {
    "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip


def linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, Linear]:
    """The linear layers whose name is a target or ends with one behind a dot, as PEFT matches them.

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
    i2v_only = set() if model.config.image else {"k_img", "v_img"}
    layers = linears(model, tuple(t for t in config.targets if t not in i2v_only))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for m in layers.values():
        bound = 1 / math.sqrt(m.in_features)  # PEFT: kaiming_uniform_ with a = sqrt(5)
        down = (2 * torch.rand(config.rank, m.in_features, generator=generator) - 1) * bound
        _set(m, down.to(m.weight.device), m.weight.new_zeros(m.out_features, config.rank).float())
        m.lora_scale = (config.rank if config.alpha is None else config.alpha) / config.rank
    return model


def _set(m: Linear, down: Tensor, up: Tensor) -> None:
    m.lora_A, m.lora_B = nn.Parameter(down), nn.Parameter(up)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer by their names in the model."""
    return {k: p for k, p in model.named_parameters() if k.rpartition(".")[2] in ("lora_A", "lora_B")}


def named(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What `read` gives under the names of `parameters`."""
    parts = "lora_A", "lora_B"
    return {f"{k}.{part}": a for k, pair in pairs.items() for part, a in zip(parts, pair, strict=True)}


def save(model: WanTransformer, folder: Path) -> None:
    """Write the adapter as PEFT does."""
    held = {k: p.detach() for k, p in parameters(model).items()}
    layers = {k.rpartition(".")[0]: model.get_submodule(k.rpartition(".")[0]) for k in held}
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    values = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": rank, "lora_alpha": first.lora_scale * rank, "lora_dropout": 0.0, "init_lora_weights": True,
        "target_modules": sorted(layers), "use_rslora": False, **_PLAIN,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    tensors = {f"base_model.model.{k}.weight": a.float().contiguous() for k, a in held.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def read(path: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """({module: (A, B)}, alpha / r) of an adapter: a folder as PEFT writes it, or a bare safetensors file.

    UserError where the file is not an adapter, or one whose arithmetic is not that above.
    """
    path = Path(path)
    file = next((f for f in (path / WEIGHTS, path / BARE) if f.is_file()), path)
    if not file.is_file():
        raise UserError(f"{path}: no adapter there, want a folder with {WEIGHTS}, or a safetensors file")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not safetensors: {' '.join(str(error).split())}") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, a in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or a.dim() != 2:
            shape = list(a.shape)
            raise UserError(f"{file}: {key} {shape}, want MODULE.lora_A.weight or .lora_B.weight, 2-d")
        parts.setdefault(match[1], {})[match[2]] = a.float()
    for name, pair in parts.items():
        if len(pair) < 2 or len(pair["lora_A"]) != pair["lora_B"].shape[1]:
            held = {k: list(a.shape) for k, a in sorted(pair.items())}
            raise UserError(f"{file}: {name} has {held}, want lora_A [r, in] and lora_B [out, r]")
    ranks = {len(pair["lora_A"]) for pair in parts.values()}
    if len(ranks) != 1:
        raise UserError(f"{file}: got ranks {sorted(ranks)}, want one")
    return {k: (p["lora_A"], p["lora_B"]) for k, p in parts.items()}, _scale(file.parent / CONFIG, *ranks)


def _scale(path: Path, rank: int) -> float:
    if not path.is_file():
        return 1.0
    try:
        values = json.loads(path.read_text())
        alpha = float(values["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not PEFT's configuration of an adapter: {error!r}") from None
    for name, plain in _PLAIN.items():
        if values.get(name, plain) not in (plain, None):
            raise UserError(f"{path}: got {name} {values[name]!r}, want {plain!r}")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def load(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Set the updates of an attached model to those of an adapter. Returns the model.

    UserError unless both have the same layers, shapes and scale.
    """
    pairs, scale = read(path)
    own = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}
    if pairs.keys() != own.keys():
        name = min(pairs.keys() ^ own.keys())
        side = "has an update that lora.targets does not name" if name in pairs else "has no update"
        raise UserError(f"{path}: {name} {side}")
    for name, m in own.items():
        got, want = [tuple(a.shape) for a in pairs[name]], [tuple(m.lora_A.shape), tuple(m.lora_B.shape)]
        if got != want:
            raise UserError(f"{path}: {name} has A {got[0]} and B {got[1]}, want {want[0]} and {want[1]}")
        if not math.isclose(scale, m.lora_scale, rel_tol=1e-6):
            raise UserError(f"{path}: alpha / r is {scale:g}, want {m.lora_scale:g} (lora.alpha, lora.rank)")
        for own_part, part in zip((m.lora_A, m.lora_B), pairs[name], strict=True):
            own_part.data.copy_(part)
    return model


def apply(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Freeze the model and give it the updates of an adapter, whatever its layers and rank. Returns it."""
    pairs, scale = read(path)
    rank = len(next(iter(pairs.values()))[0])
    return load(attach(model, LoraConfig(rank, scale * rank, tuple(pairs))), path)


@torch.no_grad()
def merge(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Add the updates of an adapter to the weights, in float32. Returns the model.

    UserError for an update of a layer that the model lacks or of another shape.
    """
    pairs, scale = read(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    for name, (down, up) in pairs.items():
        if name not in layers:
            raise UserError(f"{path}: {name} is no linear layer of the model")
        weight = layers[name].weight
        if (len(up), down.shape[1]) != tuple(weight.shape):
            want = list(weight.shape)
            raise UserError(f"{path}: {name} updates [{len(up)}, {down.shape[1]}], want {want}")
        down, up = (a.to(weight.device) for a in (down, up))
        weight.copy_(weight.float().addmm(up, down, alpha=scale))
    return model


def merge_folders(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the generator of the folder `base` with an adapter merged to `out`, which must not exist yet; in
    float32, since most of an update is below the last bit of a bfloat16 weight."""
    if Path(out).exists():
        raise UserError(f"--out: {out} exists, want a new folder")
    model = merge(load_transformer(base, torch.float32), adapter)
    with atomic_folder(Path(out)) as folder:
        save_transformer(model, folder)
