"""One step of RGB ReFL beside one of PRFL: seconds of every phase and exact live bytes, by number of frames.

    python benchmarks/bench_rgb_refl.py [--frames 5 9 17 33] [--repeat 3] [--out FILE]

Both take the step of bench_step.py: flow matching, a rollout without gradient, one graded step, the reward,
backward, clipping and AdamW, with the same policy, solver and data. PRFL scores the noisy latent after the
graded step by a latent reward model of two blocks. RGB ReFL decodes the x_0 that the step predicts, by
diffusers' AutoencoderKLWan with random weights, and scores frames by a small network: the first frame or all,
at the last step of the chain or at the step that PRFL grades (--index, which stands for a random one).

First the gates, at the fewest frames. PRFL: losses and gradients against plain torch, as in bench_step.py.
RGB: the gradient in float64 on plain torch against a central difference along a random direction, and the
measured gradient in float32 against that in float64. Then every row takes two steps in turn, --repeat times,
of which the second counts; medians are printed. Bytes are the most that live in a step before the optimizer,
over weights and gradients (LiveBytes).

The size is for two CPU cores: float32, a policy of width 512 and 8 blocks that are recomputed, 96 x 128
pixels. The decoder is so narrow that its share of the policy's FLOPs, which is printed, is near that at 14B
and 480p (0.16). Convolutions of so few channels run far below the rate of matrix products, so the seconds of
RGB ReFL are more here than that share says.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prfl_bench import bench_step, rgb
from prfl_bench.bench_step import PHASES, Setting, Step
from prfl_bench.rgb import FRAMES, FrameReward, PixelJudge, graded_pixels, predicted, vae_decoder
from prfl_bench.timing import machine
from prfl_engine import chain
from prfl_engine.config import LossConfig
from prfl_engine.files import write_whole
from prfl_engine.memory import recompute
from prfl_engine.memory.policy import named
from prfl_engine.model.flops import forward_work
from prfl_engine.objectives import bind, reward_loss
from prfl_engine.paths import a_path
from prfl_kernels import dispatch, extension

PRFL = "PRFL"
PLACES = ("random", "last")  # of the graded step
LIMIT = 1e-4  # of losses, relative; of gradients, relative L2, ten times that


class Row(NamedTuple):
    """What is measured; the fields from `recompute` on are those of bench_step.Setting."""

    kernels: str
    reward: str  # PRFL, or the frames that RGB ReFL judges
    place: str
    recompute: str = "none"
    trained: str = "full"
    sft_every: int = 1

    @property
    def setting(self) -> Setting:
        """What PRFL's step of this row is called in bench_step."""
        return Setting(self.kernels, self.trained, self.recompute, 1, "1")

    def __str__(self) -> str:
        name = PRFL if self.reward == PRFL else f"RGB ReFL, {self.reward} frame{'s' * (self.reward == 'all')}"
        return f"{name}, {self.place} step"


def rows(kernels: str, mode: str) -> list[Row]:
    """PRFL, which does not grade the last step of a chain, then RGB ReFL."""
    pixels = [Row(kernels, *how, mode) for how in product(FRAMES, PLACES)]
    return [Row(kernels, PRFL, "random", mode), *pixels]


class RGBStep(Step):
    """The step of bench_step, and beside it that of RGB ReFL with the same models and data."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan(base_dim=args.decoder_width, z_dim=16)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.network = FrameReward().to(self.device).requires_grad_(False)
        self.frozen += [self.vae, self.network]

    def place(self, row: Row) -> Tensor:
        """The graded step [1] of a row."""
        return torch.tensor([self.steps - 1 if row.place == "last" else self.index])

    def judge(self, frames: str, dtype: torch.dtype = torch.float32) -> PixelJudge:
        """What judges the frames, its weights in a dtype."""
        vae, network = self.vae, self.network
        if dtype != torch.float32:
            vae, network = (nn.Module.to(copy.deepcopy(m), dtype) for m in (vae, network))
            for module in vae.modules():
                if isinstance(module, nn.Upsample):  # diffusers rounds to float32 in it
                    module.forward = partial(nn.Upsample.forward, module)
        return PixelJudge(vae_decoder(vae), network, frames)

    def _losses(self, row: Row | Setting, sft: bool) -> Iterator[tuple[Tensor, Callable[[], None]]]:
        if isinstance(row, Setting) or row.reward == PRFL:
            yield from super()._losses(row if isinstance(row, Setting) else row.setting, sft)
            return
        run = recompute.run_under(named(row.recompute, self.keep))
        dispatch.configure(row.kernels)
        if sft:
            yield next(super()._losses(row.setting, True))
        model, judge = self.model(row), self.judge(row.reward)
        logit = graded_pixels(model, judge, self.schedule, self.batch, self.noise, self.place(row), run)
        loss = reward_loss(logit, LossConfig()).mean()
        yield loss, loss.backward

    def exact(self, row: Row) -> Tensor:
        """The gradient of a row in float64 on plain torch, checked against a central difference."""
        dispatch.configure("reference")
        policy = copy.deepcopy(self.policy)
        policy.load_state_dict(self.start["full"])
        policy = policy.double().set_precision(torch.float64)
        batch = self.batch._replace(latent=self.batch.latent.double(), text=self.batch.text.double())
        index, judge = self.place(row), self.judge(row.reward, torch.float64)
        state = chain.rollout(bind(policy, batch), self.schedule, self.noise.double(), index)

        def loss() -> Tensor:
            logit = judge(predicted(bind(policy, batch), self.schedule, state, index))
            return reward_loss(logit, LossConfig()).mean()

        parameters = list(policy.parameters())
        rgb.gate(loss, parameters, f"{row}, float64")
        return torch.cat([p.grad.flatten() for p in parameters])


def gate(step: RGBStep, chosen: Iterable[Row]) -> None:
    """Stop unless PRFL agrees with plain torch, and RGB ReFL's gradient with a finite difference."""
    for row in chosen:
        if row.reward == PRFL:
            bench_step.gate(step, [row.setting._replace(kernels="reference"), row.setting], LIMIT)
            continue
        want = step.exact(row)
        error = ((step.gradients(row, sft=False)[1].double() - want).norm() / want.norm()).item()
        print(f"gate: {row}, {row.kernels}: gradients within {error:.1e} of float64", flush=True)
        if not error < 10 * LIMIT:
            raise SystemExit(f"gate failed, want {10 * LIMIT}: no times are printed")


