"""Checks prfl_engine.patch on the transformer of a checkout that you have.

    .venv/bin/python scripts/check_patch.py DIR [--device cuda]

DIR is a checkout of HY-Video-PRFL, Wan2.1, Wan2.2 or VideoX-Fun; without it, the diffusers that is installed
is checked. Small models with random weights, text-to-video and image-to-video, run as they are and patched,
and where every token has a timestep of its own also with 0 for the first frame, as TI2V has it: values and
all gradients in float32, also under checkpointing of blocks, must be within 1e-5, and under bfloat16 autocast
no further from float32 than the original by a fifth. Two things of a checkout are replaced in both runs,
since they run on CUDA alone or round to 16 bits: its attention function by torch's in the dtype of its
tensors, and its autocast of CUDA by the device's. Exit code 1 if a check fails.
"""

import argparse
import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prfl_bench.peer import load_module
from prfl_bench.stand_ins import standing_in
from prfl_engine.errors import UserError
from prfl_engine.patch import accelerate
from prfl_engine.patch.structure import attend
from prfl_engine.paths import a_path

LAYOUTS = {  # file: class of the transformer
    "diffusers_lite/wan/modules/model.py": "WanModel",
    "wan/modules/model.py": "WanModel",
    "videox_fun/models/wan_transformer3d.py": "WanTransformer3DModel",
}
LIMIT, FACTOR = 1e-5, 1.2
LATENT, TEXT = (3, 8, 6), 512


def official(folder: Path, device: torch.device) -> type[nn.Module]:
    """The class of a checkout's transformer."""
    file = next((name for name in LAYOUTS if (folder / name).is_file()), None)
    if file is None:
        raise SystemExit(f"{folder}: has none of {', '.join(LAYOUTS)}")
    with standing_in("einops"):  # HY-Video-PRFL imports it, and uses it elsewhere
        code = load_module(folder, file.removesuffix(".py").replace("/", "."))
    for name in ("flash_attention", "attention"):
        if hasattr(code, name):
            setattr(code, name, attend)
    wide = types.SimpleNamespace(autocast=lambda *_, **__: torch.autocast(device.type, enabled=False))
    if hasattr(code, "amp"):
        code.amp = wide
    elif hasattr(code, "torch"):  # Wan2.2 says torch.amp
        code.torch = types.SimpleNamespace(**vars(torch) | {"amp": wide})
    return getattr(code, LAYOUTS[file])


def official_model(kind: type[nn.Module], image: bool) -> nn.Module:
    """A small one."""
    model = kind(
        model_type="i2v" if image else "t2v", dim=96, ffn_dim=160, num_heads=2, num_layers=2, freq_dim=32,
        text_dim=24, in_dim=36 if image else 16, out_dim=16,
    )  # fmt: skip
    if not hasattr(model, "enable_teacache"):
        kind.enable_teacache = False  # as HY-Video-PRFL's pipelines set it
    return model


def diffusers_model(image: bool) -> nn.Module:
    """A small one of diffusers."""
    from diffusers import WanTransformer3DModel

    images = dict(in_channels=36, image_dim=1280, added_kv_proj_dim=96) if image else dict(in_channels=16)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=48, out_channels=16, text_dim=24, freq_dim=32, ffn_dim=160,
        num_layers=2, **images,
    )  # fmt: skip


