"""Checks prfl_engine.encode on the encoders of a checkout that you have.

    .venv/bin/python scripts/check_encoders.py DIR [--golden FOLDER]

DIR is a checkout of HY-Video-PRFL, Wan2.1 or Wan2.2 (which has no CLIP, but also the VAE of TI2V-5B). Its
VAEs, text encoder and image encoder are built small with random weights, saved as Wan's repositories hold
them, and loaded by ours: what the two make of random inputs in float32 must be equal within 1e-5 of the
largest value. In the checkout attention is replaced by torch's, since its own runs on CUDA alone. Exit code 1
if a check fails. --golden writes the second VAE, its video and the official values, as tests/golden/wan22/vae
holds them.

The checkout needs einops, and for its tokenizer, which is not run, ftfy; torchvision is not needed.
"""

import argparse
import sys
import tempfile
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl_bench.peer import load_module, new_folder
from prfl_engine.encode import encoders
from prfl_engine.encode.encoders import ImageEncoder, TextEncoder, VideoVAE
from prfl_engine.patch.structure import attend
from prfl_engine.paths import a_path

LIMIT = 1e-5
PLACES = ("diffusers_lite/wan/modules", "wan/modules")


def module(folder: Path, *names: str) -> types.ModuleType | None:
    """The first of these modules that a checkout has."""
    for place in PLACES:
        for name in names:
            if (folder / place / f"{name}.py").is_file():
                return load_module(folder, f"{place.replace('/', '.')}.{name}")
    return None


def randomize(model: nn.Module) -> nn.Module:
    """Random weights, zero-initialised ones too."""
    for p in model.parameters():
        spread = 0.2 if p.dim() < 2 else p.flatten(1).shape[1] ** -0.5
        p.data = (p.dim() < 2) * p.data + spread * torch.randn_like(p)
    return model.eval()


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def vae_values(model: nn.Module, scale: list[Tensor], video: Tensor) -> dict[str, Tensor]:
    """Latents of a video in [0, 1], and what the official model decodes them to, in [-1, 1]."""
    latent = model.encode(video * 2 - 1, scale)
    return {"encoded": latent, "decoded": model.decode(latent, scale).clamp(-1, 1)}


def ours_of(vae: VideoVAE, video: Tensor, latent: Tensor) -> dict[str, Tensor]:
    """The same values by this engine."""
    return {"encoded": vae.encode(video), "decoded": vae.decode(latent) * 2 - 1}


def check_vae(folder: Path, out: Path) -> dict[str, float] | None:
    """Encoding and decoding of nine frames."""
    code = module(folder, "vae", "vae2_1")
    if code is None:
        return None
    model = randomize(code.WanVAE_(dim=4, z_dim=16, temperal_downsample=[False, True, True]))
    torch.save(model.state_dict(), out / "Wan2.1_VAE.pth")
    ours, video = VideoVAE(out / "Wan2.1_VAE.pth"), torch.rand(1, 3, 9, 32, 48)
    want = vae_values(model, [ours.mean.flatten(), 1 / ours.std.flatten()], video)
    got = ours_of(ours, video, want["encoded"])
    return {f"VAE, {name}": relative(got[name], value) for name, value in want.items()}


def check_vae_of_wan22(folder: Path, out: Path) -> dict[str, float] | None:
    """The same of TI2V-5B's, with the mean and standard deviation that the checkout has."""
    code = module(folder, "vae2_2")
    if code is None:
        return None
    made = {}

    def small(**given: object) -> nn.Module:
        shape = {"dim": 2, "dec_dim": 3, "z_dim": given["z_dim"]}
        times = given["temperal_downsample"]
        made["model"] = randomize(code.WanVAE_(**shape, temperal_downsample=times)).bfloat16().float()
        return made["model"]

    code._video_vae = small
    scale = code.Wan2_2_VAE(device="cpu").scale
    state = {name: value.bfloat16() for name, value in made["model"].state_dict().items()}
    path = out / "Wan2.2_VAE.safetensors"
    save_file(state, path)
    video = torch.randint(256, (1, 3, 9, 32, 32), dtype=torch.uint8)
    want = vae_values(made["model"], scale, video / 255)
    save_file({"video": video, **want}, out / "expected.safetensors")
    got = ours_of(VideoVAE(path), video / 255, want["encoded"])
    return {f"VAE of Wan2.2, {name}": relative(got[name], value) for name, value in want.items()}


