"""The fastest block policies whose step fits a budget of bytes, predicted without a GPU.

Bytes come from dry runs of the losses on the meta device at full size, on the model's first blocks, once for
every kind of policy. The peak is in the forward or backward of some block, after the last block, or before
and after all of them, and

    peak in block i = before the blocks + what the blocks before i save + what block i allocates
                      + what of the block before i is being copied to the host, or back from it

so the peak of any list of kinds follows from the numbers of each kind, and `search` finds the fastest list
that fits. Bytes are those in addition to weights, gradients and optimizer states, the batch included, in the
worst of: flow matching; the steps of a rollout without gradient; the graded step with its reward; the steps
of its window. All include chains that persist on the device. The bytes of a validation (samples, their
rewards, flow matching, without gradient) do not depend on policies and have to fit as well. No gradients
exist in a validation; this is not deducted, so that averaged weights fit in. Not counted: work space inside
attention libraries, the allocator's own memory, the e4m3 copy of the weights and the CUDA graph of an
accelerated rollout, the optimizer's blocks in transit, the moving average of the weights. Seconds are
predicted by a roofline, or taken from a table measured by `measure`.
"""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from prfl_engine import errors
from prfl_engine.errors import UserError
from prfl_engine.inputs import read_json
from prfl_engine.memory import recompute
from prfl_engine.memory.policy import BlockPolicy, named
from prfl_engine.model.layers import IMAGE_TOKENS
from prfl_engine.model.wan import WanTransformer
from prfl_engine.planner.dry_run import counted, validation_bytes
from prfl_engine.planner.numbers import BLOCKS, Numbers
from prfl_engine.planner.search import SAME, UNLIMITED, Blocks, Tails, least, search
from prfl_engine.planner.seconds import Rates, block_seconds
from prfl_engine.planner.setup import Setup, Validation

