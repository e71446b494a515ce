"""One PRFL step: seconds of every phase and exact live bytes, by kernels, recomputation, samples and window.

    python benchmarks/bench_step.py [--dtype bfloat16] [--kernels reference cpu] [--train full lora]
        [--recompute none full] [--samples 1 4] [--window 1 all]
        [--rollout same fp8 cache:0.05 persistent] [--sft-every 1 4] [--repeat 3] [--peer DIR]

The step is that of a training run: flow matching, a rollout without gradient, graded steps, the reward of
their results, backward, clipping and AdamW. With --peer the step of a checkout of HY-Video-PRFL is taken too,
without and with its recomputation of blocks (peer.py). First the gate: losses and gradients of every setting
against the first kernels without recomputation, for the same samples and window. An accelerated rollout goes
elsewhere: there the latent before the graded step is compared with a plain rollout's. That drift depends on
the weights, and these are random. Chains that persist (`persistent`) are taken after their first round, and
gradients of their rewards are compared with those of fresh rollouts at the same noise and index; the range
begins at the noise, so new chains cost nothing either. `--sft-every N` has flow matching in one step of N:
the mean of such N steps is printed. Then every setting takes two steps in turn, `--repeat` times, of which
the second counts, as in a run that takes one after the other; medians are printed, and graded samples a
second. Bytes are the most that live in a step before the optimizer, over weights and gradients, counted in a
step of its own (LiveBytes). With several samples the earlier steps of a window count with the rollout that
follows them. By default the size is small enough for two CPU cores: width 512, 8 blocks, 1,080 tokens, the
graded step at index 6 of 10.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prfl_bench.peer import Peer
from prfl_bench.timing import machine
from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.config import ChainConfig, Config, LoraConfig, LossConfig, OptimConfig, RolloutConfig
from prfl_engine.memory import recompute
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import named
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import new_reward
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.objectives import (
    GradedWindow,
    Grader,
    graded_windows,
    reward_loss,
    sft_loss,
    stratified_indices,
)
from prfl_engine.optim.optimizer import make_optimizer
from prfl_engine.paths import a_path
from prfl_engine.rollout.accelerated import Rollout
from prfl_engine.rollout.persistent import Persistent
from prfl_kernels import dispatch, extension

PHASES = ("flow matching", "rollout and reward", "backward", "optimizer")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


PEER = "peer"  # in the place of kernels
SHIFT, SIGMA = 5.0, 0.637  # of the schedule; noise level of flow matching


class Setting(NamedTuple):
    kernels: str
    trained: str  # full or lora
    recompute: str
    samples: int
    window: str
    rollout: str = "same"  # same, fp8, cache:THRESHOLD or persistent
    sft_every: int = 1

    def __str__(self) -> str:
        steps = "steps" if self.window != "1" else "step"
        trained = "" if self.trained == "full" else f"{self.trained}, "
        rollout = "" if self.rollout == "same" else f", {self.rollout}"
        rollout += "" if self.sft_every == 1 else f", sft 1/{self.sft_every}"
        return (
            f"{self.kernels}, {trained}recompute {self.recompute}, {self.samples} x {self.window} {steps}"
            f"{rollout}"
        )


def rollout_config(how: str) -> RolloutConfig:
    """What --rollout names."""
    name, _, threshold = how.partition(":")
    if name == "cache":
        return RolloutConfig(cache=float(threshold))
    return RolloutConfig(precision=name)


class Step:
    """Models, data and optimizer of a step; every run of a setting starts from the same weights."""

    def __init__(self, args: argparse.Namespace):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        config = WanConfig(
            dim=args.width, ffn_dim=args.ffn, num_heads=args.heads, num_layers=args.blocks, text_dim=256
        )
        self.policy = WanTransformer(config).init_weights().to(device)
        nn.init.normal_(self.policy.head.head.weight, std=0.02)  # drawn as zero, which hides all gradients
        self.reward = new_reward(copy.deepcopy(self.policy), 2, feature_layer=2).to(device).freeze()
        adapted = lora.attach(copy.deepcopy(self.policy), LoraConfig(rank=args.rank))
        for name, p in lora.parameters(adapted).items():
            if name.endswith("lora_B"):
                nn.init.normal_(p, std=0.02)  # begins as zero, which hides the gradient of A
        self.policies = {"full": self.policy, "lora": adapted}
        for model in (*self.policies.values(), self.reward.transformer):
            model.set_precision(DTYPES[args.dtype])
        self.start = {name: copy.deepcopy(m.state_dict()) for name, m in self.policies.items()}
        self.batch = Batch(
            torch.randn(1, 16, *args.latent, device=device), torch.randn(1, 77, 256, device=device)
        )
        self.noise = torch.randn_like(self.batch.latent)
        self.schedule = flow.make_schedule("unipc", args.steps, SHIFT)
        self.index, self.device, self.dtype, self.keep = args.index, device, DTYPES[args.dtype], args.keep
        self.steps, self.keys = args.steps, itertools.count()  # keys of micro-batches
        self.sources: dict[Setting, Persistent] = {}
        self.frozen: list[nn.Module] = [self.reward]
        self.peers: dict[str, Peer] = {}  # by recomputation
        for mode in ("none", "full") if args.peer else ():
            peer = Peer(args.peer, self.policy, self.reward, self.schedule, SHIFT)
            if mode == "full":
                peer.checkpoint_blocks()
            self.peers[mode] = peer

    def indices(self, samples: int) -> Tensor:
        """The graded index of one sample; those of several are the middles of equal parts below it."""
        if samples == 1:
            return torch.tensor([[self.index]])
        return stratified_indices(0, self.index, torch.full((samples, 1), 0.5, dtype=torch.float64))

    def model(self, setting: Setting) -> nn.Module:
        peer = setting.kernels == PEER
        return self.peers[setting.recompute].policy if peer else self.policies[setting.trained]

    def _losses(self, setting: Setting, sft: bool) -> Iterator[tuple[Tensor, Callable[[], None]]]:
        """(loss, its backward) of flow matching if `sft`, then of the reward of every graded sample."""
        sigma = torch.tensor([SIGMA], device=self.device)
        if setting.kernels == PEER:
            peer = self.peers[setting.recompute]
            for loss in peer.losses(self.batch, self.noise, sigma, self.index, self.dtype):
                yield loss, loss.backward
            return
        dispatch.configure(setting.kernels)
        grader = self.grader(setting)
        if sft:
            loss = sft_loss(grader.model, self.batch, self.noise, sigma, grader.run_blocks).mean()
            yield loss, loss.backward
            del loss
        for window in self._windows(setting, grader):
            loss = reward_loss(window.logit, LossConfig()).mean() / setting.samples
            yield loss, partial(window.backward, loss)
            del window

    def grader(self, setting: Setting) -> Grader:
        run = recompute.run_under(named(setting.recompute, self.keep))
        window = setting.window if setting.window == "all" else int(setting.window)
        rollout = self.rollout(setting)
        stretches = rollout and rollout.stretches
        return Grader(
            self.model(setting), self.reward, self.schedule, ChainConfig(window), stretches, run, run
        )

    def _windows(self, setting: Setting, grader: Grader) -> Iterator[GradedWindow]:
        if setting.rollout != "persistent":
            g, indices = grader, self.indices(setting.samples)
            given = g.model, g.reward, g.schedule, self.batch, self.noise, indices, g.config
            yield from graded_windows(*given, g.stretches, g.run_blocks, g.score_blocks)
            return
        for window, _ in self.source(setting, grader).windows(self.batch, next(self.keys)):
            yield window

    def source(self, setting: Setting, grader: Grader) -> Persistent:
        """The chains of a setting that persist, of its first weights, each rolled out to its place."""
        setting = setting._replace(sft_every=1)
        if setting not in self.sources:
            rollout = RolloutConfig(
                mode="persistent", steps=self.steps, samples=setting.samples, probe_every=2**31 - 1
            )
            config = Config(rollout=rollout, chain=grader.config)
            source = self.sources[setting] = Persistent(grader, config, None, lambda key: [0])
            while None in source.pool.chains:
                for _ in source.windows(self.batch, next(self.keys)):
                    pass
        return self.sources[setting]

    def fresh(self, setting: Setting) -> tuple[list[float], Tensor]:
        """Losses and gradients, without flow matching, by fresh rollouts of the chains that a setting with
        persistent ones has graded last."""
        grader, losses = self.grader(setting), []
        self._begin(setting)
        source = self.source(setting, grader)
        drawn = source.pool.counts.drawn
        for k in range(drawn - setting.samples, drawn):
            turn, numbers = source.turns[k], source.pool.chains[source.turns[k].slot].numbers
            noise, index = source.noise(self.batch.latent, numbers.position), torch.tensor([[turn.index]])
            given = grader.model, grader.reward, grader.schedule, self.batch, noise, index, grader.config
            for window in graded_windows(*given, None, grader.run_blocks, grader.score_blocks):
                loss = reward_loss(window.logit, LossConfig()).mean() / setting.samples
                losses.append(loss.item())
                window.backward(loss)
        return losses, self._gradient(setting)

    def rollout(self, setting: Setting) -> Rollout | None:
        """The accelerated rollout of a setting; weights change with every step, so fp8 ones are made anew."""
        if setting.rollout in ("same", "persistent"):
            return None
        return Rollout(self.model(setting), rollout_config(setting.rollout), self.schedule)

    def drift(self, setting: Setting) -> float:
        """Relative distance of the latent before the graded step from that of a plain rollout."""
        dispatch.configure(setting.kernels)
        made = self.rollout(setting).drift(self.batch, self.noise, torch.tensor([self.index]))
        return made.item()

    def _begin(self, setting: Setting) -> nn.Module:
        """The model of a setting with the first weights and zero gradients."""
        model = self.model(setting)
        model.load_state_dict(self.start[setting.trained])
        for p in self._trained(model).values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        return model

    def run(
        self, setting: Setting, optimize: bool = True, sft: bool = True
    ) -> tuple[list[float], list[float]]:
        """(losses, seconds of PHASES) of one step from the same weights, its gradients left in .grad; with
        flow matching or without."""
        model = self._begin(setting)
        optimizer = make_optimizer([(model, 5e-6)], OptimConfig())
        seconds, losses = dict.fromkeys(PHASES, 0.0), []
        last = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            if self.device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds[phase] += now - last
            last = now

        for loss, backward in self._losses(setting, sft):
            losses.append(loss.item())
            lap(PHASES[0 if sft and len(losses) == 1 else 1])
            del loss
            backward()
            lap("backward")
        if optimize:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lap("optimizer")
        return losses, list(seconds.values())

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are trained, under the names of ours."""
        held = {k: p for k, p in model.named_parameters() if p.requires_grad}
        return {k.replace("_checkpoint_wrapped_module.", ""): p for k, p in held.items()}

    def gradients(self, setting: Setting, sft: bool = True) -> tuple[list[float], Tensor]:
        """Losses, and the gradients of what is trained as one vector; with flow matching or without."""
        losses, _ = self.run(setting, optimize=False, sft=sft)
        return losses, self._gradient(setting)

    def seconds(self, setting: Setting) -> list[float]:
        """Seconds of PHASES of a step; of the mean of sft_every steps."""
        self.run(setting)  # after another setting a step finds neither its memory nor its caches
        found, n = [self.run(setting)[1]], setting.sft_every
        if n > 1:
            self.run(setting, sft=False)
            found += [self.run(setting, sft=False)[1]] * (n - 1)
        return [sum(column) / n for column in zip(*found, strict=True)]

    def _gradient(self, setting: Setting) -> Tensor:
        held = self._trained(self.model(setting))
        names = self._trained(self.policies[setting.trained])
        return torch.cat([held[k].grad.flatten() for k in names])

    def peak(self, setting: Setting) -> int:
        """Most live bytes of a step before the optimizer, over those of weights and gradients."""
        live, trained = LiveBytes(512), self._trained(self.model(setting)).values()
        peers = (m for p in self.peers.values() for m in p.modules())
        models = [*self.policies.values(), *self.frozen, *peers]
        live.add([*(p for m in models for p in m.parameters()), *(p.grad for p in trained)])
        live.add([*(a for s in self.start.values() for a in s.values()), self.noise])
        live.add(a for a in self.batch if a is not None)
        with live:
            before = live.now
            self.run(setting, optimize=False)
        return live.peak - before


