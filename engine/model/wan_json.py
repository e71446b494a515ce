"""config.json of a Wan transformer, native and of diffusers."""

import json
from pathlib import Path
from typing import Any

from prfl_engine.errors import check
from prfl_engine.inputs import read_json
from prfl_engine.model.layers import IMAGE_DIM
from prfl_engine.model.wan import WanConfig

DIFFUSERS = "WanTransformer3DModel"
_SAME = ("ffn_dim", "num_layers", "text_dim", "freq_dim", "patch_size", "eps")
_FIXED = {
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}  # fmt: skip


def read(path: Path) -> WanConfig:
    """The hyper-parameters of a config.json of either kind; UserError for values that are not Wan's."""
    values = read_json(path, "the config.json of a Wan transformer")
    if values.get("_class_name") == DIFFUSERS:
        values = _of_diffusers(values, path)
    return WanConfig.from_values(values, path)


def write_diffusers(config: WanConfig, path: Path) -> None:
    """Write config.json as diffusers does. A text_len other than Wan's 512 is there in addition: diffusers
    leaves the length of texts to its caller, and says that it ignores the field."""
    values: dict[str, Any] = {
        "_class_name": DIFFUSERS,
        "added_kv_proj_dim": config.dim if config.clip else None,
        "attention_head_dim": config.dim // config.num_heads,
        "image_dim": IMAGE_DIM if config.clip else None,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "out_channels": config.out_dim,
        **{name: getattr(config, name) for name in _SAME},
        **_FIXED,
    }
    if config.text_len != WanConfig.text_len:
        values["text_len"] = config.text_len
    path.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")


def _of_diffusers(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of WanConfig."""
    for name, want in _FIXED.items():
        check(values.get(name, want) == want, f"{path}: {name}", values.get(name), f"Wan's {want!r}")
    heads, width = (values.get(name) for name in ("num_attention_heads", "attention_head_dim"))
    for name, value in (("num_attention_heads", heads), ("attention_head_dim", width)):
        check(type(value) is int and value > 0, f"{path}: {name}", value, "a positive integer")
    image = values.get("image_dim")
    check(image in (None, IMAGE_DIM), f"{path}: image_dim", image, f"null or {IMAGE_DIM}")
    others = {"in_channels": "in_dim", "out_channels": "out_dim"}
    found = {name: values[name] for name in (*_SAME, "text_len") if name in values}
    found |= {ours: values[name] for name, ours in others.items() if name in values}
    conditioned = found.get("in_dim", WanConfig.in_dim) != found.get("out_dim", WanConfig.out_dim)
    return found | {
        "model_type": "i2v" if conditioned else "t2v", "dim": heads * width, "num_heads": heads,
        "clip": image is not None,
    }  # fmt: skip
