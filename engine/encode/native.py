"""The encoders' weights under the names of Wan's own files, for the classes of diffusers and transformers.

Heads, buckets and widths follow from the shapes. What shapes do not show is that of the released models: 16
heads of the image encoder, its exact GELU, and a VAE of two residual blocks a level.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from prfl_engine.errors import UserError
from prfl_engine.inputs import open_state, open_tensors

IMAGE_HEADS = 16
_T5_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file, read without executing code; a .pth is mapped into
    memory."""
    if path.suffix != ".safetensors":
        return open_state(path)
    file = open_tensors(path)
    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def text_encoder(state: Mapping[str, Tensor], source: Path) -> tuple[dict, dict[str, Tensor]]:
    """(arguments of UMT5Config, state dict of UMT5EncoderModel) of a models_t5_umt5-xxl-enc-bf16.pth."""
    found = {}
    for key, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if key == "token_embedding.weight":
            found["shared.weight"] = value
        elif key == "norm.weight":
            found["encoder.final_layer_norm.weight"] = value
        elif block and block[2] in _T5_BLOCK:
            found[f"encoder.block.{block[1]}.{_T5_BLOCK[block[2]]}"] = value
        else:
            raise UserError(f"{source}: holds {key}, want UMT5's encoder alone, as Wan has it")
    first = "encoder.block.0.layer"
    vocabulary, width = _shape(found, "shared.weight", source, 2)
    buckets, heads = _shape(found, f"{first}.0.SelfAttention.relative_attention_bias.weight", source, 2)
    arguments = dict(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=_shape(found, f"{first}.0.SelfAttention.q.weight", source, 2)[0] // heads,
        d_ff=_shape(found, f"{first}.1.DenseReluDense.wi_0.weight", source, 2)[0],
        num_layers=_count(found, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    return arguments, found


def image_encoder(state: Mapping[str, Tensor], source: Path) -> tuple[dict, dict[str, Tensor]]:
    """(arguments of CLIPVisionConfig, state dict of CLIPVisionModel) of the image half of a
    models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."""
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    found = {}
    for key, value in visual.items():
        part, _, end = key.rpartition(".")
        block = re.fullmatch(r"transformer\.(\d+)\.(.+)", part)
        if key == "cls_embedding":
            found["embeddings.class_embedding"] = value.flatten()
        elif key == "pos_embedding":
            found["embeddings.position_embedding.weight"] = value[0]
        elif part in ("patch_embedding", "pre_norm", "post_norm"):
            names = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}
            found[f"{names.get(part, f'embeddings.{part}')}.{end}"] = value
        elif block and block[2] == "attn.to_qkv":
            for name, third in zip("qkv", value.chunk(3), strict=True):
                found[f"encoder.layers.{block[1]}.self_attn.{name}_proj.{end}"] = third
        elif block and block[2] in _CLIP_BLOCK:
            found[f"encoder.layers.{block[1]}.{_CLIP_BLOCK[block[2]]}.{end}"] = value
        elif key != "head":
            raise UserError(f"{source}: holds visual.{key}, want the CLIP of Wan")
    width, _, patch, _ = _shape(found, "embeddings.patch_embedding.weight", source, 4)
    positions = _shape(found, "embeddings.position_embedding.weight", source, 2)[0]
    arguments = dict(
        hidden_size=width,
        intermediate_size=_shape(found, "encoder.layers.0.mlp.fc1.weight", source, 2)[0],
        num_hidden_layers=_count(found, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=IMAGE_HEADS,
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
        hidden_act="gelu",
    )
    # Written with the prefix that files of transformers 4 have, and 5 reads too.
    return arguments, {f"vision_model.{name}": value for name, value in found.items()}


def vae(state: Mapping[str, Tensor], source: Path) -> tuple[dict, dict[str, Tensor]]:
    """(arguments, state dict) of AutoencoderKLWan of a Wan2.1_VAE.pth, by diffusers' own table of names."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    arguments = dict(
        base_dim=_shape(state, "encoder.conv1.weight", source, 5)[0],
        z_dim=_shape(state, "conv2.weight", source, 5)[0],
    )
    return arguments, convert_wan_vae_to_diffusers(dict(state))


def _shape(state: Mapping[str, Tensor], key: str, source: Path, dims: int) -> tuple[int, ...]:
    if key not in state or state[key].dim() != dims:
        raise UserError(f"{source}: has no {key} of {dims} dimensions, want the file that Wan released")
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for key in state if (m := re.match(pattern, key)))