def randomized(model: nn.Module) -> nn.Module:
    """Random values in every parameter."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        center = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
        spread = 0.2 if p.dim() == 1 else p[0].numel() ** -0.5
        p.data = center + spread * torch.randn(p.shape, generator=generator)
    return model


def velocity(model: nn.Module, x: Tensor, inputs: dict[str, Tensor | None]) -> Tensor:
    """[B, 16, T, h, w], by the arguments of the model's codebase."""
    t, text, clip, condition = (inputs[k] for k in ("t", "text", "clip", "condition"))
    tokens = x[0, 0].numel() // 4
    if inputs["fixed"]:
        t = t[:, None].repeat(1, tokens)
        t[:, : tokens // LATENT[0]] = 0
    if hasattr(model, "condition_embedder"):
        x = x if condition is None else torch.cat([x, condition], 1)
        return model(x, t, text, clip, return_dict=False)[0]
    more = {} if condition is None else {"y": list(condition)}
    more |= {} if clip is None or not hasattr(model, "img_emb") else {"clip_fea": clip}
    if tokenwise(model) and t.dim() == 1:
        t = t[:, None].expand(-1, tokens)  # Wan2.2 spreads the timestep of a single sample alone
    return torch.stack(list(model(x, t, list(text), tokens, **more)))


def tokenwise(model: nn.Module) -> bool:
    """Whether it takes a timestep for every token."""
    return "clip_fea" not in inspect.signature(type(model).forward).parameters


def outcome(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """Result, and gradients of every parameter and of the latent."""
    model.zero_grad()
    x = inputs["x"].clone().requires_grad_()
    made = velocity(model, x, inputs)
    made.backward(inputs["direction"].to(made.dtype))
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"result": made.detach(), "x": x.grad} | grads


def distances(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, float]:
    """Relative L2 distance of the result, and the largest of a gradient: relative to its norm, or to a
    hundredth of the largest where it is smaller."""
    floor = 1e-2 * max(a.norm().item() for a in want.values())
    far = {k: (got[k].double() - a.double()).norm().item() for k, a in want.items()}
    result = far.pop("result") / want["result"].norm().item()
    return result, max(d / max(want[k].norm().item(), floor) for k, d in far.items())


def everything(found: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, float]:
    """Relative L2 distance of the result, and of all gradients as one."""
    result = (found["result"] - want["result"]).norm() / want["result"].norm()
    parts = [torch.cat([v.flatten() for k, v in d.items() if k != "result"]) for d in (found, want)]
    return result.item(), ((parts[0] - parts[1]).norm() / parts[1].norm()).item()


def checkpointed(model: nn.Module) -> None:
    """Recompute every block in backward."""
    for block in model.blocks:
        run = block.forward
        block.forward = lambda *a, run=run, **k: checkpoint(run, *a, use_reentrant=False, **k)


def checks(model: nn.Module, inputs: dict) -> Iterator[tuple[str, tuple[float, float], tuple[float, float]]]:
    """(what, distances, limits)."""
    device = inputs["x"].device
    want = outcome(model, inputs)
    patched = copy.deepcopy(model)
    report = accelerate(patched)
    yield "float32", distances(outcome(patched, inputs), want), (LIMIT, LIMIT)
    if tokenwise(model):
        fixed = inputs | {"fixed": True}
        got = distances(outcome(patched, fixed), outcome(model, fixed))
        yield "float32, first frame at 0", got, (LIMIT, LIMIT)
    with torch.autocast(device.type, torch.bfloat16):
        low, ours = outcome(model, inputs), outcome(patched, inputs)
    limits = tuple(FACTOR * d for d in everything(low, want))
    yield "bfloat16 autocast", everything(ours, want), limits
    checkpointed(patched)
    yield "float32, checkpointed", distances(outcome(patched, inputs), want), (LIMIT, LIMIT)
    if report.fallbacks:
        yield f"calls by the original code: {dict(report.fallbacks)}", (1.0, 1.0), (0.0, 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each check; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=a_path, metavar="DIR")
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args(arguments)
    build: Callable[[bool], nn.Module] = diffusers_model
    if args.folder is not None:
        kind = official(args.folder.resolve(), args.device)

        def build(image: bool) -> nn.Module:
            return official_model(kind, image)

    failed = False
    for image in (False, True):
        model = randomized(build(image)).to(args.device)
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(args.device)

        inputs = dict(
            x=normal(2, 16, *LATENT), t=torch.tensor([900.0, 30.0], device=args.device),
            text=normal(2, TEXT, 24), clip=normal(2, 257, 1280) if image else None,
            condition=normal(2, 20, *LATENT) if image else None, direction=normal(2, 16, *LATENT),
            fixed=False,
        )  # fmt: skip
        try:
            for what, got, limits in checks(model, inputs):
                good = all(a <= b for a, b in zip(got, limits, strict=True))
                failed |= not good
                numbers = ", ".join(f"{a:.1e} (limit {b:.1e})" for a, b in zip(got, limits, strict=True))
                name = "image-to-video" if image else "text-to-video"
                print(f"{'pass' if good else 'FAIL'}  {name}, {what}: result, gradients {numbers}")
        except UserError as error:
            print(f"FAIL  {error}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
