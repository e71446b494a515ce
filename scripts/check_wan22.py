"""Compares both experts of Wan2.2 A14B in one chain with a checkout of Wan2.2 that you have.

    .venv/bin/python scripts/check_wan22.py DIR [--steps 10] [--golden FOLDER]

Two small models of the official class with random weights, text-to-video and image-to-video, are saved as the
official folders are and loaded here. Then a whole chain runs twice, guided with a scale for each expert: by
the official models and sampler, one sample at a time, and by prfl_engine's chain. Everything is float32 on
the CPU. Velocities of either expert, the norms of their gradients, and the latents after every step must be
within 1e-5 (relative L2).
--golden writes the models, inputs and official values, as tests/golden/wan22 holds them. One thing of the
checkout is replaced, since it runs on CUDA alone: its attention function, by torch's. Exit code 1 if a check
fails.
"""

import argparse
import math
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl_bench.peer import load_module, new_folder
from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.model.experts import HIGH, LOW, Experts
from prfl_engine.model.wan import WanConfig
from prfl_engine.objectives import chain_velocity
from prfl_engine.patch.structure import attend
from prfl_engine.paths import a_path

LIMIT = 1e-5
LATENT, TOKENS = (16, 2, 4, 4), 5
SIZES = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=12, text_len=6, freq_dim=16)
# Boundary and shift of the official configurations, and their scales for the high- and the low-noise expert.
KINDS = {"t2v": (0.875, 12.0, (4.0, 3.0)), "i2v": (0.9, 5.0, (3.5, 3.5))}


def expert(kind: type[nn.Module], image: bool, seed: int) -> nn.Module:
    """A small official model with random values in every parameter."""
    model = kind(model_type="i2v" if image else "t2v", in_dim=36 if image else 16, out_dim=16, **SIZES)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        center = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
        spread = 0.2 if p.dim() == 1 else p[0].numel() ** -0.5
        p.data = center + spread * torch.randn(p.shape, generator=generator)
    return model.eval()


def save(model: nn.Module, image: bool, folder: Path) -> None:
    """A native folder of an official model."""
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = WanConfig("i2v" if image else "t2v", in_dim=36 if image else 16, clip=False, **SIZES)
    config.to_json(folder / "config.json")


def inputs(image: bool) -> dict[str, Tensor]:
    """Noise, prompt, negative text and, for an image, the condition, of one sample."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {"noise": normal(1, *LATENT), "text": normal(1, TOKENS, 12), "negative": normal(1, 3, 12)}
    return made | ({"condition": normal(1, 20, *LATENT[1:])} if image else {})


def norms(model: nn.Module, velocity: Tensor) -> Tensor:
    """The norms of the parameters' gradients of sum(v^2), by name; without key biases, whose own is 0."""
    velocity.square().sum().backward()
    named = sorted((k, p.grad) for k, p in model.named_parameters() if not k.endswith(".k.bias"))
    return torch.stack([g.norm() for _, g in named])


@torch.no_grad()
def theirs(pair: list[nn.Module], solver: type, kind: str, given: dict[str, Tensor], steps: int):
    """{name: value} of the official models and sampler."""
    boundary, shift, scales = KINDS[kind]
    sampler = solver(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
    sampler.set_timesteps(steps, device="cpu", shift=shift)
    tokens = math.prod(LATENT[1:]) // 4
    y = [given["condition"][0]] if "condition" in given else None

    def velocity(model: nn.Module, x: Tensor, t: Tensor, text: str) -> Tensor:
        return model([x[0]], t.view(1), [given[text][0]], tokens, y=y)[0][None]

    x, found = given["noise"], {"timesteps": sampler.timesteps.float()}
    for name, model in zip(("high", "low"), pair, strict=True):
        with torch.enable_grad():
            v = velocity(model, x, torch.tensor([437.0]), "text")
            found |= {f"velocity_{name}": v.detach(), f"gradients_{name}": norms(model, v)}
    for i, t in enumerate(sampler.timesteps):
        high = t.item() >= 1000 * boundary
        model, scale = pair[not high], scales[not high]
        base = velocity(model, x, t, "negative")
        v = base + scale * (velocity(model, x, t, "text") - base)
        x = sampler.step(v, t, x, return_dict=False)[0]
        found[f"latent_{i + 1}"] = x
    return found


@torch.no_grad()
def ours(experts: Experts, kind: str, given: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """The same values by this engine."""
    boundary, shift, scales = KINDS[kind]
    schedule = flow.make_schedule("unipc", steps, shift)
    batch = Batch(given["noise"], given["text"], None, given.get("condition"))
    found = {"timesteps": schedule.timesteps}
    for name, model in (("high", experts.high), ("low", experts.low)):
        with torch.enable_grad():
            v = model(batch.latent, torch.tensor([437.0]), model.embed_context(batch.text), batch.condition)
            found |= {f"velocity_{name}": v.detach(), f"gradients_{name}": norms(model, v)}
    scale = Scales(*scales, 1000 * boundary)
    velocity = chain_velocity(experts, batch, Guidance(given["negative"][0], scale, scale))
    state = flow.init_state(batch.latent)
    for i in range(steps):
        state = chain.advance(velocity, schedule, state, torch.tensor([i]), torch.arange(1))
        found[f"latent_{i + 1}"] = state.x
    return found


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 distance, and of which value."""
    return max(((got[k] - a).norm().item() / a.norm().item(), k) for k, a in want.items())


def check(folder: Path, steps: int, golden: Path | None) -> bool:
    """Whether everything agrees; a line for each kind of model."""
    code = load_module(folder, "wan.modules.model")
    code.flash_attention = attend
    solver = load_module(folder, "wan.utils.fm_solvers_unipc").FlowUniPCMultistepScheduler
    good = True
    for kind, (boundary, *_) in KINDS.items():
        image, made = kind == "i2v", []
        pair, given = [expert(code.WanModel, image, seed) for seed in (0, 1)], inputs(image)
        want = theirs(pair, solver, kind, given, steps)
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) if golden is None else golden / kind
            for name, model in zip((HIGH, LOW), pair, strict=True):
                save(model, image, out / name)
                made.append(load_transformer(out / name))
            if golden is not None:
                save_file(given, out / "inputs.safetensors")
                save_file({k: a.contiguous() for k, a in want.items()}, out / "expected.safetensors")
        error, where = worst(ours(Experts(*made, boundary), kind, given, steps), want)
        high = int((want["timesteps"] >= 1000 * boundary).sum())
        print(f"{kind}-a14b: {steps} steps, {high} of the high-noise expert: {error:.1e} at most, in {where}")
        good &= error <= LIMIT
    return good


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=a_path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of the chain")
    parser.add_argument("--golden", type=new_folder, metavar="FOLDER", help="a new folder")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # official code asks for CUDA's autocast
    return 0 if check(args.folder, args.steps, args.golden) else 1


if __name__ == "__main__":
    sys.exit(main())
