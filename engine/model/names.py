"""The names of a Wan transformer's parameters: native, of diffusers, and with the prefix of ComfyUI.

Shapes and values are the same under all of them. Source: WanTransformer3DModel of diffusers 0.42 and its
scripts/convert_wan_to_diffusers.py; a checkpoint of ComfyUI has native names after one of two prefixes.
"""

import re

LINEAR_IN_BLOCK = {
    **{f"self_attn.{a}": f"attn1.to_{a}" for a in "qkv"}, "self_attn.o": "attn1.to_out.0",
    **{f"cross_attn.{a}": f"attn2.to_{a}" for a in "qkv"}, "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
"""{native name: name in diffusers} of the linear layers of a block."""
LINEAR_OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
"""{native name: name in diffusers} of the other linear layers."""
_IN_BLOCK = LINEAR_IN_BLOCK | {
    "modulation": "scale_shift_table", "norm3": "norm2",
    "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q", "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}  # fmt: skip
_OUTSIDE = LINEAR_OUTSIDE | {
    "patch_embedding": "patch_embedding", "head.modulation": "scale_shift_table",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}  # fmt: skip
_BACK = [{other: native for native, other in table.items()} for table in (_IN_BLOCK, _OUTSIDE)]
COMFYUI = "model.diffusion_model."
"""The prefix of ComfyUI's checkpoints; its files of a diffusion model alone may have it without `model.`."""


def to_diffusers(key: str) -> str:
    """The name in diffusers of a parameter with a native name; KeyError for one that Wan has not."""
    made = _renamed(key, _IN_BLOCK, _OUTSIDE)
    if made is None:
        raise KeyError(key)
    return made


def to_comfyui(key: str) -> str:
    """The name in a checkpoint of ComfyUI of a parameter with a native name."""
    return COMFYUI + key


def to_native(key: str) -> str:
    """The native name of a parameter named in any of the three ways; a name of no parameter of Wan loses
    ComfyUI's prefix and stays as it is otherwise."""
    key = key.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.")
    return _renamed(key, *_BACK) or key


def _renamed(key: str, in_block: dict[str, str], outside: dict[str, str]) -> str | None:
    block, part, leaf = re.fullmatch(r"(blocks\.[0-9]+\.)?(.*?)(\.weight|\.bias)?", key, re.DOTALL).groups("")
    other = (in_block if block else outside).get(part)
    return other and block + other + leaf
