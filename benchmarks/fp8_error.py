"""How far fp8 attention and the fp8 linear layer are from float64, at the lengths of the models.

    python benchmarks/fp8_error.py [--keys 512 4096 32760 75600] [--queries 16] [--rows 32]

Runs on the CPU. "exact sums" adds the products of e4m3 values in float32: what quantisation alone
costs. The other columns emulate the accumulator of Hopper's fp8 tensor cores (`hopper_product`:
14 bits, cut toward zero): in two levels as our kernel and torch._scaled_mm without fast accumulation
do, every 128 products moved to float32, and in one level, the accumulator kept in the tensor core.
An emulation after published measurements, not a measurement on a GPU.
"""

import argparse

import torch
from torch import Tensor

from prfl_bench.hopper_product import hopper_product
from prfl_kernels.attention.fp8 import attention_fp8_reference, quantize_values
from prfl_kernels.fp8.e4m3 import quantize_rows
from prfl_kernels.fp8.linear import quantize_weight

HEAD_DIM = 128
PROMOTED = 128  # products that the tensor core adds before they move to float32
COLUMNS = ("bf16", "exact sums", "two levels", "one level")


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [1, L, 1, D] tensors in float64."""
    q, k, v = (a[0, :, 0].double() for a in (q, k, v))
    return ((q @ k.T * HEAD_DIM**-0.5).softmax(-1) @ v)[None, :, None]


def attention_errors(keys: int, queries: int, sharpness: float, mean: float) -> list[float]:
    """The columns for normal q and k of unit root mean square, scores of deviation `sharpness`."""
    q, k, v = (torch.randn(1, n, 1, HEAD_DIM) for n in (queries, keys, keys))
    q, k = (a / a.square().mean(-1, keepdim=True).sqrt() * sharpness**0.5 for a in (q, k))
    v = v + mean
    want = exact_attention(q, k, v)
    half = [a.bfloat16() for a in (q, k, v)]
    s = (half[0][0, :, 0].float() @ half[1][0, :, 0].float().T) * HEAD_DIM**-0.5
    p = (s - s.amax(-1, keepdim=True)).exp()
    bf16 = p.bfloat16().float() @ half[2][0, :, 0].float() / p.sum(-1, keepdim=True)
    inputs = *quantize_rows(q), *quantize_rows(k), *quantize_values(v), HEAD_DIM**-0.5
    found = [bf16[None, :, None], attention_fp8_reference(*inputs)[0]]
    for two_level in (True, False):
        found.append(attention_fp8_reference(*inputs, hopper_product, two_level)[0])
    return [error(a, want) for a in found]


def promoted_product(a: Tensor, b: Tensor) -> Tensor:
    parts = [slice(k, k + PROMOTED) for k in range(0, a.shape[1], PROMOTED)]
    return sum(hopper_product(a[:, part], b[part]) for part in parts)


def linear_errors(width: int, rows: int, activation: str) -> list[float]:
    """The columns for rows of normal values (after GELU if so named) and a weight of 128 rows."""
    x, w = torch.randn(rows, width), torch.randn(128, width) * width**-0.5
    if activation == "gelu":
        x = torch.nn.functional.gelu(x, approximate="tanh")
    want = x.double() @ w.double().T
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_weight(w)
    found = [x.bfloat16().float() @ w.bfloat16().float().T]
    for product in (torch.matmul, promoted_product, hopper_product):
        found.append(product(x8.float(), w8.float().T) * x_scale[:, None] * w_scale)
    return [error(a, want) for a in found]


def line(name: str, errors: list[float]) -> None:
    print(f"{name:34}" + "".join(f"{e:12.2e}" for e in errors), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 4096, 32760, 75600])
    parser.add_argument("--queries", type=int, default=16, help="sampled query rows")
    parser.add_argument("--rows", type=int, default=32, help="sampled rows of the linear layers")
    args = parser.parse_args()
    print("relative L2 error against float64; the last two columns are emulated")
    print(f"{'attention, one head of 128':34}" + "".join(f"{name:>12}" for name in COLUMNS))
    for sharpness, mean in ((1.0, 0.0), (1.0, 1.0), (3.0, 0.0), (3.0, 1.0)):
        for keys in args.keys:
            torch.manual_seed(0)
            name = f"{keys:6} keys, scores {sharpness:g}, values {mean:g} +- 1"
            line(name, attention_errors(keys, args.queries, sharpness, mean))
    print(f"{'linear':34}" + "".join(f"{name:>12}" for name in COLUMNS))
    for width, activation in ((5120, "normal"), (13824, "normal"), (13824, "gelu")):
        torch.manual_seed(0)
        line(f"K = {width:5}, {activation}", linear_errors(width, args.rows, activation))


if __name__ == "__main__":
    main()
