"""Checks the TI2V model on the transformer of a checkout of Wan2.2 that you have.

    .venv/bin/python scripts/check_ti2v.py DIR

A small model with random weights, in text mode and in image mode, as the checkout computes it (there with a
timestep for every token) and as we do: the velocity and the gradients of the latent and of every weight in
float32 must be within 1e-5, relative to their norm. Three things of the checkout are replaced: its attention
function by torch's, since it runs on CUDA alone, autocast, which rounds, and its initial weights. Exit code 1
if a check fails.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from torch import Tensor

from prfl_bench.peer import load_module
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.patch.structure import attend

LIMIT = 1e-5
SIZES = dict(
    model_type="ti2v", dim=96, ffn_dim=160, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, text_len=16,
    in_dim=48, out_dim=48,
)  # fmt: skip


def models(folder: Path) -> tuple[torch.nn.Module, WanTransformer]:
    """The checkout's model and ours, with the same random weights."""
    code = load_module(folder, "wan.modules.model")
    code.flash_attention = attend
    torch.amp.autocast = lambda *_, **__: contextlib.nullcontext()  # float32 all through
    theirs, ours = code.WanModel(**SIZES), WanTransformer(WanConfig(**SIZES))
    for name, p in theirs.named_parameters():
        spread = 0.1 if p.dim() == 1 else p.flatten(1).shape[1] ** -0.5
        torch.nn.init.normal_(p, float("norm" in name and name.endswith("weight")), spread)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def distance(got: Tensor, want: Tensor, least: Tensor | float = 0.0) -> float:
    """Of got from want, relative to the norm of want, or to `least` if that is more."""
    return ((got - want).norm() / want.norm().clamp(min=least)).item()


def check(theirs: torch.nn.Module, ours: WanTransformer, image: bool) -> float:
    """The largest distance of ours from theirs: of the velocity and of any gradient."""
    shape, frame = (1, 48, 3, 8, 6), 12
    latent, first, text = torch.randn(shape), torch.randn(1, 48, 1, 8, 6), torch.randn(1, 7, 24)
    x = torch.cat([first, latent[:, :, 1:]], 2) if image else latent
    direction = torch.randn(shape)
    every = torch.full((1, 3 * frame), 437.5)
    if image:
        every[:, :frame] = 0
        direction[:, :, 0] = 0  # the checkout drops what it computes there
    found = []
    for model in (theirs, ours):
        model.zero_grad()
        given = (x if model is theirs else latent).clone().requires_grad_()
        if model is theirs:
            out = model([given[0]], every, [text[0]], 3 * frame)[0][None]
        else:
            condition = first if image else None
            out = model(given, torch.tensor([437.5]), model.embed_context(text), condition)
        (out * direction).sum().backward()
        start = int(image)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((out[:, :, start:].detach(), given.grad[:, :, start:], gradients))
    (want, want_dx, theirs_of), (got, dx, ours_of) = found
    # The bias of keys has no gradient but rounding: the softmax drops it.
    least = 1e-3 * max(a.norm() for a in theirs_of.values())
    worst = max(distance(ours_of[name], a, least) for name, a in theirs_of.items())
    return max(distance(got, want), distance(dx, want_dx), worst)


def main() -> int:
    """Exit code 0 if both modes are within the limit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("dir", type=Path, help="a checkout of Wan2.2")
    torch.manual_seed(0)
    pair, failed = models(parser.parse_args().dir), False
    for mode in ("text", "image"):
        worst = check(*pair, mode == "image")
        failed |= not worst <= LIMIT
        print(f"{mode} mode: largest relative distance {worst:.1e}, want at most {LIMIT:.0e}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
