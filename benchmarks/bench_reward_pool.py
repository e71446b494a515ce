"""Reward pooling: folded projections against torch.nn.MultiheadAttention, forward and backward.

    python benchmarks/bench_reward_pool.py [--tokens 4096] [--width 1536] [--dtype float32]

First the gate: output and gradient of both against float64 at a small size. Then both are timed in
turn, weights frozen as in a PRFL step, and the operations of each are counted.
"""

import argparse
import statistics
import time

import torch

from prfl_engine.reward import QueryPool

HEADS = 8


def both(pool: QueryPool, x: torch.Tensor):
    """(folded, peer): functions from the same features to the pooled vector [B, C]."""

    def peer(x: torch.Tensor) -> torch.Tensor:
        queries = pool.queries.expand(len(x), -1, -1)
        out = pool.multihead_attn(queries, x, x, need_weights=False)[0].mean(1)
        return out + pool.queries.mean(0)

    return pool, peer


def run(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return out.detach(), gradient


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def gate(dtype: torch.dtype, device: str) -> None:
    """Stop unless the folded form errs at most twice as much as the peer in this dtype."""
    pool = QueryPool(256, 2, HEADS).requires_grad_(False)
    x = torch.randn(2, 517, 256, dtype=torch.float64)
    want = run(both(pool.double(), x)[1], x)
    errors = []
    for function in both(pool.to(device, dtype), x):
        got = run(function, x.to(device, dtype))
        errors.append([relative(g.cpu(), w) for g, w in zip(got, want, strict=True)])
    print(f"gate, relative error of (output, gradient): folded {errors[0]}, peer {errors[1]}")
    floor = torch.finfo(torch.float32).eps
    if any(f > 2 * max(p, floor) for f, p in zip(*errors, strict=True)):
        raise SystemExit("gate failed: no times are printed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    gate(dtype, device)

    pool = QueryPool(args.width, 1, HEADS).requires_grad_(False).to(device, dtype)
    x = torch.randn(1, args.tokens, args.width, device=device, dtype=dtype)
    seconds: dict[str, list[float]] = {"folded": [], "peer": []}
    for i in range(args.repeat + 1):
        for name, function in zip(seconds, both(pool, x), strict=True):
            start = time.perf_counter()
            run(function, x)
            if device == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - start)
    length, width = args.tokens, args.width
    flops = {"folded": 10 * length * width * HEADS, "peer": 8 * length * width**2}
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {args.dtype}, {length} tokens of width {width}, forward and backward to the features")
    median = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in seconds.items():
        print(
            f"{name:7} {1e3 * median[name]:9.2f} ms ({1e3 * min(found):.2f} to {1e3 * max(found):.2f}), "
            f"{flops[name] / 1e9:8.2f} GFLOP, {flops[name] / median[name] / 1e9:7.1f} GFLOP/s"
        )
    print(f"peer / folded: {median['peer'] / median['folded']:.1f}x")


if __name__ == "__main__":
    main()