_RESIDUALS = {"input", "after_attention", "after_cross"}
KINDS = {
    "none": named("none"),
    "projections": named("none", "projections"),
    "residuals, attention": BlockPolicy({*_RESIDUALS, "attention", "cross_attention"}),
    "attention": named("attention"),
    "attention; offload input": BlockPolicy({"attention"}, {"input"}),
    "offload attention, input": BlockPolicy((), {"attention", "input"}),
    "offload residuals, attention": BlockPolicy((), {*_RESIDUALS, "attention"}),
    "full": named("full"),
    "offload input": BlockPolicy((), {"input"}),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A policy that blocks can have, its bytes in every phase, and the picoseconds that a step spends in a
    block of the generator and in all blocks of the reward model."""

    name: str
    policy: BlockPolicy
    numbers: dict[str, Numbers]
    cost: int
    reward_cost: int

    @property
    def host(self) -> int:
        """Bytes of a block on the host."""
        return max(n.host for n in self.numbers.values())

    def block(self, phase: str, before: "Kind | None", last: bool) -> tuple[int, int]:
        """(bytes that a block of this kind saves, its peak in forward and backward in addition to what all
        blocks before it save). before: the kind of the block before it; None where it is the first, and then
        what lives before and after all blocks counts too, its own backward included. If both offload
        something, the peak in forward is an upper bound."""
        saved, forward, backward = self.passes(phase, before, last)
        if before is not None:
            return saved, max(forward, backward)
        return saved, max(forward, backward if last else 0, self.numbers[phase].rest)

    def passes(self, phase: str, before: "Kind | None", last: bool) -> tuple[int, int, int]:
        """(what it saves, its peak in forward, its peak in backward)."""
        n, policy = self.numbers[phase], self.policy.staying() if last else self.policy
        leaving = 0 if before is None else before.numbers[phase].leaving
        back = 0 if before is None or policy.plain else before.numbers[phase].host
        if last:
            saved, forward, backward = n.saved_last, n.forward_last + leaving, n.backward_last
        else:
            saved, forward, backward = n.saved, n.forward + max(0, leaving - n.leaving), n.backward
        return saved, n.start + forward, n.start + backward + back


class Peak(NamedTuple):
    """The most bytes of a part of a step, what of them blocks have saved, and what the backward of blocks has
    made of gradients that were not there before."""

    bytes: int
    saved: int
    gradients: int = 0


def peaks(kinds: Sequence[Kind], reward: Kind, gradient: int = 0) -> dict[str, dict[str, Peak]]:
    """Of a step whose blocks have `kinds`, in every pass with gradient: the peak in "blocks", in the "head"
    (head, loss, reward model), and in the "rest" before and after all blocks. In addition to weights,
    gradients and optimizer states. gradient: bytes of a block's gradients where the pass begins without any
    (Setup.alone) and they stay; then they are counted."""
    found, count = {}, len(kinds)
    for phase, n in reward.numbers.items():
        saved, before, blocks = 0, None, []
        for i, kind in enumerate(kinds):
            more, forward, backward = kind.passes(phase, before, i == count - 1)
            arrived = (count - 1 - i) * gradient  # those of one block are in its numbers
            backward += max(0, arrived - gradient)
            blocks.append(Peak(saved + forward, saved))
            if before is not None or count == 1:  # that of the first is in what comes after all blocks
                blocks.append(Peak(saved + backward, saved, arrived))
            saved, before = saved + more, kind
        first = kinds[0].numbers[phase]
        after = Peak(first.after + (count - BLOCKS) * gradient, 0, count * gradient)
        found[phase] = {
            "blocks": max(blocks), "head": Peak(saved + n.start + n.head, saved),
            "rest": max(Peak(first.before, 0), after),
        }  # fmt: skip
    return found


def predicted_peak(kinds: Sequence[Kind], reward: Kind) -> int:
    """Peak bytes of a step whose blocks have `kinds`, in addition to weights, gradients and optimizer."""
    return max(peak.bytes for parts in peaks(kinds, reward).values() for peak in parts.values())


class Choice(NamedTuple):
    """One kind of policy for all blocks."""

    name: str
    bytes: int
    host: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The chosen kind of every block of the generator and of the reward model, with what is predicted."""

    blocks: tuple[Kind, ...]
    reward: Kind
    reward_blocks: int
    bytes: int  # most in a step, in addition to weights, gradients and optimizer states
    host: int
    seconds: float  # of blocks with gradient in a step; the rollout is the same for all
    bound: float  # seconds that no list of these kinds is below which fits as well
    table: tuple[Choice, ...]  # one kind for all blocks, for comparison
    source: str
    validation: int = 0  # most bytes of a validation, in addition to the same
    pool: int = 0  # bytes of chains that persist, their prompts, and gathered blocks, in both of them

    @property
    def policies(self) -> list[BlockPolicy]:
        """One policy a block of the generator."""
        return [kind.policy for kind in self.blocks]

    def __str__(self) -> str:
        runs = itertools.groupby(kind.name for kind in self.blocks)
        blocks = ", ".join(f"{len(list(run))} x {name}" for name, run in runs)
        reward = f"; reward model: {self.reward.name}" if self.reward_blocks else ""
        proof = "of all lists the fastest"
        if self.seconds > self.bound * (1 + SAME):
            proof = f"at most {self.seconds - self.bound:.4f} s above the fastest list"
        lines = [f"recompute: {blocks}{reward}; {proof}"]
        lines.append(f"GB in addition to weights, gradients and optimizer states; {self.source}")
        for c in (Choice("chosen", self.bytes, self.host, self.seconds), *self.table):
            sizes = f"{c.bytes / 1e9:9.3f} GB{c.host / 1e9:9.3f} GB on the host"
            lines.append(f"{c.name:32}{sizes}{c.seconds:10.4f} s")
        for what, size in (("validation", self.validation), ("of both, there in every pass", self.pool)):
            if size:
                lines.append(f"{what:32}{size / 1e9:9.3f} GB")
        return "\n".join(lines)


def kinds_of(setup: Setup) -> dict[str, BlockPolicy]:
    """KINDS as they are with setup.keep."""
    return {name: replace(policy, rerun=setup.keep) for name, policy in KINDS.items()}


def make_kinds(setup: Setup, rates: Rates, measured: dict[str, float], names: Iterable[str]) -> list[Kind]:
    """Every kind with its bytes from a dry run and its cost, predicted or measured (seconds of a block)."""
    policies = kinds_of(setup)
    return [make_kind(name, policies[name], setup, rates, measured.get(name)) for name in names]


def make_kind(
    name: str, policy: BlockPolicy, setup: Setup, rates: Rates, measured: float | None = None
) -> Kind:
    """A policy with its bytes from a dry run and its cost, predicted or measured (seconds of a block)."""
    graded = setup.rollout.samples * (setup.reward_blocks > 0)
    numbers = counted(setup, policy)
    host = next(iter(numbers.values())).host
    scoring = setup if setup.reward is None else replace(setup, storage=setup.reward.storage)
    seconds = [block_seconds(policy, setup, host, rates, setup.lora is not None)]
    seconds.append(block_seconds(policy, scoring, host, rates, True))
    if measured is not None:
        seconds = [measured] * 2
    passes = setup.sft + graded * setup.window, graded * setup.reward_blocks
    costs = (round(1e12 * n * second) for n, second in zip(passes, seconds, strict=True))
    return Kind(name, policy, numbers, *costs)


def plan(
    setup: Setup,
    budget: float,
    host: float = float("inf"),
    measured: str | Path | None = None,
    rates: Rates = Rates(),  # noqa: B008 - never changed
) -> Plan:
    """The fastest policies whose step fits in `budget` bytes on the device (see Plan.bytes) and offloads at
    most `host` bytes.

    measured: a JSON file of `measure`, in place of predicted seconds. Raises UserError, with the smallest
    budget that something fits, where nothing does, and with the largest eval.batch_size that fits where the
    validation does not.
    """
    seconds = read_costs(measured) if measured else {}
    validation = validation_bytes(setup) if setup.validation is not None else 0
    kinds = make_kinds(setup, rates, seconds, seconds or KINDS)
    source = f"seconds of {measured}" if measured else "seconds predicted for an H100 SXM, not measured"
    made = choose(kinds, setup, budget, host, source, validation)
    if validation > budget:
        _refuse_validation(setup, budget, validation)
    return made


def _refuse_validation(setup: Setup, budget: float, needed: int) -> None:
    size, shape = setup.validation.latent[0], setup.validation.latent[1:]

    def smaller(n: int) -> Validation:
        return replace(setup.validation, latent=(n, *shape))

    # Part of the bytes is there for any batch, so no batch larger than in proportion fits.
    sizes = range(min(size - 1, int(size * budget / needed)), 0, -1)
    most = next((n for n in sizes if validation_bytes(replace(setup, validation=smaller(n))) <= budget), 0)
    what = "in addition to weights, gradients and optimizer states"
    if most:
        raise UserError(
            f"eval.batch_size: got batches of {size}, want at most {most}: validation needs"
            f" {_above(needed)} GB {what}, and model.recompute is auto:{budget / 1e9:g}"
        )
    least = validation_bytes(replace(setup, validation=smaller(1)))
    raise UserError(
        f"model.recompute: got auto:{budget / 1e9:g}, want at least auto:{_above(least)}, or eval.every=0:"
        f" validation with eval.batch_size=1 needs that much {what}"
    )


def choose(
    kinds: list[Kind],
    setup: Setup,
    budget: float,
    host: float = float("inf"),
    source: str = "",
    validation: int = 0,
) -> Plan:
    """`plan` from kinds and the bytes of a validation, which have been found already. Of equally fast lists
    it is one that offloads fewest bytes, and of those one of the lowest peak."""
    count, (blocks, tails) = setup.count, _tables(kinds, setup)
    fewest = int((count - 1) * blocks.host.min() + tails.host.min())
    if fewest > host:
        raise UserError(
            f"model.host: got {host / 1e9:g}, want at least {_above(fewest)}: each of the policies"
            f" ({'; '.join(k.name for k in kinds)}) offloads that much"
        )
    room, host_room = (UNLIMITED if limit == float("inf") else math.floor(limit) for limit in (budget, host))
    row, bound = search(blocks, tails, count, room, host_room)
    if row is None:
        # Where the search has no proof that nothing fits, the leanest list may.
        row = least(blocks, tails, count, host_room)
        if row.peak > budget:
            raise UserError(
                f"model.recompute: got auto:{budget / 1e9:g}, want at least"
                f" auto:{_above(max(row.peak, validation))}: the leanest policies"
                f"{' and validation' if validation else ''} need that much in addition to weights, gradients"
                " and optimizer states"
            )
    found, reward = _in_runs([kinds[i] for i in row.kinds], kinds[row.tail]), kinds[row.tail]

    def choice(name: str, blocks: list[Kind], reward: Kind) -> Choice:
        moving = (*blocks[:-1], *[reward] * setup.reward_moving)  # the last block offloads nothing
        seconds = sum(k.cost for k in blocks) + reward.reward_cost
        return Choice(name, predicted_peak(blocks, reward), sum(k.host for k in moving), seconds / 1e12)

    chosen = choice("chosen", found, reward)
    table = tuple(choice(k.name, [k] * count, k) for k in kinds)
    what = reward, setup.reward_blocks, *chosen[1:]
    return Plan(tuple(found), *what, bound / 1e12, table, source, validation, setup.pool)


def _tables(kinds: list[Kind], setup: Setup) -> tuple[Blocks, Tails]:
    """The kinds as `search` takes them: the reward model follows after the last block."""
    phases = list(kinds[0].numbers)

    def saved_and_peaks(last: bool) -> tuple[np.ndarray, np.ndarray]:
        made = [[[k.block(p, b, last) for p in phases] for k in kinds] for b in (*kinds, None)]
        table = np.array(made, np.int64)
        return table[-1, ..., 0], table[..., 1]

    blocks = Blocks(
        np.array([k.cost for k in kinds]), np.array([k.host for k in kinds]),
        *saved_and_peaks(False), *saved_and_peaks(True),
    )  # fmt: skip
    heads = [[k.numbers[p].start + k.numbers[p].head for p in phases] for k in kinds]
    away = setup.reward_moving * blocks.host
    tails = Tails(np.array([k.reward_cost for k in kinds]), away, np.array(heads))
    return blocks, tails


def _in_runs(kinds: list[Kind], reward: Kind) -> list[Kind]:
    """The list sorted so that equal kinds are adjacent, if its peak is no higher then. Sorted by peak minus
    saved bytes, descending: the best order if no block depends on the one before it."""

    def margin(kind: Kind) -> tuple[int, str]:
        alone = (kind.block(phase, kind, False) for phase in reward.numbers)
        return min(saved - peak for saved, peak in alone), kind.name

    ordered = sorted(kinds[:-1], key=margin) + kinds[-1:]
    return ordered if predicted_peak(ordered, reward) <= predicted_peak(kinds, reward) else kinds


def _above(size: int) -> str:
    """Bytes in 10^9: the next thousand above."""
    return f"{(size // 10**3 + 1) / 1e6:.6f}".rstrip("0").rstrip(".")


def read_costs(path: str | Path) -> dict[str, float]:
    """Seconds of every kind, as `measure` returns them."""
    with errors.named("model.costs"):
        held = read_json(path, "seconds as `measure` writes them")
    try:
        found = {name: float(value) for name, value in held["seconds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"model.costs: {path} holds no measured seconds: {error!r}") from None
    unknown = sorted(found.keys() - KINDS.keys())
    if unknown or not found:
        names = repr(unknown[0]) if unknown else "no kind"
        raise UserError(f"model.costs: {path} names {names}, want some of {', '.join(map(repr, KINDS))}")
    for name, value in found.items():
        if not 0 < value < float("inf"):
            raise UserError(f"model.costs: got {value} seconds of {name!r} in {path}, want more than none")
    return found


def measure(
    setup: Setup, device: torch.device, names: Iterable[str] = tuple(KINDS), repeat: int = 3
) -> dict:
    """{"device", "tokens", "seconds": {kind: seconds}} of forward and backward of one block, the median of
    differences between three blocks and one (so that what is offloaded is copied), after a warm-up. Weights
    have gradients."""
    c, found = setup.config, {}
    grid = tuple(n // p for n, p in zip(setup.latent[2:], c.patch_size, strict=True))
    samples, tokens = setup.latent[0], setup.tokens // setup.latent[0]
    with torch.device(device):
        model = WanTransformer(replace(c, num_layers=3)).to(setup.weight_dtype)
        x = torch.randn(samples, tokens, c.dim, dtype=setup.residual_dtype).requires_grad_()
        e = torch.randn(samples, 6, c.dim)
        texts = c.text_len + (IMAGE_TOKENS if c.clip else 0)
        context = torch.randn(samples, texts, c.dim, dtype=setup.compute_dtype)
    blocks = model.set_precision(setup.compute_dtype, setup.residual_dtype).set_chunk(setup.chunk).blocks

    def lap(policy: BlockPolicy, count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        recompute.run_under(policy)(blocks[:count], x, e, context, 1, grid).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for name in names:
        policy = kinds_of(setup)[name]
        lap(policy, 3)
        laps = sorted((lap(policy, 3) - lap(policy, 1)) / 2 for _ in range(repeat))
        found[name] = laps[repeat // 2]
    return {"device": str(device), "tokens": setup.tokens, "seconds": found}