def share(step: RGBStep) -> float:
    """FLOPs of a decoder's forward over those of the policy's."""
    latent = step.batch.latent.to("meta")
    with FlopCounterMode(display=False) as counted:
        vae_decoder(copy.deepcopy(step.vae).to("meta"))(latent)
    config = step.policy.config
    tokens = latent[0, 0].numel() // 4
    return counted.get_total_flops() / forward_work(config, config.num_layers, tokens).forward


def table(found: list[dict]) -> Iterable[str]:
    """The lines of the rows; multiples are of PRFL with as many frames."""
    yield f"{'frames':>6}  {'':34}" + "".join(f"{p:>20}" for p in PHASES) + (
        f"{'step':>8}{'of PRFL':>9}{'MiB':>9}{'of PRFL':>9}"
    )
    for row in found:
        base = next(r for r in found if r["frames"] == row["frames"] and r["reward"] == PRFL)
        phases = "".join(f"{s:20.3f}" for s in row["seconds"].values())
        yield f"{row['frames']:6}  {row['name']:34}{phases}" + (
            f"{row['step']:8.3f}{row['step'] / base['step']:9.2f}"
            f"{row['bytes'] / 2**20:9.1f}{row['bytes'] / base['bytes']:9.2f}"
        )


def measured(step: RGBStep, chosen: list[Row], frames: int, repeat: int) -> list[dict]:
    """A dictionary for each row at a number of frames."""
    runs: dict[Row, list[list[float]]] = {row: [] for row in chosen}
    for _, row in product(range(repeat), chosen):
        runs[row].append(step.seconds(row))
    found = []
    for row in chosen:
        phases = [statistics.median(column) for column in zip(*runs[row], strict=True)]
        total = statistics.median(map(sum, runs[row]))
        what = {"frames": frames, "name": str(row), "reward": row.reward, "place": row.place}
        seconds = dict(zip(PHASES, phases, strict=True))
        found.append(what | {"seconds": seconds, "step": total, "bytes": step.peak(row)})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", nargs="+", type=int, default=[5, 9, 17, 33], metavar="N")
    parser.add_argument("--size", nargs=2, type=int, default=[96, 128], metavar=("H", "W"), help="pixels")
    parser.add_argument("--kernels", default="cpu", metavar="CHOICE")
    parser.add_argument("--recompute", default="full", metavar="MODE", help="model.recompute of both")
    parser.add_argument("--keep", default="nothing", metavar="MODE", help="model.keep of both")
    parser.add_argument("--repeat", type=int, default=3)
    for name, value in (
        ("width", 512), ("ffn", 2048), ("heads", 4), ("blocks", 8), ("steps", 10), ("index", 6),
        ("decoder-width", 4),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=a_path, metavar="FILE", help="also as JSON")
    args = parser.parse_args(argv)
    height, width = args.size
    for name, good, want in (
        ("--frames", all(n > 0 and n % 4 == 1 for n in args.frames), "numbers 1 + 4 k"),
        ("--size", height > 0 and width > 0 and height % 16 == width % 16 == 0, "multiples of 16"),
        ("--index", 0 <= args.index < args.steps - 1, f"0 to {args.steps - 2}"),
    ):
        if not good:
            raise SystemExit(f"{name}: got {getattr(args, name[2:])}, want {want}")
    vars(args).update(dtype="float32", rank=1, peer=None)
    extension.keep_freed_memory()
    chosen, found, shares = rows(args.kernels, args.recompute), [], {}
    for frames in sorted(args.frames):
        args.latent = (frames // 4 + 1, height // 8, width // 8)
        step = RGBStep(args)
        if not found:
            gate(step, chosen)
        shares[frames] = share(step)
        found += measured(step, chosen, frames, args.repeat)
        print(f"{frames} frames: the decoder has {shares[frames]:.2f} of the policy's FLOPs", flush=True)
    where = f"{machine(step.device)}, torch {torch.__version__}, float32, recompute {args.recompute}"
    print("", f"{where}; seconds, median of {args.repeat}", *table(found), sep="\n")
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "latent", "peer", "rank")}
        content = {"machine": where, "settings": settings, "decoder_share": shares, "rows": found}
        write_whole(args.out, json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