def gate(step: Step, settings: list[Setting], limit: float) -> None:
    """Stop unless losses and gradients agree with those of the first kernels without recomputation, and
    accelerated rollouts stay within the drift that training allows by default.

    limit: of the losses, relative; of the gradients, relative L2, ten times that.
    """
    settings = list(dict.fromkeys(s._replace(sft_every=1) for s in settings))

    def compare(setting: Setting, got: tuple[list[float], Tensor], want: tuple[list[float], Tensor]) -> None:
        off = max(abs(a / b - 1) for a, b in zip(got[0], want[0], strict=True))
        error = ((got[1] - want[1]).norm() / want[1].norm()).item()
        print(f"gate: {setting}: losses within {off:.1e}, gradients within {error:.1e}", flush=True)
        if not (off < limit and error < 10 * limit):
            raise SystemExit(f"gate failed, want {limit} and {10 * limit}: no times are printed")

    for setting in (s for s in settings if s.rollout not in ("same", "persistent")):
        drift, most = step.drift(setting), RolloutConfig().max_drift
        print(f"gate: {setting}: drift {drift:.1e}", flush=True)
        if not drift <= most:
            raise SystemExit(f"gate failed, want a drift of at most {most}: no times are printed")
    exact = [s for s in settings if s.rollout == "same"]
    for trained, _, *rest in dict.fromkeys(s[1:2] + ("none",) + s[3:] for s in exact):
        first = Setting(settings[0].kernels, trained, "none", *rest)
        want = step.gradients(first)
        for setting in (s for s in exact if (s.trained, *s[3:]) == (trained, *rest)):
            compare(setting, step.gradients(setting), want)
    for setting in (s for s in settings if s.rollout == "persistent"):
        compare(setting, step.gradients(setting, sft=False), step.fresh(setting))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--kernels", nargs="+", default=["reference", "cpu"], metavar="CHOICE")
    parser.add_argument("--train", nargs="+", choices=["full", "lora"], default=["full"])
    parser.add_argument("--recompute", nargs="+", default=["none"], metavar="MODE")
    parser.add_argument("--keep", default="all", metavar="MODE", help="model.keep of all settings")
    parser.add_argument("--samples", nargs="+", type=int, default=[1], metavar="K")
    parser.add_argument("--window", nargs="+", default=["1"], metavar="N")
    parser.add_argument(
        "--rollout", nargs="+", default=["same"], metavar="HOW", help="same fp8 cache:X persistent"
    )
    parser.add_argument("--sft-every", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", type=a_path, metavar="DIR", help="a checkout of HY-Video-PRFL")
    for name, value in (
        ("width", 512), ("ffn", 2048), ("heads", 4), ("blocks", 8), ("steps", 10), ("index", 6), ("rank", 32),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--latent", nargs=3, type=int, default=[9, 20, 24], metavar=("T", "H", "W"))
    args = parser.parse_args(argv)
    extension.keep_freed_memory()
    chosen = itertools.product(
        args.kernels, args.train, args.recompute, args.samples, args.window, args.rollout, args.sft_every
    )
    settings = [Setting(*s) for s in chosen]
    step = Step(args)
    settings += [Setting(PEER, "full", recompute, 1, "1") for recompute in step.peers]
    # Two kernels round apart at every one of a few hundred bfloat16 products of a rollout.
    gate(step, settings, {"float32": 1e-4, "bfloat16": 1e-2}[args.dtype])
    found: dict[Setting, list[list[float]]] = {s: [] for s in settings}
    for _ in range(args.repeat):
        for setting in settings:
            found[setting].append(step.seconds(setting))
    where = f"{machine(step.device)}, torch {torch.__version__}, {args.dtype}"
    print(f"\n{where}; seconds, median of {args.repeat}")
    print(f"{'':60}" + "".join(f"{p:>20}" for p in PHASES) + f"{'step':>8}{'gradients/s':>13}{'MiB':>8}")
    for setting, runs in found.items():
        phases = [statistics.median(column) for column in zip(*runs, strict=True)]
        total = statistics.median(sum(run) for run in runs)
        print(
            f"{str(setting):60}" + "".join(f"{s:20.3f}" for s in phases)
            + f"{total:8.3f}{setting.samples / total:13.3f}{step.peak(setting) / 2**20:8.1f}"
        )  # fmt: skip


if __name__ == "__main__":
    main()
