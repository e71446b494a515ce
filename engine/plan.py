"""The fastest block policies whose step fits a budget of bytes, predicted without a GPU.

Bytes come from dry runs of the losses under fake tensors at the real size, on the model's first blocks,
once for every kind of policy. A peak lies in the forward or the backward of some block or between them, and

    peak in block i = before the blocks + what the blocks before i keep + what block i does
                      + what the block before it brings back from the host

so the peak of any list of kinds follows from the numbers of each kind, and the best list from `search`.
Bytes are what lives beside weights, gradients, optimizer state and the batch, in the worst of flow
matching, graded step and reward model; work space inside of attention libraries is not in them. Seconds
are predicted by a roofline, or taken from a table measured by `measure`.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from prfl_engine import recompute
from prfl_engine.config import Config, UserError
from prfl_engine.dit import WanConfig, WanTransformer
from prfl_engine.dry_run import BLOCKS, Numbers, Setup, dry_run, numbers_of
from prfl_engine.layers import Block
from prfl_engine.recompute import NAMES, BlockPolicy
from prfl_engine.reward import RewardModel
from prfl_kernels.jit import wide

_RESIDUALS = {"input", "after_attention", "after_cross"}
KINDS = {
    "none": recompute.named("none"),
    "projections": recompute.named("none", "projections"),
    "residuals, attention": BlockPolicy({*_RESIDUALS, "attention", "cross_attention"}),
    "attention": recompute.named("attention"),
    "attention, input away": BlockPolicy({"attention"}, {"input"}),
    "attention and input away": BlockPolicy((), {"attention", "input"}),
    "residuals and attention away": BlockPolicy((), {*_RESIDUALS, "attention"}),
    "full": recompute.named("full"),
    "full, input away": BlockPolicy((), {"input"}),
}  # fmt: skip

# All lists of 40 blocks take minutes; the walk of 100 ends within 0.4 % of the bound at 14B, 75,600 tokens.
EXACT, WIDTH = 8, 100


class Rates(NamedTuple):
    """Of an H100 SXM: products and copies as measured there once, attention as published for
    FlashAttention-3; the link to the host is an assumption, one way."""

    products: float = 798e12
    attention: float = 648e12
    attention_backward: float = 561e12
    memory: float = 3.0e12
    link: float = 50e9


@dataclass(frozen=True)
class Kind:
    """A policy that blocks can have, its bytes in every phase, and the nanoseconds of a block of the
    generator in a step and of the reward model."""

    name: str
    policy: BlockPolicy
    numbers: dict[str, Numbers]
    cost: int
    reward_cost: int

    @property
    def away(self) -> int:
        """Bytes of a block on the host."""
        return next(iter(self.numbers.values())).away

    def block(self, phase: str, kept: int, before: "Kind | None", last: bool) -> tuple[int, int]:
        """(bytes kept behind this block, most in its forward and backward), from `kept` before it."""
        n, policy = self.numbers[phase], self.policy.staying() if last else self.policy
        ahead = 0 if before is None or policy.plain else before.numbers[phase].away
        forward, backward = (n.forward_last, n.backward_last) if last else (n.forward, n.backward)
        peak = max(forward, backward + ahead)
        return kept + (n.kept_last if last else n.kept), n.start + kept + peak


def predicted_peak(kinds: list[Kind], reward: Kind) -> int:
    """Most bytes of a step whose blocks have `kinds`, beside weights, gradients, optimizer and batch."""
    peak = 0
    for phase in reward.numbers:
        kept, before = 0, None
        for i, kind in enumerate(kinds):
            kept, here = kind.block(phase, kept, before, i == len(kinds) - 1)
            peak, before = max(peak, here), kind
        n = reward.numbers[phase]
        peak = max(peak, n.start + kept + n.head, n.rest)
    return peak


class _State(NamedTuple):
    """A list of kinds so far: what it costs, keeps in each phase and has at most, and how it came about."""

    cost: int
    kept: tuple[int, ...]
    peak: int
    host: int
    kind: Kind | None
    before: "_State | None"


def _undominated(states: list[_State]) -> list[_State]:
    """Without those that another one beats or equals in cost, kept bytes and bytes on the host."""
    found: list[_State] = []
    for s in sorted(states, key=lambda s: s[:4]):
        sizes = s.host, *s.kept
        if not any(all(map(int.__le__, (o.host, *o.kept), sizes)) for o in found):
            found.append(s)
    return found


class _Bound:
    """A cost that no list can be below, from what is kept and away so far and the number of blocks left.

    With prices per byte kept and per byte away (Lagrange multipliers; any are valid), each block left costs
    at least its cheapest kind, prices included, less the price of the room that is there.
    """

    def __init__(self, kinds: list[Kind], count: int, reward: Kind, budget: float, host: float):
        numbers = list(reward.numbers.values())[-1]
        self.room, self.host = budget - numbers.start - numbers.head, host
        self.all = [(k.cost, list(k.numbers.values())[-1], k.away) for k in kinds]
        pairs = list(itertools.permutations(self.all, 2))
        slopes = ({(b[0] - a[0]) / (x - y) for a, b, x, y in rows if x > y} for rows in (
            [(a, b, a[1].kept, b[1].kept) for a, b in pairs], [(a, b, a[2], b[2]) for a, b in pairs],
        ))  # fmt: skip
        prices = [sorted({0.0, *(p for p in found if p > 0)}) for found in slopes]
        limited = (self.room < float("inf"), host < float("inf"))
        prices = [p if there else [0.0] for p, there in zip(prices, limited, strict=True)]
        start = _State(0, (0,), 0, 0, None, None)
        self.price, self.away_price = max(
            itertools.product(*prices), key=lambda p: self._at(*p)(start, count)
        )
        self.below = self._at(self.price, self.away_price)

    def _at(self, price: float, away_price: float) -> Callable[[_State, int], float]:
        each = min(cost + price * n.kept + away_price * away for cost, n, away in self.all)
        last = min(cost + price * n.kept_last for cost, n, _ in self.all)

        def below(s: _State, left: int) -> float:
            total = s.cost + (left - 1) * each + last if left else s.cost
            total += price * (s.kept[-1] - self.room) if price else 0
            return total + (away_price * (s.host - self.host) if away_price else 0)

        return below


def search(
    kinds: list[Kind], count: int, reward: Kind, budget: float, host: float = float("inf")
) -> list[Kind] | None:
    """The cheapest list of `count` kinds within the bytes of device and host: exact up to EXACT blocks,
    beyond that the best of a walk that follows the WIDTH most promising lists.

    Block by block, all lists at once. Of those with the same last kind one that costs, keeps and puts away
    no less than another is dropped, and so is what cannot end below the cost of a list that is known already.
    """
    bound = _Bound(kinds, count, reward, budget, host)
    best = _walk(kinds, count, reward, budget, host, bound, float("inf"), WIDTH)
    if count <= EXACT:
        limit = float("inf") if best is None else best.cost
        best = _walk(kinds, count, reward, budget, host, bound, limit, None) or best
    found = []
    while best is not None and best.kind is not None:
        found.append(best.kind)
        best = best.before
    return found[::-1] or None


def _walk(
    kinds: list[Kind], count: int, reward: Kind, budget: float, host: float, bound: _Bound, limit: float,
    width: int | None,
) -> _State | None:  # fmt: skip
    """The best end among lists that may cost `limit`; of the lists so far, `width` are followed."""
    phases = list(reward.numbers)
    states = [_State(0, (0,) * len(phases), 0, 0, None, None)]
    for i in range(count):
        following, last = [], i == count - 1
        for kind in kinds:
            made = []
            for s in states:
                given = zip(phases, s.kept, strict=True)
                steps = [kind.block(p, kept, s.kind, last) for p, kept in given]
                peak, away = max(s.peak, *(here for _, here in steps)), s.host + kind.away * (not last)
                new = _State(s.cost + kind.cost, tuple(k for k, _ in steps), peak, away, kind, s)
                if peak <= budget and away <= host and bound.below(new, count - 1 - i) < limit:
                    made.append(new)
            following += _undominated(made)
        states = sorted(following, key=lambda s: bound.below(s, count - 1 - i))[:width]
    ends = []
    for s in states:
        numbers = zip((reward.numbers[p] for p in phases), s.kept, strict=True)
        peak = max(s.peak, *(max(n.start + kept + n.head, n.rest) for n, kept in numbers))
        if peak <= budget:
            ends.append((s.cost, peak, s))
    return min(ends, key=lambda e: e[:2])[2] if ends else None


def recomputed(policy: BlockPolicy, config: WanConfig, tokens: int, rates: Rates) -> float:
    """Seconds of computing again what a block does not hold, each thing once: products, attention, and one
    read and write for norms."""
    width, rows = config.dim, tokens * config.dim
    product = 2 * rows * width / rates.products
    norm = 4 * rows / rates.memory  # 16 bits in and out
    cost = {
        "normed": 6 * rows / rates.memory, "projections": 3 * product, "rotated": 2 * norm,
        "attention": 4 * tokens * rows / rates.attention,
        "after_attention": product + 10 * rows / rates.memory,
        "cross_normed": 6 * rows / rates.memory, "cross_projections": product, "cross_queries": norm,
        "cross_attention": 4 * config.text_len * rows / rates.attention, "after_cross": product,
        "ffn_normed": 6 * rows / rates.memory, "hidden": product * config.ffn_dim / width,
    }  # fmt: skip
    return sum(cost[name] for name in NAMES if name not in policy.held)


def block_seconds(
    policy: BlockPolicy, setup: Setup, away: int, rates: Rates, frozen: bool = False
) -> float:
    """Predicted seconds of forward and backward of one block; frozen: without weight gradients."""
    c, tokens = setup.config, setup.tokens
    linear = 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim) / rates.products
    pairs = 4 * tokens * c.dim * (tokens / setup.latent[0] + c.text_len)
    forward = linear + pairs / rates.attention
    backward = linear * (1 if frozen else 2) + 2.5 * pairs / rates.attention_backward
    backward += recomputed(policy, c, tokens, rates)
    # Copies run beside the computation; what takes longer than it is waited for.
    return max(forward, away / rates.link) + max(backward, away / rates.link)


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
    bytes: int  # most in a step, beside weights, gradients, optimizer state and the batch
    host: int
    seconds: float  # of blocks with gradient in a step; the rollout is the same for all
    table: tuple[Choice, ...]  # one kind for all blocks, for comparison
    source: str

    @property
    def policies(self) -> list[BlockPolicy]:
        return [kind.policy for kind in self.blocks]

    @property
    def reward_policies(self) -> list[BlockPolicy]:
        return [self.reward.policy] * self.reward_blocks

    def __str__(self) -> str:
        names = [kind.name for kind in self.blocks]
        runs = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
        reward = f"; reward model: {self.reward.name}" if self.reward_blocks else ""
        lines = [f"recompute: {runs}{reward}", f"GB beside weights, gradients and optimizer; {self.source}"]
        for c in (Choice("chosen", self.bytes, self.host, self.seconds), *self.table):
            sizes = f"{c.bytes / 1e9:9.3f} GB{c.host / 1e9:9.3f} GB on the host"
            lines.append(f"{c.name:32}{sizes}{c.seconds:10.4f} s")
        return "\n".join(lines)


def make_kinds(setup: Setup, rates: Rates, measured: dict[str, float], names: Iterable[str]) -> list[Kind]:
    """Every kind with its bytes from a dry run and its cost, predicted or measured (seconds of a block)."""
    made = []
    for name in names:
        policy = KINDS[name]
        laps = dry_run(setup, [policy] * BLOCKS, policy)
        numbers = {phase: numbers_of(found, policy) for phase, found in laps.items()}
        away, passes = next(iter(numbers.values())).away, setup.sft + setup.window * (setup.reward_blocks > 0)
        seconds = [block_seconds(policy, setup, away, rates, frozen) for frozen in (False, True)]
        if measured:
            seconds = [measured[name]] * 2
        cost, reward_cost = round(1e9 * passes * seconds[0]), round(1e9 * setup.reward_blocks * seconds[1])
        made.append(Kind(name, policy, numbers, cost, reward_cost))
    return made


def plan(
    setup: Setup, budget: float, host: float = float("inf"), measured: str | Path | None = None
) -> Plan:
    """The fastest policies whose step lives in `budget` bytes on the device (see Plan.bytes) and puts at most
    `host` bytes on the host.

    measured: a JSON file of `measure`, in place of predicted seconds. Raises UserError, with the smallest
    budget that something fits, where nothing does.
    """
    seconds = _read(measured) if measured else {}
    kinds = make_kinds(setup, Rates(), seconds, seconds or KINDS)
    source = f"seconds of {measured}" if measured else "seconds predicted for an H100 SXM, not measured"
    return choose(kinds, setup, budget, host, source)


def choose(
    kinds: list[Kind], setup: Setup, budget: float, host: float = float("inf"), source: str = ""
) -> Plan:
    """`plan` from kinds that are made already."""
    count, found = setup.count, []
    for reward in kinds:
        away = reward.away * max(0, setup.reward_blocks - 1)
        blocks = search(kinds, count, reward, budget, host - away)
        if blocks and away <= host:
            found.append((sum(k.cost for k in blocks) + reward.reward_cost, blocks, reward))
    if not found:
        # The list that keeps least, and one kind for all blocks: the peak is not what `search` minimises.
        lean = [replace(k, cost=max(n.kept for n in k.numbers.values())) for k in kinds]
        rewards = [r for r in kinds if r.away * max(0, setup.reward_blocks - 1) <= host]
        lists = [search(lean, count, rewards[0], float("inf"), host)] if rewards else []
        lists += [[k] * count for k in kinds if k.away * (count - 1) <= host]
        least = min(predicted_peak(blocks, r) for blocks in lists if blocks for r in rewards)
        raise UserError(
            f"model.recompute: got auto:{budget / 1e9:g}, want at least auto:{-(-least // 10**3) / 1e6:g}:"
            " the leanest policies need that much beside weights, gradients and optimizer state"
        )
    cost, blocks, reward = min(found, key=lambda f: (f[0], predicted_peak(f[1], f[2])))

    def choice(name: str, blocks: list[Kind], reward: Kind) -> Choice:
        moving = (*blocks[:-1], *[reward] * (setup.reward_blocks - 1))  # the last block puts nothing away
        seconds = sum(k.cost for k in blocks) + reward.reward_cost
        return Choice(name, predicted_peak(blocks, reward), sum(k.away for k in moving), seconds / 1e9)

    chosen = choice("chosen", blocks, reward)
    table = tuple(choice(k.name, [k] * count, k) for k in kinds)
    return Plan(tuple(blocks), reward, setup.reward_blocks, *chosen[1:], table, source)


def _read(path: str | Path) -> dict[str, float]:
    """Seconds of every kind, as `measure` returns them."""
    try:
        seconds = json.loads(Path(path).read_text())["seconds"]
        found = {name: float(seconds[name]) for name in KINDS if name in seconds}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.costs: {path} holds no measured seconds: {error!r}") from None
    if not found:
        raise UserError(f"model.costs: {path} names no kind, want some of {', '.join(KINDS)}")
    return found


def measure(
    setup: Setup, device: torch.device, names: Iterable[str] = tuple(KINDS), repeat: int = 3
) -> dict:
    """{"device", "tokens", "seconds": {kind: seconds}} of forward and backward of one block, the median of
    differences between three blocks and one (so that what is put away travels), after a warm-up."""
    c, found = setup.config, {}
    grid = tuple(n // p for n, p in zip(setup.latent[2:], c.patch_size, strict=True))
    with torch.device(device):
        blocks = [Block(c.dim, c.ffn_dim, c.num_heads, c.eps, False) for _ in range(3)]
        tokens = setup.tokens // setup.latent[0]
        x = torch.randn(setup.latent[0], tokens, c.dim, dtype=setup.residual_dtype).requires_grad_()
        e = torch.randn(setup.latent[0], 6, c.dim)
        context = torch.randn(setup.latent[0], c.text_len, c.dim, dtype=setup.compute_dtype)
    for block in blocks:
        for m in block.modules():
            m.compute_dtype = setup.compute_dtype

    def lap(policy: BlockPolicy, count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        recompute.run_all(blocks[:count], [policy] * count, x, e, context, 1, grid).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for name in names:
        lap(KINDS[name], 3)
        laps = sorted((lap(KINDS[name], 3) - lap(KINDS[name], 1)) / 2 for _ in range(repeat))
        found[name] = laps[repeat // 2]
    return {"device": str(device), "tokens": setup.tokens, "seconds": found}


def fit_memory(
    config: Config, model: WanTransformer, reward: RewardModel | None, shape: tuple[int, ...]
) -> Plan:
    """Give both models the policies of the plan for model.recompute = auto:GB; shape [16, T, H, W] is that
    of the largest latent."""
    window = config.rollout.steps if config.chain.window == "all" else config.chain.window
    weight = next(model.parameters()).dtype
    setup = Setup(
        model.config, (config.data.batch_size, *shape), model.blocks[0].self_attn.q.compute_dtype or weight,
        model.residual_dtype or wide(weight), weight, reward.feature_layer if reward else 0,
        config.loss.sft_weight > 0, window, len(model.blocks), config.model.chunk,
        config.lora if config.lora.rank else None,
    )  # fmt: skip
    host = float("inf") if config.model.host is None else 1e9 * config.model.host
    made = plan(setup, config.model.budget, host, config.model.costs)
    model.recompute = made.policies
    if reward is not None:
        reward.transformer.recompute = made.reward_policies
    return made
