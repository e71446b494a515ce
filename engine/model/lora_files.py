"""Files of LoRA adapters: one reader for what is found in the wild, and four writers.

An adapter is a safetensors file with two matrices a layer and, in some formats, a number:

    PREFIX MODULE . lora_A | lora_down [.default] .weight     A [r, in]
    PREFIX MODULE . lora_B | lora_up   [.default] .weight     B [out, r]
    PREFIX MODULE . alpha                                     the update is (alpha / r) B A

    written by                     PREFIX                        MODULE        alpha
    PEFT                           base_model.model.             native        adapter_config.json
    HY-Video-PRFL                  none, or PEFT's               native        none: it is r
    ComfyUI and its trainers       diffusion_model.              native        in the file, or r
    kohya, musubi-tuner            lora_unet_                    flat          in the file
    diffusers                      transformer.                  diffusers     lora_adapter_metadata, or r
    DiffSynth                      none, or pipe.dit.            native        none: it is r

native: blocks.0.self_attn.q; diffusers: blocks.0.attn1.to_q; flat: either with _ for every dot. Metadata of
the file may give alpha too (lora_alpha, alpha, network_alpha, or PEFT's settings as JSON in
lora_adapter_metadata). Where several say something, they must agree.
"""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prfl_engine import checksums
from prfl_engine.errors import UserError, check
from prfl_engine.inputs import check_finite, open_tensors, parse_json, read_bytes
from prfl_engine.model.names import LINEAR_IN_BLOCK, LINEAR_OUTSIDE, to_diffusers
from prfl_engine.model.sources import sharded
from prfl_kernels.sublayers.products import LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARED = "lora_comfyui.safetensors"  # what ComfyUI and diffusers read, saved in addition to PEFT's files
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
_FILES = WEIGHTS, "pytorch_lora_transformers_weights.safetensors", DIFFUSERS, SHARED, KOHYA

# {whether it is in a block: {flat name, native or of diffusers: native name}}
_NATIVE = {
    inside: {name.replace(".", "_"): native for native, other in table.items() for name in (native, other)}
    for inside, table in ((True, LINEAR_IN_BLOCK), (False, LINEAR_OUTSIDE))
}
_KEY = re.compile(
    r"(?:lora_(?:unet_+)?|(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|pipe\.dit\.)*)"
    r"(.+)\.(?:(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|alpha)"
)
_PARTS = {"lora_A": "lora_A", "lora_down": "lora_A", "lora_B": "lora_B", "lora_up": "lora_B", None: "alpha"}
_OTHERS = {
    r"\.diff(_b)?$": "differences of whole weights or biases, as LightX2V writes them",
    r"\.(dora_scale$|lora_magnitude_vector)": "a DoRA adapter",
    r"\.hada_": "a LoHa adapter", r"\.lokr_": "a LoKr adapter", r"\.b?oft_": "an OFT adapter",
    r"\.lora_mid": "a Tucker decomposition", r"\.lora_(B|up)(\.default)?\.bias$": "updates of biases",
    r"^(lora_te\d?_|text_encoder)": "an adapter of a text encoder",
}  # fmt: skip
# Settings of PEFT that change the arithmetic or, with some initial values, the weights themselves; and the
# values that do not.
_PLAIN = {
    "peft_type": ("LORA",), "use_dora": (False,), "fan_in_fan_out": (False,), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"), "lora_bias": (False,),
    "use_qalora": (False,), "modules_to_save": (None, []), "layer_replication": (None, []),
}  # fmt: skip
# Keys of patterns are regular expressions. Those with nested or many repetitions may take forever.
_ATOM = r"(?:\\.|\[\^?\]?[^\]\\]*\]|[^\\\[\](){}*+?|])"
_QUICK = re.compile(rf"(?:{_ATOM}[*+?]?|\({_ATOM}*(?:\|{_ATOM}*)*\)|\|)*", re.DOTALL)
_REPEATS = 3