def tokenizer(words: int):
    """One of the words w0, w1, ..., with <pad> as the first token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0} | {f"w{i}": i + 1 for i in range(words)}
    fast = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>")


def check_text(folder: Path, out: Path) -> dict[str, float] | None:
    """Two prompts of different lengths; the official code pads both to its longest, here 150 tokens."""
    known, torch.cuda.current_device = torch.cuda.current_device, lambda: "cpu"  # a default argument there
    try:
        code = module(folder, "t5")
    finally:
        torch.cuda.current_device = known
    if code is None:
        return None
    model = randomize(code.T5Encoder(40, 24, 32, 40, 4, 2, 8, shared_pos=False))
    torch.save(model.state_dict(), out / "models_t5_umt5-xxl-enc-bf16.pth")
    words = tokenizer(39)
    words.save_pretrained(out / "google/umt5-xxl")
    prompts = [" ".join(f"w{i}" for i in torch.randint(39, (n,)).tolist()) for n in (140, 17)]
    given = words(prompts, padding="max_length", max_length=150, return_tensors="pt")
    theirs = model(given.input_ids, given.attention_mask)
    ours = TextEncoder(out, dtype=torch.float32)(prompts)
    return {"text encoder": max(relative(a, b[: len(a)]) for a, b in zip(ours, theirs, strict=True))}


def check_image(folder: Path, out: Path) -> dict[str, float] | None:
    """A frame that is no square, through the official preprocessing."""
    import transformers.models.clip.modeling_clip  # noqa: F401 - before the stand-in for torchvision

    for name in ("torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    code = module(folder, "clip")
    if code is None:
        return None
    code.flash_attention = lambda q, k, v, **_: attend(q, k, v)
    shape = dict(image_size=32, patch_size=2, vision_dim=1280, vision_mlp_ratio=0.05, vision_layers=3)
    text = dict(vocab_size=8, text_dim=16, text_heads=2, text_layers=1, embed_dim=8)
    model = randomize(code.XLMRobertaCLIP(**shape, **text))
    torch.save(model.state_dict(), out / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    ours = ImageEncoder(out)
    official = object.__new__(code.CLIPModel)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoders.CLIP_MEAN, encoders.CLIP_STD))
    official.model, official.dtype = model, torch.float32
    official.transforms = types.SimpleNamespace(transforms=[lambda image: (image - mean) / std])
    frame = torch.rand(3, 1, 48, 64)
    want = official.visual([frame * 2 - 1])
    return {"image encoder": relative(ours(frame.transpose(0, 1)), want)}


def main() -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Our encoders against those of a checkout.")
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--golden", type=new_folder, metavar="FOLDER", help="a new folder")
    args = parser.parse_args()
    folder, golden = args.folder, args.golden
    torch.manual_seed(0)
    worst, checked = 0.0, 0
    with tempfile.TemporaryDirectory() as out, torch.no_grad():
        if golden is not None:
            golden.mkdir(parents=True)
        places = {check_vae_of_wan22: golden or Path(out)}
        for check in (check_vae, check_vae_of_wan22, check_text, check_image):
            for what, error in (check(folder, places.get(check, Path(out))) or {}).items():
                print(f"{what}: {error:.1e}")
                worst, checked = max(worst, error), checked + 1
    if not checked:
        raise SystemExit(f"{folder}: has no encoder in {' or '.join(PLACES)}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
