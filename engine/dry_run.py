"""Dry runs: the bytes of a training step at its real size, from fake tensors, without a GPU or the time.

The losses run as they are, on a model's first blocks, and the counter of live bytes is read at the borders of
blocks. The kernels allocate what the compiled CPU kernels do, which is what the Triton kernels do but for
partial sums; a weight gradient in 16 bits is rounded on the way there, so on CUDA up to six bytes a value
of one weight less are used. What attention libraries allocate inside is not counted.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_engine import lora
from prfl_engine.config import LoraConfig
from prfl_engine.dit import WanConfig, WanTransformer
from prfl_engine.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.live_bytes import LiveBytes
from prfl_engine.objectives import Batch, sft_loss
from prfl_engine.recompute import BlockPolicy, run_under
from prfl_engine.reward import QueryPool, RewardModel
from prfl_kernels import compiled, table

BLOCKS = 6  # of a dry run: from the fourth on what is on its way to the host is the same everywhere


@dataclass(frozen=True)
class Setup:
    """What a step's memory and time depend on. latent [B, 16, T, H, W]; reward_blocks 0 for no reward."""

    config: WanConfig
    latent: tuple[int, int, int, int, int]
    compute_dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    reward_blocks: int = 8
    sft: bool = True
    window: int = 1
    blocks: int | None = None  # of the generator; None: all
    chunk: int | None = None
    lora: LoraConfig | None = None  # None: all weights are trained
    samples: int = 1  # graded ones, one after another: more time, not more memory

    @property
    def count(self) -> int:
        return self.config.num_layers if self.blocks is None else self.blocks

    @property
    def tokens(self) -> int:
        sizes = zip(self.latent[2:], self.config.patch_size, strict=True)
        return torch.Size(n // p for n, p in sizes).numel() * self.latent[0]


class Numbers(NamedTuple):
    """Bytes of one kind of block in one phase, each beside what is kept by then."""

    kept: int
    kept_last: int
    forward: int  # most in the forward of a block, what a block of its kind before it puts away included
    forward_last: int  # without that
    backward: int  # and in its backward, without what the block before brings back
    backward_last: int
    head: int  # behind the last block: head, loss, reward model
    away: int  # on the host
    leaving: int  # still on the device of what a block has put away, until the next block's forward is over
    start: int  # before the blocks, beside weights and the like
    rest: int  # most before and after all blocks


class Laps:
    """The bytes at the borders of blocks, and the peaks between them, of the generator's pass in a phase: it
    watches `recompute.run_under`."""

    def __init__(self, live: LiveBytes):
        self.live, self.base, self.rest = live, live.now, 0
        self.now, self.host, self.forward, self.backward = [], [], [], []

    @property
    def peak(self) -> int:
        """Beside weights, gradients and the batch."""
        return self.live.peak - self.base

    def __call__(self, x: Tensor) -> None:
        self.forward.append(self.live.lap())
        self.now.append(self.live.now)
        self.host.append(self.live.host_now)
        if x.requires_grad:
            x.register_hook(lambda _: self.backward.append(self.live.lap()))


def _models(setup: Setup, blocks: int):
    """Generator with gradients and reward model under the current fake mode."""
    model = WanTransformer(replace(setup.config, num_layers=blocks))
    reward = None
    if setup.reward_blocks:
        trunk = WanTransformer(setup.config, setup.reward_blocks, head=False)
        reward = RewardModel(trunk, QueryPool(setup.config.dim), setup.reward_blocks).freeze()
    for m in (model, *(m.transformer for m in [reward] if m)):
        m.set_precision(setup.compute_dtype, setup.residual_dtype).set_chunk(setup.chunk)
    if setup.lora is not None:
        lora.attach(model, setup.lora)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return model, reward


def _graded(model, reward, batch: Batch, t, run_blocks, score_blocks) -> None:
    """A graded step, its reward and the backward: graded_windows without the choice of steps."""
    context = model.embed_context(batch.text, batch.clip)
    leaf = context.detach().requires_grad_(context.requires_grad)
    scored = reward.transformer.embed_context(batch.text, batch.clip)
    x = batch.latent - 0.1 * model(batch.latent, t, leaf, batch.condition, run_blocks)
    logit = reward.score(x, t, scored, batch.condition, score_blocks)
    torch.sigmoid(logit).sum().backward()
    if leaf.grad is not None:
        context.backward(leaf.grad)


def dry_run(setup: Setup, policies: list[BlockPolicy], reward_policy: BlockPolicy) -> dict[str, Laps]:
    """The bytes of each phase of a model of len(policies) blocks, under fake tensors."""
    before, dtype, found = table.configured(), torch.get_default_dtype(), {}
    table.configure("")
    torch.set_default_dtype(setup.weight_dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), compiled.dry_run(), torch.device("cpu"):
            model, reward = _models(setup, len(policies))
            size, c = setup.latent, setup.config
            image = (torch.empty(size[0], IMAGE_TOKENS, IMAGE_DIM), torch.empty(size[0], 20, *size[2:]))
            batch = Batch(
                torch.empty(size), torch.empty(size[0], c.text_len, c.text_dim), *(image if c.image else ())
            )
            noise, t = torch.empty(size), torch.empty(size[0])
            for phase in ("flow matching",) * setup.sft + ("graded step",) * (reward is not None):
                live = LiveBytes(512)
                live.add(p for m in (model, reward) if m is not None for p in m.parameters())
                live.add([*(p.grad for p in model.parameters() if p.grad is not None), noise, t])
                live.add(a for a in batch if a is not None)
                found[phase] = laps = Laps(live)
                run_blocks, score_blocks = run_under(policies, laps), run_under(reward_policy)
                with live:
                    if phase == "flow matching":
                        sft_loss(model, batch, noise, t, run_blocks).mean().backward()
                    else:
                        _graded(model, reward, batch, t, run_blocks, score_blocks)
                laps.rest = live.lap()
    finally:
        table.configure(before)
        torch.set_default_dtype(dtype)
    return found


def numbers_of(laps: Laps, policy: BlockPolicy) -> Numbers:
    """The numbers of a policy from a dry run of BLOCKS blocks that have it."""
    now, n = laps.now, BLOCKS - 1
    kept, away = now[n] - now[n - 1], laps.host[n] - laps.host[n - 1]
    ahead = 0 if policy.plain else away
    kept_last, leaving = now[n + 1] - now[0] - n * kept, now[n] - now[0] - n * kept
    return Numbers(
        kept, kept_last,
        laps.forward[n] - now[0] - (n - 1) * kept, laps.forward[n + 1] - now[0] - n * kept - leaving,
        laps.backward[2] - now[0] - (n - 1) * kept - ahead,
        laps.backward[1] - now[0] - n * kept - (0 if policy.staying().plain else away),
        laps.backward[0] - now[0] - n * kept - kept_last, away, leaving,
        now[0] - laps.base, max(laps.forward[0], laps.rest) - laps.base,
    )  # fmt: skip
