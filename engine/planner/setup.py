"""What a training step's memory and time depend on."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from prfl_engine.config import ChainConfig, LoraConfig, OptimConfig, RolloutConfig
from prfl_engine.config_models import Storage
from prfl_engine.model.wan import WanConfig
from prfl_engine.objectives import index_range

ROUND = 512  # torch's CUDA allocator rounds sizes up to this
Latent = tuple[int, int, int, int, int]  # [B, C, T, H, W]


def rounded(size: int, to: int = ROUND) -> int:
    """Bytes rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True)
class RewardSetup:
    """The shape of a frozen reward model whose first `blocks` blocks are computed. None: of the generator's
    configuration. Its transformer has the generator's dtypes, its pooling and MLP are float32."""

    blocks: int = 8
    config: WanConfig | None = None
    queries: int = 1
    heads: int = 8
    add_query: bool = True
    storage: Storage = Storage()  # of the matrices of its blocks


@dataclass(frozen=True)
class RewardTraining:
    """That a reward model is trained in place of a generator. Setup.config and Setup.blocks are those of its
    transformer, Setup.reward says what else it has."""

    pairs: bool = False  # a winner and a loser in one backward (reward.loss bt)
    at_once: bool = False  # and in one forward: they are one batch
    embeddings: bool = False  # whether they are trained
    dropout: float = 0.0


@dataclass(frozen=True)
class Validation:
    """What a validation's memory depends on: its largest batch [B, C, T, H, W], whether rewards are
    computed, how many batches there are and how many values [B] it makes of all, of how many samples. On a
    CPU batches of samples that are `kept` to be written, and `read` samples of the data, one less with the
    last batch, are in the same memory."""

    latent: Latent
    scored: bool = True
    batches: int = 1
    values: int = 0
    kept: int = 0
    read: int = 0
    samples: int = 0  # of all batches
    sides: int = 1  # latents of a sample: two of a pair
    guided: bool = False  # whether its chains are
    at_once: bool = False  # and with both halves of a step in one batch
    compared: bool = False  # with the frozen start


class Sharding(NamedTuple):
    """How FSDP2 shards weights and gradients, for dry runs of one rank."""

    ranks: int = 1
    reduce: torch.dtype | None = None  # of sums of gradients over ranks; None: that of their weights
    stay: bool = False  # a backward makes gradients that stay; else they are there before it
    resident: bool = False  # rollouts have whole weights of their own
    held: bool = False  # sums over ranks are kept, beside gradients, until a backward has added up all copies


@dataclass(frozen=True)
class Setup:
    """What a step's memory and time depend on. Texts have text_len tokens."""

    config: WanConfig
    latent: Latent
    compute_dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    reward: RewardSetup | None = RewardSetup()
    more: tuple[RewardSetup, ...] = ()  # further rewards
    draws: int = 1  # noise levels at which each scores a graded step
    graded: bool = True  # False: the reward model serves the validation alone
    sft: bool = True
    rollout: RolloutConfig = RolloutConfig()
    chain: ChainConfig = ChainConfig()
    blocks: int | None = None  # of the generator; None: all
    chunk: int | None = None
    keep: str = "all"  # what a rerun sublayer saves until its backward, as model.keep
    lora: LoraConfig | None = None  # None: all weights are trained
    storage: Storage = Storage()  # of the frozen matrices of blocks
    validation: Validation | None = None
    pool: int = 0  # bytes of chains that persist on the device: there in every pass and in validation
    drawn: int = 0  # of these what is there in graded steps alone
    pool_host: int = 0  # bytes of chains that persist on the host, pinned
    trains: RewardTraining | None = None  # None: a generator is trained
    experts: tuple[bool, bool] | None = None  # which of two experts is trained; None: there is one model
    boundary: float | None = None  # the noise level between the two
    beside: tuple[str, ...] = ()  # passes that may run a frame of a sample through the other expert, too
    idle: bool = False  # whether frozen blocks of the expert that is not asked are on the host
    anchor: Literal["none", "device", "host"] = "none"  # where a forward of the frozen start is from
    sequence: int = 1  # ranks over which the tokens of a sample are cut; what is counted is of the first
    sharding: Sharding = Sharding()
    first_frame: bool = False  # of every latent is given to a ti2v model
    grad_dtype: torch.dtype | None = None  # of gradients; None: of their weights
    alone: bool = False  # a backward is the only one of an optimizer step: there are no gradients before it
    lent: tuple[tuple[str, int], ...] = ()  # layers and ranks of the adapter of rollouts
    arriving: OptimConfig | None = None  # what updates a parameter when its gradient arrives

    @property
    def sides(self) -> int:
        """Batches of a backward: two of pairs, unless they are one."""
        return 1 + (self.trains is not None and self.trains.pairs and not self.trains.at_once)

    @property
    def through_high(self) -> bool:
        """Whether chains begin with the high-noise expert, and the low-noise one alone is trained."""
        return self.experts == (False, True) and self.rollout.start == "noise"

    @property
    def count(self) -> int:
        """Blocks of the generator."""
        return self.config.num_layers if self.blocks is None else self.blocks

    @property
    def rewards(self) -> tuple[RewardSetup, ...]:
        """All frozen reward models."""
        return () if self.reward is None else (self.reward, *self.more)

    @property
    def scored(self) -> list[RewardSetup]:
        """The reward model of every forward after a graded step."""
        return [r for r in self.rewards for _ in range(self.draws)] if self.graded else []

    @property
    def reward_blocks(self) -> int:
        """Blocks of reward models that are computed after a graded step, of all rewards and draws."""
        return sum(r.blocks for r in self.scored)

    @property
    def reward_moving(self) -> int:
        """Those of them that may offload: not the last one of a forward."""
        return sum(r.blocks - 1 for r in self.scored)

    @property
    def window(self) -> int:
        """Steps with gradient in the longest window."""
        longest = index_range(self.rollout)[1] + 1
        return longest if self.chain.window == "all" else min(self.chain.window, longest)

    @property
    def tokens(self) -> int:
        """Video tokens of a micro-batch."""
        sizes = zip(self.latent[2:], self.config.patch_size, strict=True)
        return torch.Size(n // p for n, p in sizes).numel() * self.latent[0]