def read(path: str | Path) -> tuple[dict[str, LowRank], set[str]]:
    """({native name of a module: its update, float32}, the modules with a rank or an alpha of their own) of
    an adapter: a folder as PEFT writes it, a safetensors file, or a sharded checkpoint.

    UserError where the file is not an adapter, or one whose arithmetic is not that above.
    """
    path = Path(path)
    if sharded(path) is not None:
        from prfl_engine.model.sharded import adapter  # it reads other adapters by this module

        updates, own, files = adapter(path)
        checksums.check(files)
        return updates, own
    file = next((f for f in (path / name for name in _FILES) if os.path.lexists(f)), path)
    want = f"a folder with {WEIGHTS}, or a safetensors file"
    if file == path and file.is_dir():
        raise UserError(f"{path}: no adapter there, want {want}")
    checksums.check([file, file.with_name(CONFIG)])
    with open_tensors(file, want) as opened:
        header = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, Tensor]] = {}
    sources: dict[str, str] = {}  # {module: its name in the file}
    for key, a in tensors.items():
        module, source, part = _parse(file, key, a)
        held = parts.setdefault(module, {})
        if part in held or sources.setdefault(module, source) != source:
            raise UserError(f"{file}: {key} is one of two tensors for {part} of {module}")
        held[part] = a.float()
    if not parts:
        raise UserError(f"{file}: got no updates, want one at least")
    for name, held in parts.items():
        down, up = held.get("lora_A"), held.get("lora_B")
        if down is None or up is None or len(down) != up.shape[1] or not len(down):
            shapes = {k: list(a.shape) for k, a in sorted(held.items())}
            raise UserError(f"{file}: {name} has {shapes}, want lora_A [r, in] and lora_B [out, r]")
    modules = {name: (sources[name], len(held["lora_A"])) for name, held in parts.items()}
    alphas = {name: held["alpha"].item() for name, held in parts.items() if "alpha" in held}
    scales, own = _scales(file, header, alphas, modules)
    return {k: LowRank(held["lora_A"], held["lora_B"], scales[k]) for k, held in parts.items()}, own


