"""A diffusers Wan transformer as it is and patched: seconds of forward and backward, and exact live bytes.

    python benchmarks/bench_patch.py [--dtype bfloat16] [--image] [--rows original attention ...] [--out FILE]

Rows: the original, with its own gradient checkpointing, and patched under each policy of recompute. float32
computes in float32, bfloat16 under autocast with weights in float32. First the gate: result and gradients of
every row against the original's in float32, each as one vector. In float32 they must be within 1e-5; in
bfloat16 no further from float32 than the original by a fifth. Then every row runs in turn, `--repeat` times;
medians are printed. Bytes are the most that live in a step over weights and gradients, counted in a step of
its own (LiveBytes). The size by default, width 512, 4 blocks and 1,080 tokens, is for two CPU cores.
"""

import argparse
import copy
import json
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from prfl_bench.timing import machine, measure
from prfl_engine.files import write_whole
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.patch import accelerate, report_of
from prfl_engine.paths import a_path
from prfl_kernels import extension

ORIGINAL, CHECKPOINTED = "original", "original, checkpointed"
ROWS = (ORIGINAL, CHECKPOINTED, "none", "attention", "full")
LIMIT, FACTOR = 1e-5, 1.2


def build(args: argparse.Namespace) -> nn.Module:
    """The transformer with random weights."""
    if find_spec("diffusers") is None:
        raise SystemExit("bench_patch: needs diffusers (pip install diffusers)")
    from diffusers import WanTransformer3DModel

    image = dict(image_dim=1280, added_kv_proj_dim=args.width) if args.image else {}
    model = WanTransformer3DModel(
        num_attention_heads=args.heads, attention_head_dim=args.width // args.heads, ffn_dim=args.ffn,
        num_layers=args.blocks, in_channels=36 if args.image else 16, out_channels=16, text_dim=64,
        **image,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5
    return model.to(args.device)


class Step:
    """Forward and backward of every row, from the same weights and inputs."""

    def __init__(self, args: argparse.Namespace):
        self.model, self.device, self.low = build(args), args.device, args.dtype == "bfloat16"
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(args.device)

        clip = normal(1, 257, 1280) if args.image else None
        t = torch.tensor([637.0], device=args.device)
        self.inputs = normal(1, 36 if args.image else 16, *args.latent), t, normal(1, 512, 64), clip
        self.direction = normal(1, 16, *args.latent)
        self.models = {row: self._made(row) for row in args.rows}

    def _made(self, row: str) -> nn.Module:
        model = copy.deepcopy(self.model).train()
        if row == CHECKPOINTED:
            model.enable_gradient_checkpointing()
        elif row != ORIGINAL:
            accelerate(model, row)
        return model

    def run(self, model: nn.Module, low: bool) -> Tensor:
        """The result, gradients left in .grad."""
        model.zero_grad(set_to_none=False)
        with torch.autocast(self.device, torch.bfloat16, enabled=low):
            made = model(*self.inputs, return_dict=False)[0]
        made.backward(self.direction.to(made.dtype))
        return made.detach()

    def outcome(self, model: nn.Module, low: bool) -> tuple[Tensor, Tensor]:
        """(result, all gradients as one vector)."""
        made = self.run(model, low)
        return made, torch.cat([p.grad.flatten() for p in model.parameters()])

    def prepared(self, row: str) -> Callable[[], Callable[[], object]]:
        """What timing.measure takes."""
        return lambda: lambda: self.run(self.models[row], self.low)

    def peak(self, row: str) -> int:
        """Most live bytes over those of weights and gradients."""
        model, live = self.models[row], LiveBytes(512)
        self.run(model, self.low)
        live.add([a for p in model.parameters() for a in (p, p.grad)])
        live.add(a for a in (*self.inputs, self.direction) if a is not None)
        with live:
            before = live.now
            self.run(model, self.low)
        return live.peak - before


def gate(step: Step) -> None:
    """Stop unless every row computes what the original does, by our operations alone."""

    def distances(got, want) -> list[float]:
        return [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]

    exact, limits = step.outcome(step.model, False), [LIMIT, LIMIT]
    if step.low:
        limits = [FACTOR * d for d in distances(step.outcome(step.model, True), exact)]
    for row, model in step.models.items():
        found = distances(step.outcome(model, step.low), exact)
        print(f"gate: {row}: result and gradients within {found[0]:.1e} and {found[1]:.1e}", flush=True)
        if not all(a <= b for a, b in zip(found, limits, strict=True)):
            raise SystemExit(f"gate failed, want {limits[0]:.1e} and {limits[1]:.1e}: no times are printed")
        if row not in (ORIGINAL, CHECKPOINTED) and report_of(model).fallbacks:
            raise SystemExit(f"gate failed: {row}: {dict(report_of(model).fallbacks)}")


def main(argv: list[str] | None = None) -> None:
    """Gate, then a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--image", action="store_true")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=1408)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--latent", type=int, nargs=3, default=(9, 24, 20), metavar=("T", "H", "W"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    extension.keep_freed_memory()
    step = Step(args)
    gate(step)
    where, rows = f"{machine(args.device)}, torch {torch.__version__}, {args.dtype}", []
    print(where, f"{'':30}{'seconds':>10}{'MiB':>10}", sep="\n")
    times = measure({row: step.prepared(row) for row in args.rows}, args.device, args.repeat)
    for row, found in times.items():
        seconds = "no memory" if found is None else f"{found.median:.3f}"
        name = row if row.startswith(ORIGINAL) else f"patched, recompute {row}"
        peak = step.peak(row)
        print(f"{name:30}{seconds:>10}{peak / 2**20:>10.1f}")
        rows.append({"name": name, "seconds": found and found._asdict(), "bytes": peak})
    if args.out is not None:
        write_whole(args.out, json.dumps({"machine": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
