"""Checks the TI2V model on the transformer of a checkout of Wan2.2 that you have.

    .venv/bin/python scripts/check_ti2v.py DIR [--golden FOLDER]

A small model with random weights, in text mode and in image mode, as the checkout computes it (there with a
timestep for every token) and as we do: the velocity and the gradients of the latent and of every weight in
float32 must be within 1e-5, relative to their norm. Three things of the checkout are replaced: its attention
function by torch's, since it runs on CUDA alone, autocast, which rounds, and its initial weights.
--golden writes the model, inputs and official values, as tests/golden/wan22/ti2v holds them. Exit code 1 if a
check fails.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl_bench.peer import load_module, new_folder
from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.patch.structure import attend
from prfl_engine.paths import a_path

LIMIT = 1e-5
SIZES = dict(
    model_type="ti2v", dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=6,
    in_dim=48, out_dim=48,
)  # fmt: skip
LATENT, TOKENS, FRAME = (1, 48, 3, 4, 4), 12, 4
T = 437.5


def official(folder: Path) -> nn.Module:
    """The checkout's model with random weights."""
    code = load_module(folder, "wan.modules.model")
    code.flash_attention = attend
    torch.amp.autocast = lambda *_, **__: contextlib.nullcontext()  # float32 all through
    model = code.WanModel(**SIZES)
    for name, p in model.named_parameters():
        spread = 0.1 if p.dim() == 1 else p.flatten(1).shape[1] ** -0.5
        nn.init.normal_(p, float("norm" in name and name.endswith("weight")), spread)
    return model


def inputs() -> dict[str, Tensor]:
    """A latent, a first frame, a text, and the gradient of the velocity."""
    first, text = torch.randn(1, 48, 1, *LATENT[3:]), torch.randn(1, 5, 12)
    return {"latent": torch.randn(LATENT), "first": first, "text": text, "direction": torch.randn(LATENT)}


def values(mode: str, model: nn.Module, latent: Tensor, direction: Tensor, out: Tensor) -> dict[str, Tensor]:
    """The velocity and all gradients by name, without the frame that is given in image mode."""
    start = int(mode == "image")
    direction = direction.clone()
    direction[:, :, :start] = 0  # of their velocity there nothing is used; ours is 0
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith(".k.bias")]  # theirs is 0
    wanted = [latent, *(p for _, p in named)]
    dx, *gradients = torch.autograd.grad((out * direction).sum(), wanted)
    found = {"velocity": out[:, :, start:].detach(), "latent": dx[:, :, start:]}
    found |= {name: a for (name, _), a in zip(named, gradients, strict=True)}
    return {f"{mode}.{name}": a.contiguous() for name, a in found.items()}


def theirs(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the checkout's model, in both modes."""
    found = {}
    for mode in ("text", "image"):
        t = torch.full((1, TOKENS), T)
        x = given["latent"].clone()
        if mode == "image":
            t[:, :FRAME], x[:, :, :1] = 0, given["first"]
        x.requires_grad_()
        out = model([x[0]], t, [given["text"][0]], TOKENS)[0][None]
        found |= values(mode, model, x, given["direction"], out)
    return found


def ours(model: WanTransformer, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of this engine."""
    found = {}
    for mode in ("text", "image"):
        x = given["latent"].clone().requires_grad_()
        condition = given["first"] if mode == "image" else None
        out = model(x, torch.tensor([T]), model.embed_context(given["text"]), condition)
        found |= values(mode, model, x, given["direction"], out)
    return found


def worst(got: dict[str, Tensor], want: dict[str, Tensor], mode: str = "") -> tuple[float, str]:
    """The largest relative L2 distance of a mode's values, and of which one."""
    pairs = ((k, got[k], a) for k, a in want.items() if k.startswith(mode))
    return max(((a - b).norm().item() / b.norm().item(), k) for k, a, b in pairs)


def main() -> int:
    """Exit code 0 if both modes are within the limit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("dir", type=a_path, help="a checkout of Wan2.2")
    parser.add_argument("--golden", type=new_folder, metavar="FOLDER", help="a new folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, given, failed = official(args.dir), inputs(), False
    want = theirs(model, given)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) if args.golden is None else args.golden
        out.mkdir(parents=True, exist_ok=args.golden is None)
        save_file(model.state_dict(), out / "diffusion_pytorch_model.safetensors")
        WanConfig(**SIZES).to_json(out / "config.json")
        if args.golden is not None:
            save_file(given, out / "inputs.safetensors")
            save_file(want, out / "expected.safetensors")
        got = ours(load_transformer(out), given)
    for mode in ("text", "image"):
        distance, where = worst(got, want, mode)
        failed |= not distance <= LIMIT
        print(f"{mode} mode: largest relative distance {distance:.1e} in {where}, want at most {LIMIT:.0e}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