def holds_adapter(path: str | Path) -> bool:
    """Whether `read` is meant for what is at a path, and not a reader of whole models."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        return any(".lora_" in key for key in open_tensors(path).keys())  # noqa: SIM118
    return any((path / name).is_file() for name in _FILES)


def write_peft(updates: dict[str, LowRank], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does."""
    terms = {name: (len(low.down), low.scale * len(low.down)) for name, low in updates.items()}
    rank, alpha = Counter(terms.values()).most_common(1)[0][0]
    own = terms if len(set(terms.values())) > 1 else {}
    values = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "rank_pattern": {k: r for k, (r, _) in own.items()},
        "alpha_pattern": {k: a for k, (_, a) in own.items()}, "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "bias": "none", "init_lora_weights": True,
        "target_modules": sorted(updates),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    tensors = {}
    for name, low in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = low.down.detach().float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = low.up.detach().float().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def write_shared(updates: dict[str, LowRank], folder: Path) -> None:
    """Write lora_comfyui.safetensors, whose names and alphas ComfyUI and diffusers read.

    diffusers refuses alphas outside of blocks: there the scale is in B, and alpha is r.
    """
    tensors = {}
    for name, low in updates.items():
        key, up = f"diffusion_model.{name}", low.up.detach().float()
        if name.startswith("blocks."):
            tensors[f"{key}.alpha"] = torch.tensor(float(low.scale * len(low.down)))
        else:
            up = low.scale * up
        tensors[f"{key}.lora_A.weight"] = low.down.detach().float().contiguous()
        tensors[f"{key}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / SHARED, {"format": "pt"})


def write_diffusers(updates: dict[str, LowRank], folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors as diffusers does. The scale is in B, and alpha is r: a version
    that does not read alphas from metadata would leave them out."""
    tensors = {}
    for name, low in updates.items():
        key = f"transformer.{to_diffusers(name)}"
        tensors[f"{key}.lora_A.weight"] = low.down.detach().float().contiguous()
        tensors[f"{key}.lora_B.weight"] = (low.scale * low.up.detach().float()).contiguous()
    save_file(tensors, folder / DIFFUSERS, {"format": "pt"})


def write_kohya(updates: dict[str, LowRank], folder: Path) -> None:
    """Write lora_kohya.safetensors, with the names of kohya's sd-scripts and musubi-tuner."""
    tensors = {}
    for name, low in updates.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = low.down.detach().float().contiguous()
        tensors[f"{key}.lora_up.weight"] = low.up.detach().float().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(low.scale * len(low.down)))
    save_file(tensors, folder / KOHYA, {"format": "pt"})


def _parse(file: Path, key: str, a: Tensor) -> tuple[str, str, str]:
    """(module, its name in the file, lora_A, lora_B or alpha) of a tensor of an adapter."""
    for pattern, what in _OTHERS.items():
        if re.search(pattern, key):
            raise UserError(f"{file}: holds {what} ({key}), want low-rank updates alone")
    match = _KEY.fullmatch(key)
    module = match and _native(match[1])
    part = match and _PARTS[match[2]]
    if module is None or (a.numel() != 1 if part == "alpha" else a.dim() != 2):
        raise UserError(
            f"{file}: {key} {list(a.shape)}, want MODULE.lora_A.weight or .lora_B.weight, 2-d, or .alpha, "
            "MODULE a linear layer of Wan as PEFT, ComfyUI, kohya, diffusers or DiffSynth name it"
        )
    if not a.is_floating_point() and (part != "alpha" or a.is_complex()):
        raise UserError(f"{file}: {key} is {a.dtype}, want a float dtype")
    check_finite(a.float(), file, key)
    return module, match[1], part


def _native(name: str) -> str | None:
    """The native name of a layer, given as that, flat, or as in diffusers; None: no linear layer of Wan."""
    match = re.fullmatch(r"(?:blocks_([0-9]{1,4})_)?(.+)", name.replace(".", "_"))
    found = match and _NATIVE[match[1] is not None].get(match[2])
    return f"blocks.{int(match[1])}.{found}" if found and match[1] else found


def _scales(
    file: Path, header: dict[str, str], alphas: dict[str, float], modules: dict[str, tuple[str, int]]
) -> tuple[dict[str, float], set[str]]:
    """(the scale of every update, the modules with a rank or an alpha of their own unless all are alike).

    alphas: those in the file; modules: {module: (its name in the file, rank)}.
    """
    said: list[tuple[str, dict[str, float]]] = []  # (who says so, {module: scale})
    own = set(alphas)
    for name, alpha in alphas.items():
        check(_positive(alpha), f"{file}: alpha of {name}", alpha, "a positive number")
    said.append(("its alpha", {name: alpha / modules[name][1] for name, alpha in alphas.items()}))
    for field in ("lora_alpha", "alpha", "network_alpha"):
        if field in header:
            said.append((f"{field} in the metadata", _by_header(file, header, field, modules)))
    given = [("lora_adapter_metadata", file, header.get("lora_adapter_metadata"))]
    path = file.with_name(CONFIG)
    if os.path.lexists(path) and file.name != SHARED:
        given.append((CONFIG, path, read_bytes(path, "PEFT's settings of an adapter")))
    for name, source, text in given:
        if text is not None:
            scales, named = _by_peft(f"{source}: {name}" if source == file else str(source), text, modules)
            said.append((name, scales))
            own |= named
    # What kohya notes about the training counts where nothing else says anything.
    left = "ss_network_alpha" in header and not any(len(scales) == len(modules) for _, scales in said)
    noted = _by_header(file, header, "ss_network_alpha", modules) if left else dict.fromkeys(modules, 1.0)
    chosen = {}
    for module in modules:
        claims = [(scales[module], who) for who, scales in said if module in scales]
        first, whose = claims[0] if claims else (noted[module], "")
        for scale, who in claims[1:]:
            if not math.isclose(scale, first, rel_tol=4e-3):  # half a step of bfloat16
                raise UserError(
                    f"{file}: alpha / r of {module} is {first:g} by {whose}, but {scale:g} by {who}"
                )
        chosen[module] = first
    alike = len({(rank, chosen[module]) for module, (_, rank) in modules.items()}) == 1
    return chosen, set() if alike else own


def _by_header(file: Path, header: dict[str, str], field: str, modules) -> dict[str, float]:
    """The scales by a number in the metadata of a file."""
    try:
        alpha = float(header[field])
    except ValueError:
        alpha = math.nan
    check(_positive(alpha), f"{file}: {field}", header[field], "a positive number")
    return {module: alpha / rank for module, (_, rank) in modules.items()}


def _by_peft(
    source: str, text: str, modules: dict[str, tuple[str, int]]
) -> tuple[dict[str, float], set[str]]:
    """(the scale of every update, the modules that a pattern names) by PEFT's settings as JSON."""
    values = parse_json(text, source, "PEFT's settings of an adapter")
    prefix = "transformer."  # of the model in a pipeline of diffusers
    if any(key.startswith(prefix) for key in values):
        values = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    for name, usual in _PLAIN.items():
        check(values.get(name) in (*usual, None), f"{source}: {name}", values.get(name), repr(usual[0]))
    root = values.get("use_rslora")
    check(root is None or isinstance(root, bool), f"{source}: use_rslora", root, "true or false")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    check(rank is None or _positive(rank, int), f"{source}: r", rank, "a positive integer")
    check(_positive(alpha), f"{source}: lora_alpha", alpha, "a positive number")
    ranks, alphas = (_pattern(source, values, *a) for a in (("rank_pattern", int), ("alpha_pattern", float)))
    scales, named = {}, set()
    for module, (name, held) in modules.items():
        own_rank, own_alpha = (_matched(pattern, name) for pattern in (ranks, alphas))
        want = rank if own_rank is None else own_rank
        if want not in (held, None):
            raise UserError(f"{source}: {module} has rank {held}, want {want} (r or rank_pattern)")
        scales[module] = (alpha if own_alpha is None else own_alpha) / (math.sqrt(held) if root else held)
        if (own_rank, own_alpha) != (None, None):
            named.add(module)
    return scales, named


def _pattern(source: str, values: dict[str, Any], name: str, kind: type) -> dict[re.Pattern, float]:
    """{regular expression: rank or alpha} of PEFT, whose keys are such for the ends of names."""
    pattern = values.get(name) or {}
    check(isinstance(pattern, dict), f"{source}: {name}", pattern, "an object, names to numbers")
    made = {}
    for key, value in pattern.items():
        want = "a positive integer" if kind is int else "a positive number"
        check(_positive(value, kind), f"{source}: {name} {key!r}", value, want)
        if len(re.findall(r"[*+?]", key)) > _REPEATS or not _QUICK.fullmatch(key):
            raise UserError(
                f"{source}: {name}: got {key!r}, want a name or a regular expression with at most {_REPEATS} "
                "of * + ?, each after a single character, and groups of plain alternatives"
            )
        try:
            made[re.compile(rf"(.*\.)?({key})$")] = value
        except re.error as error:
            raise UserError(f"{source}: {name}: {key!r} is no regular expression: {error}") from None
    return made


def _matched(pattern: dict[re.Pattern, float], name: str) -> float | None:
    return next((value for key, value in pattern.items() if key.match(name)), None)


def _positive(value: Any, kind: type = float) -> bool:
    """Whether it is a positive finite number; kind int: an integer."""
    kinds = int if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1e30
