"""torch's float32 products on this CPU and the same in oneDNN: what prfl_kernels.matmul chooses between.

    python benchmarks/bench_matmul.py [--repeat N] [--json FILE]

A linear layer [M, K] -> [M, N] forward and its two gradients, M N K multiplications each. First both ways
have to be as exact as float32 sums of that length are, against float64. Times are medians, taken in turn, out
of cache.
"""

import argparse
import json
from pathlib import Path

import torch

from prfl_bench.timing import machine, measure
from prfl_kernels import matmul

SHAPES = (
    (64, 128, 128), (416, 128, 128), (832, 128, 512), (4096, 128, 512), (1080, 1536, 1536),
    (1080, 1536, 8960),
)  # fmt: skip
GATE = 8  # standard deviations of a sum's rounding error, at most


def cases(m: int, k: int, n: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Operands of y = x W^T, dx = dy W and dW = dy^T x."""
    x, weight, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    return {"y": (x, weight.mT), "dx": (dy, weight), "dW": (dy.mT, x)}


def check(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    """Exit unless a sum of l terms errs by rounding alone: some sqrt(l) half units of its size sqrt(l)."""
    worst = (found - a.double() @ b.double()).abs().max().item()
    limit = GATE * a.shape[1] * torch.finfo(torch.float32).eps
    if worst > limit:
        raise SystemExit(f"{name}: wrong by {worst:.2e}, want at most {limit:.2e}")


def main(argv: list[str] | None = None) -> list[dict]:
    """Print the table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=51)
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    (chosen, why), rows = matmul.choice(), []
    print(f"{machine('cpu')}; oneDNN is {'' if chosen else 'not '}chosen: {why}")
    print(f"{'M x K x N':>18}  {'':2}  torch  oneDNN  GFLOP/s")
    for m, k, n in SHAPES:
        for name, (a, b) in cases(m, k, n).items():
            ways = {"torch": lambda a=a, b=b: a @ b, "oneDNN": lambda a=a, b=b: matmul.onednn(a, b.mT)}
            for way, run in ways.items():
                check(run(), a, b, f"{name} of {m} x {k} x {n} by {way}")
            times = measure({w: lambda run=run: run for w, run in ways.items()}, "cpu", args.repeat)
            rates = {way: 2e-9 * m * k * n / t.median for way, t in times.items()}
            rows.append({"shape": [m, k, n], "product": name, "gflops": rates})
            shape = f"{m} x {k} x {n}"
            print(f"{shape:>18}  {name:2}  {rates['torch']:5.0f}  {rates['oneDNN']:6.0f}", flush=True)
    if args.json:
        found = {"machine": machine("cpu"), "chosen": chosen, "why": why, "rows": rows}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
