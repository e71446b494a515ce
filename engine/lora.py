"""LoRA: low-rank updates of linear layers, trained in place of the weights, in the files of PEFT.

    y = W x + b + (alpha / r) B A x          W [N, K] frozen, A [r, K], B [N, r] in float32

Every layers.Linear of a transformer can have one. In self-attention and FFN, A and B go into the fused
branches: two thin products more, no gradient of W, and nothing kept that a trained W would not keep
(prfl_kernels.branch). B begins as zero, A as PEFT draws it. All other parameters, modulation and norms
included, are frozen. Source: Hu et al. 2021, arXiv 2106.09685.

Files: adapter_config.json and adapter_model.safetensors of PEFT, or the bare safetensors file that
HY-Video-PRFL writes (alpha = r); keys base_model.model.MODULE.lora_A.weight, or diffusion_model.MODULE....
Layers that PEFT's rank_pattern and alpha_pattern name have a rank and an alpha of their own.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection
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
from prfl_engine.seeds import Purpose, torch_seed
from prfl_kernels.branch import LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BARE = "pytorch_lora_transformers_weights.safetensors"
_KEY = re.compile(
    r"(?:base_model\.model\.|diffusion_model\.|transformer\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight"
)
# What PEFT's configuration may hold that changes the arithmetic or, with some initial values, the weights
# beside the update; and the values that do not.
_PLAIN = {
    "use_dora": (False,), "fan_in_fan_out": (False,), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
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
    generator = torch.Generator().manual_seed(torch_seed(Purpose.LORA, seed))
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


def named(updates: dict[str, LowRank]) -> dict[str, Tensor]:
    """The A and B that `read` gives under the names of `parameters`."""
    parts = "lora_A", "lora_B"
    return {f"{k}.{part}": a for k, low in updates.items() for part, a in zip(parts, low[:2], strict=True)}


def save(model: WanTransformer, folder: Path) -> None:
    """Write the adapter as PEFT does."""
    held = {k: p.detach() for k, p in parameters(model).items()}
    layers = {k.rpartition(".")[0]: model.get_submodule(k.rpartition(".")[0]) for k in held}
    terms = {k: (len(m.lora_A), m.lora_scale * len(m.lora_A)) for k, m in layers.items()}
    rank, alpha = Counter(terms.values()).most_common(1)[0][0]
    own = terms if len(set(terms.values())) > 1 else {}
    values = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "rank_pattern": {k: r for k, (r, _) in own.items()},
        "alpha_pattern": {k: a for k, (_, a) in own.items()}, "lora_dropout": 0.0, "use_rslora": False,
        "target_modules": sorted(layers), **{name: usual[0] for name, usual in _PLAIN.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    tensors = {f"base_model.model.{k}.weight": a.float().contiguous() for k, a in held.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def read(path: str | Path) -> tuple[dict[str, LowRank], set[str]]:
    """({module: its update, in float32}, the modules with a rank or an alpha of their own) of an adapter: a
    folder as PEFT writes it, or a bare safetensors file.

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
    if not parts:
        raise UserError(f"{file}: got no updates, want one at least")
    for name, pair in parts.items():
        if len(pair) < 2 or len(pair["lora_A"]) != pair["lora_B"].shape[1]:
            held = {k: list(a.shape) for k, a in sorted(pair.items())}
            raise UserError(f"{file}: {name} has {held}, want lora_A [r, in] and lora_B [out, r]")
    scales, own = _scales(file.parent / CONFIG, {k: len(pair["lora_A"]) for k, pair in parts.items()})
    return {k: LowRank(p["lora_A"], p["lora_B"], scales[k]) for k, p in parts.items()}, own


def _scales(path: Path, ranks: dict[str, int]) -> tuple[dict[str, float], set[str]]:
    """(the scale of every update, those that a pattern names unless all are alike) by PEFT's configuration;
    without one alpha is the rank."""
    if not path.is_file():
        return dict.fromkeys(ranks, 1.0), set()
    try:
        values = json.loads(path.read_text())
        plain = values.get("r"), float(values["lora_alpha"])
        patterns = [values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
        found = {name: [_matched(pattern, name) for pattern in patterns] for name in ranks}
        terms = {k: [b if a is None else a for a, b in zip(v, plain, strict=True)] for k, v in found.items()}
        alphas = {name: float(alpha) for name, (_, alpha) in terms.items()}
    except (AttributeError, ValueError, KeyError, TypeError, re.error) as error:
        raise UserError(f"{path}: not PEFT's configuration of an adapter: {error!r}") from None
    for name, (rank, _) in terms.items():
        if rank not in (ranks[name], None):
            raise UserError(f"{path}: {name} has rank {ranks[name]}, want {rank} (r or rank_pattern)")
    for name, usual in _PLAIN.items():
        if values.get(name, usual[0]) not in (*usual, None):
            raise UserError(f"{path}: got {name} {values[name]!r}, want {usual[0]!r}")
    root = bool(values.get("use_rslora"))
    scales = {name: alphas[name] / (math.sqrt(rank) if root else rank) for name, rank in ranks.items()}
    alike = len({(ranks[name], scale) for name, scale in scales.items()}) == 1
    return scales, {name for name, own in found.items() if own != [None, None] and not alike}


def _matched(pattern: dict[str, float], name: str) -> float | None:
    """What a pattern of PEFT says about a module: keys are regular expressions for the ends of names."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def load(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Set the updates of an attached model to those of an adapter. Returns the model.

    UserError unless both have the same layers, shapes and scales; but layers that the adapter's patterns name
    get its ranks and scales.
    """
    updates, own = read(path)
    return _fill(model, path, updates, updates.keys() - own)


def apply(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Freeze the model and give it the updates of an adapter, whatever its layers and ranks. Returns it."""
    updates, _ = read(path)
    return _fill(attach(model, LoraConfig(1, targets=tuple(updates))), path, updates, ())


def _fill(
    model: WanTransformer, path: str | Path, updates: dict[str, LowRank], fixed: Collection[str]
) -> WanTransformer:
    """`load`; the layers `fixed` keep the ranks and scales that they have."""
    attached = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}
    if updates.keys() != attached.keys():
        name = min(updates.keys() ^ attached.keys())
        side = "has an update that lora.targets does not name" if name in updates else "has no update"
        raise UserError(f"{path}: {name} {side}")
    for name, m in attached.items():
        down, up, scale = updates[name]
        rank = len(m.lora_A if name in fixed else down)
        got, want = [tuple(down.shape), tuple(up.shape)], [(rank, m.in_features), (m.out_features, rank)]
        if got != want:
            raise UserError(f"{path}: {name} has A {got[0]} and B {got[1]}, want {want[0]} and {want[1]}")
        if name not in fixed:
            m.lora_scale = scale
        elif not math.isclose(scale, m.lora_scale, rel_tol=1e-6):
            raise UserError(f"{path}: alpha / r is {scale:g}, want {m.lora_scale:g} (lora.alpha, lora.rank)")
        _set(m, down.to(m.lora_A), up.to(m.lora_B))
    return model


@torch.no_grad()
def merge(model: WanTransformer, path: str | Path) -> WanTransformer:
    """Add the updates of an adapter to the weights, in float32. Returns the model.

    UserError for an update of a layer that the model lacks or of another shape.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    for name, (down, up, scale) in read(path)[0].items():
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
