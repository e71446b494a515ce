"""How far AdamW with 8-bit moments is from AdamW with float32 moments.

    python benchmarks/adamw8bit_error.py [--groups 64] [--steps 300]

Runs on the CPU; needs torchao. Gradients span 1e-4 to 1 in every group of 256 values, which share a scale;
the largest is always there. Both optimizers see the same gradients, so updates can be compared one by one:
"worst" is the largest update in learning rates, "error" the L2 norm of the difference over that of the
float32 updates, and "size" the mean absolute update over that of float32, the last two over the last 20
steps. Rows:

    second moment      v in 8 bits, as in torchao and bitsandbytes
    , bounded          v raised to m^2 / K^2 (EightBits)
    , rounded up       to the next code, so never to 0
    root               sqrt(v) in 8 bits
    root, bounded      what optim.name=adamw8bit does, by its own code

The last table trains: 0.5 sum c_i (x_i - y_i)^2 from x = 0, c from 1e-4 to 1 in every group, gradients with
as much noise as signal at the start, learning rate 0.01 with a cosine to 0, four times the steps; mean
|x - y| at the end, |y| being 1.
"""

import argparse
import math

import torch
from torch import Tensor

from prfl_engine.optim.block_adamw import GROUP, EightBits, update_limit

BETAS, EPS = (0.9, 0.999), 1e-8
FLOAT = "float32"
KINDS = ("second moment", "second moment, bounded", "second moment, rounded up", "root", "root, bounded")


class Moments:
    """m and v of one vector, kept as `kind` says; `update` gives AdamW's update in learning rates."""

    def __init__(self, kind: str, n: int):
        self.kind, self.bits, self.step = kind, EightBits(torch.device("cpu"), BETAS), 0
        self.m, self.v = torch.zeros(n), torch.zeros(n)

    def update(self, gradient: Tensor) -> Tensor:
        self.step += 1
        if self.kind.startswith("second") and self.kind.endswith("bounded"):
            self.v = torch.maximum(self.v, self.m.square() / update_limit(BETAS) ** 2)
        m = self.m.lerp(gradient, 1 - BETAS[0])
        v = self.v.lerp(gradient.square(), 1 - BETAS[1])
        if self.kind == "root, bounded":
            self.m, self.v = self.bits.decode(self.bits.encode(m, v))
        elif self.kind == FLOAT:
            self.m, self.v = m, v
        else:
            root = self.kind == "root"
            self.m = self._rounded("exp_avg", m)
            self.v = self._rounded("exp_avg_rms", v.sqrt() if root else v, self.kind.endswith("up"))
            self.v = self.v.square() if root else self.v
        first, second = (1 - beta**self.step for beta in BETAS)
        return (m / first) / ((v / second).sqrt() + EPS)

    def _rounded(self, name: str, value: Tensor, up: bool = False) -> Tensor:
        scaled, scale = self.bits.of.scale_tensor(value, GROUP)
        table = self.bits.tables[name]
        codes = torch.bucketize(scaled, table if up else self.bits.bounds[name]).clamp(max=255)
        return self.bits.of.dequant_with_qmap(codes, table, scale)


def spread(groups: int) -> Tensor:
    """[256 groups] numbers from 1e-4 to 1, log-uniform, 1 in every group."""
    sizes = 10 ** (-4 * torch.rand(groups, GROUP))
    sizes[:, 0] = 1
    return sizes.flatten()


def cases(groups: int, steps: int) -> dict[str, list[Tensor]]:
    sizes = spread(groups)
    noise = [torch.randn(sizes.shape) for _ in range(steps)]
    kept = [torch.rand(sizes.shape) < 0.02 for _ in range(steps)]
    return {
        "the same at every step": [sizes] * steps,
        "noise": [sizes * a for a in noise],
        "signal and as much noise": [sizes * (1 + a) for a in noise],
        "noise in 2 % of the steps": [sizes * a * keep for a, keep in zip(noise, kept, strict=True)],
        "noise, 20 times smaller from a quarter on": [
            sizes * a * (1 if i < steps // 4 else 0.05) for i, a in enumerate(noise)
        ],
    }


def compare(gradients: list[Tensor]) -> dict[str, tuple[float, float, float]]:
    """{kind: (worst, error, size)}"""
    found = {}
    for kind in (FLOAT, *KINDS):
        moments = Moments(kind, len(gradients[0]))
        worst, last = 0.0, []
        for gradient in gradients:
            update = moments.update(gradient)
            worst = max(worst, update.abs().max().item())
            last = [*last[-19:], update]
        last = torch.stack(last)
        if kind == FLOAT:
            want = last
        error, size = (last - want).norm() / want.norm(), last.abs().mean() / want.abs().mean()
        found[kind] = worst, error.item(), size.item()
    return found


def descend(kind: str, groups: int, steps: int) -> float:
    """Mean |x - y| at the end of training 0.5 sum c (x - y)^2."""
    generator = torch.Generator().manual_seed(0)
    c, x, y = spread(groups), torch.zeros(groups * GROUP), torch.ones(groups * GROUP)
    moments = Moments(kind, len(x))
    for step in range(steps):
        noise = torch.randn(x.shape, generator=generator)
        lr = 0.005 * (1 + math.cos(math.pi * step / steps))
        x = x - lr * moments.update(c * (x - y + noise))
    return (x - y).abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--groups", type=int, default=64, help="groups of 256 values (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    for name, gradients in cases(args.groups, args.steps).items():
        print(f"\n{name:42s} {'worst':>9s} {'error':>9s} {'size':>9s}")
        for kind, (worst, error, size) in compare(gradients).items():
            print(f"  {kind:40s} {worst:9.2f} {error:9.3f} {size:9.3f}")
    print(f"\n{'training':42s} {'mean |x - y|':>12s}")
    for kind in (FLOAT, *KINDS):
        torch.manual_seed(0)
        print(f"  {kind:40s} {descend(kind, args.groups, 4 * args.steps):12.4f}")


if __name__ == "__main__":
    main()
