"""Small encoders of the real classes with random weights, in diffusers' layout and Wan's own, and clips."""

from pathlib import Path

import torch
from helpers import randomize
from torch import Tensor

from prfl_engine.media.video import write_video

WORDS = ("a", "cat", "runs", "jumps", "on", "grass", "red", "blue", "boat", "in", "storm", "blurry")
TEXT_DIM = 12
"""That of the tiny generator of helpers.py."""


def tokenizer():
    """Splits at spaces; every prompt ends with </s>, as UMT5's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def vae():
    from diffusers import AutoencoderKLWan

    return randomize(AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 4, 4]), 1)


def vae22():
    """Of the structure of TI2V-5B's."""
    from diffusers import AutoencoderKLWan

    return randomize(AutoencoderKLWan(
        base_dim=2, decoder_base_dim=3, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[1.5] * 48,
    ), 1)  # fmt: skip


def text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=24, d_model=TEXT_DIM, d_kv=4, d_ff=20, num_layers=2, num_heads=3,
        relative_attention_num_buckets=8, tie_word_embeddings=False,
    )  # fmt: skip
    return randomize(UMT5EncoderModel(config), 2)


def image_encoder():
    """257 tokens of width 1280, as the loader of data wants them, from patches of 2 x 2."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=16, num_hidden_layers=2, num_attention_heads=16, image_size=32,
        patch_size=2, hidden_act="gelu",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return CLIPVisionModel(config)


def write_diffusers(folder: Path) -> Path:
    """The three encoders as `save_pretrained` writes them."""
    for name, model in ("vae", vae()), ("text_encoder", text_encoder()), ("image_encoder", image_encoder()):
        model.save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def write_ti2v(folder: Path) -> Path:
    """What TI2V-5B has of them, as `save_pretrained` writes it."""
    vae22().save_pretrained(folder / "vae")
    text_encoder().save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def write_native(folder: Path) -> Path:
    """The same weights under the names, and in the files, of Wan2.1's repositories."""
    folder.mkdir()
    torch.save(native_vae(vae().state_dict()), folder / "Wan2.1_VAE.pth")
    torch.save(native_text(text_encoder().state_dict()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    state = native_image(image_encoder().state_dict())
    torch.save(state, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    tokenizer().save_pretrained(folder / "google/umt5-xxl")
    return folder


def native_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = native_vae_names()
    pairs = convert_wan_vae_to_diffusers(dict(zip(names, names, strict=True)))
    return {theirs: state[ours] for ours, theirs in pairs.items()}


def native_vae_names() -> list[str]:
    """Of the official WanVAE_ with two residual blocks a level."""

    def convolutions(*stems: str) -> list[str]:
        return [f"{stem}.{end}" for stem in stems for end in ("weight", "bias")]

    def residual(stem: str) -> list[str]:
        norms = [f"{stem}.residual.{i}.gamma" for i in (0, 3)]
        return norms + convolutions(f"{stem}.residual.2", f"{stem}.residual.6")

    names = convolutions("conv1", "conv2")
    levels = {
        "encoder.downsamples": ((0, 1, 3, 4, 6, 7, 9, 10), (2, 5, 8), (5, 8), (3, 6)),
        "decoder.upsamples": ((0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14), (3, 7, 11), (3, 7), (4,)),
    }
    for part, (blocks, resamples, times, shortcuts) in levels.items():
        for i in blocks:
            names += residual(f"{part}.{i}")
        names += convolutions(*(f"{part}.{i}.resample.1" for i in resamples))
        names += convolutions(*(f"{part}.{i}.time_conv" for i in times))
        names += convolutions(*(f"{part}.{i}.shortcut" for i in shortcuts))
    for half in ("encoder", "decoder"):
        middle = f"{half}.middle"
        names += residual(f"{middle}.0") + residual(f"{middle}.2")
        names += [f"{middle}.1.norm.gamma", *convolutions(f"{middle}.1.to_qkv", f"{middle}.1.proj")]
        names += [f"{half}.head.0.gamma", *convolutions(f"{half}.conv1", f"{half}.head.2")]
    return names


def native_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the official T5Encoder."""
    found = {"token_embedding.weight": state["shared.weight"]}
    found["norm.weight"] = state["encoder.final_layer_norm.weight"]
    for i in range(2):
        ours, theirs = f"encoder.block.{i}.layer", f"blocks.{i}"
        for n in range(2):
            found[f"{theirs}.norm{n + 1}.weight"] = state[f"{ours}.{n}.layer_norm.weight"]
        attention = f"{ours}.0.SelfAttention"
        for name in "qkvo":
            found[f"{theirs}.attn.{name}.weight"] = state[f"{attention}.{name}.weight"]
        bias = state[f"{attention}.relative_attention_bias.weight"]
        found[f"{theirs}.pos_embedding.embedding.weight"] = bias
        for name, dense in ("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo"):
            found[f"{theirs}.ffn.{name}.weight"] = state[f"{ours}.1.DenseReluDense.{dense}.weight"]
    return found


def native_image(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the official XLMRobertaCLIP: `visual` and something of the rest."""
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    width = len(state["pre_layrnorm.weight"])
    found = {
        "log_scale": torch.tensor(1.0),
        "textual.token_embedding.weight": torch.zeros(2, 3),
        "visual.head": torch.zeros(width, 4),
        "visual.cls_embedding": state["embeddings.class_embedding"].view(1, 1, width),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
    }
    for end in ("weight", "bias"):
        for theirs, ours in ("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm"):
            found[f"visual.{theirs}.{end}"] = state[f"{ours}.{end}"]
        for i in range(2):
            a, b = f"visual.transformer.{i}", f"encoder.layers.{i}"
            qkv = [state[f"{b}.self_attn.{name}_proj.{end}"] for name in "qkv"]
            found[f"{a}.attn.to_qkv.{end}"] = torch.cat(qkv)
            found[f"{a}.attn.proj.{end}"] = state[f"{b}.self_attn.out_proj.{end}"]
            for n in (1, 2):
                found[f"{a}.norm{n}.{end}"] = state[f"{b}.layer_norm{n}.{end}"]
                found[f"{a}.mlp.{2 * n - 2}.{end}"] = state[f"{b}.mlp.fc{n}.{end}"]
    return found


def write_clip(path: Path, frames: int = 9, height: int = 48, width: int = 64, fps: int = 16) -> Path:
    """A square that moves over gray by 4 pixels a frame; its brightness says which frame it is."""
    video = torch.full((frames, height, width, 3), 60, dtype=torch.uint8)
    for t in range(frames):
        video[t, 16:32, 4 * t % 48 : 4 * t % 48 + 16] = 100 + 3 * t
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, fps)
    return path
