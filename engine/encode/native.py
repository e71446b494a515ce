"""The encoders' weights under the names of Wan's own files, for the classes of diffusers and transformers.

Heads, buckets and widths follow from the shapes. What shapes do not show is that of the released models: 16
heads of the image encoder, its exact GELU, a VAE of two residual blocks a level, and the statistics of the
latents of Wan2.2's VAE (diffusers has those of Wan2.1's).
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
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885,
    0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338,
    0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458,
    1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
"""Of Wan2.2's latents, by channel."""


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
    """(arguments, state dict) of AutoencoderKLWan of a Wan2.1_VAE.pth or Wan2.2_VAE.pth.

    diffusers' own table of names is that of Wan2.1's. In Wan2.2's the blocks of a level are in a module of
    their own, and all else has the same names.
    """
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    arguments = dict(
        base_dim=_shape(state, "encoder.conv1.weight", source, 5)[0],
        z_dim=_shape(state, "conv2.weight", source, 5)[0],
    )
    levels, rest = {}, {}
    for key, value in state.items():
        level = re.fullmatch(r"(en|de)coder\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(.+)\.(\w+)", key)
        if level is None:
            rest[key] = value
            continue
        half, way, n, block, part, end = level.groups()
        name = f"{way}sampler.{part}" if part not in _RESIDUAL else f"resnets.{block}.{_RESIDUAL[part]}"
        levels[f"{half}coder.{way}_blocks.{n}.{name}.{end}"] = value
    if levels:
        patch = 2
        arguments |= dict(
            decoder_base_dim=_shape(state, "decoder.head.0.gamma", source, 4)[0],
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
            patch_size=patch,
            scale_factor_spatial=8 * patch,
            is_residual=True,
            latents_mean=list(WAN22_MEAN),
            latents_std=list(WAN22_STD),
        )
    return arguments, convert_wan_vae_to_diffusers(rest) | levels


def latent_channels(path: Path) -> int:
    """Those of the VAE in a native file, by the shape of one tensor."""
    key = "conv2.weight"
    if path.suffix != ".safetensors":
        return _shape(open_state(path), key, path, 5)[0]
    file = open_tensors(path)
    found = {key: file.get_tensor(key)} if key in file.keys() else {}  # noqa: SIM118
    return _shape(found, key, path, 5)[0]


def _shape(state: Mapping[str, Tensor], key: str, source: Path, dims: int) -> tuple[int, ...]:
    if key not in state or state[key].dim() != dims:
        raise UserError(f"{source}: has no {key} of {dims} dimensions, want the file that Wan released")
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for key in state if (m := re.match(pattern, key)))
