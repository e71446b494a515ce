"""The configuration: one YAML file over frozen dataclasses, every field settable as section.field=value.

A value that cannot be right raises UserError, one line that names the field, what it got and what
it wants.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from prfl_engine.config_file import from_dict, override, plain, read_yaml
from prfl_engine.errors import UserError as UserError  # importable from here too
from prfl_engine.errors import check


@dataclass(frozen=True)
class KeptConfig:
    keep: tuple[str, ...] = ()
    """Intermediates of a block that stay on the device; engine/recompute.py names them."""
    offload: tuple[str, ...] = ()
    """Those that wait for the backward in host memory. All others are computed again."""


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None
    """Folder with config.json and native safetensors; None: random weights of `preset`."""
    preset: str | None = None
    """Hyper-parameters when `path` is None: t2v-1.3b, t2v-14b, i2v-14b-480p, -720p, tiny-t2v, tiny-i2v."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Trained weights, and those of a frozen reward model's transformer; bfloat16: see optim.rounding."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Linear layers and attention."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Residual stream; the official code keeps it in float32."""
    recompute: KeptConfig | str = "none"
    """What blocks keep for their backward. none: all that `keep` says; full: their inputs; attention: the
    output of their self-attention too, which is most of a block's work; auto:GB: the fastest policies whose
    step is predicted to fit in so many 10^9 bytes in addition to weights, gradients and optimizer states, as
    validation has to (engine/plan.py says what is counted); or {keep: [...], offload: [...]} with names of
    engine/recompute.py."""
    keep: Literal["nothing", "attention", "projections", "all"] = "all"
    """What the branches of a block keep for the backward (docs/kernels.md); with recompute: what a branch
    that is run again keeps until its own backward."""
    compile: bool = False
    """torch.compile for every block: one compilation serves all, and every shape takes one; blocks with
    gradient are compiled only where recompute is none."""
    chunk: int | None = None
    """Tokens that the attention and FFN branches work on at a time, attention itself excepted, so that what
    they make on the way is never whole; None: all."""
    kernels: str | None = None
    """Implementations as in PRFL_KERNELS (reference, triton, attention=fa3, ...); None: that variable's."""
    host: float | None = None
    """10^9 bytes of tensors that auto:GB may put into host memory; None: no limit, 0: nothing moves. torch
    may round the pinned buffer of each up to a power of two bytes."""
    costs: str | None = None
    """JSON of measured seconds for auto:GB (`prfl_engine.plan.measure`); None: predicted for an H100."""

    def __post_init__(self):
        if isinstance(self.recompute, str):
            modes = ("none", "full", "attention")
            ok = self.recompute in modes or self.budget is not None
            check(ok, "model.recompute", self.recompute, f"{', '.join(modes)} or auto:GB such as auto:40")
        check(self.host is None or self.host >= 0, "model.host", self.host, "at least 0")
        check(self.chunk is None or self.chunk >= 1, "model.chunk", self.chunk, "at least 1")

    @property
    def budget(self) -> float | None:
        """Bytes of auto:GB; None in the other modes."""
        mode, _, size = self.recompute.partition(":") if isinstance(self.recompute, str) else ("", "", "")
        try:
            size = float(size) * 1e9
        except ValueError:
            return None
        return size if mode == "auto" and 0 < size < float("inf") else None


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of low-rank updates that are trained in place of the weights; 0 trains the weights."""
    alpha: float | None = None
    """The updates' scale is alpha / rank; None: rank, so a scale of 1."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "k_img", "v_img", "ffn.0", "ffn.2")
    """Ends of the names of the linear layers that get one, as in PEFT's target_modules."""
    path: str | None = None
    """Adapter to start from, or to sample with: a folder in PEFT's format or its safetensors file."""

    def __post_init__(self):
        check(self.rank >= 0, "lora.rank", self.rank, "at least 0")
        check(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
        check(bool(self.targets), "lora.targets", list(self.targets), "at least one")


@dataclass(frozen=True)
class RewardConfig:
    path: str | None = None
    """Folder with the three files of a reward model; None: see `init`."""
    blocks: int = 8
    """How many of the generator's first blocks a new reward model is made of."""
    feature_layer: int = 8
    """The block whose output is pooled, counted from 1."""
    num_queries: int = 1
    num_heads: int = 8
    dropout: float = 0.0
    """Dropout of the pooling's attention weights while the reward model is trained."""
    return_type: Literal["query"] | None = "query"
    """query: the mean of the queries is added to the pooled vector."""
    loss: Literal["ce", "bt"] = "ce"
    """ce: binary cross-entropy on the label; bt: Bradley-Terry on (winner, loser) pairs."""

    def __post_init__(self):
        check(self.blocks >= 1, "reward.blocks", self.blocks, "at least 1")
        check(
            1 <= self.feature_layer <= self.blocks, "reward.feature_layer", self.feature_layer,
            f"1 to reward.blocks = {self.blocks}",
        )  # fmt: skip
        check(self.num_queries >= 1, "reward.num_queries", self.num_queries, "at least 1")
        check(0 <= self.dropout < 1, "reward.dropout", self.dropout, "a number in [0, 1)")


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...] = ()
    """.list files of meta JSON paths; the winners when reward.loss is bt."""
    lose: tuple[str, ...] = ()
    """.list files of the losers when reward.loss is bt."""
    val: tuple[str, ...] = ()
    """.list files of held-out data."""
    null_text: str | None = None
    """.npy of the null prompt's embedding [1, n, text_dim]; needed when text_dropout > 0."""
    negative_text: str | None = None
    """.npy of the embedding used against the prompt when sample.guidance is not 1."""
    text_dropout: float = 0.1
    """Probability that the null prompt replaces the text of a training sample."""
    long_caption: float = 0.7
    """Probability of the long caption where a sample has a short and a long one (PRFL only)."""
    label: str = "motion_quality"
    """Label of reward training: a field of the meta JSON; motion_quality = physics and human."""
    batch_size: int = 1
    """Samples of one micro-batch; all of one shape."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self):
        for name in ("text_dropout", "long_caption"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"data.{name}", value, "a probability in [0, 1]")
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        check(self.num_workers >= 0, "data.num_workers", self.num_workers, "at least 0")


@dataclass(frozen=True)
class RolloutConfig:
    solver: Literal["unipc", "euler"] = "unipc"
    steps: int = 40
    """Denoising steps of the whole chain."""
    shift: float = 5.0
    """Shift of the flow schedule, for rollouts, flow matching and reward training alike."""
    range: Literal["all", "early", "middle", "late"] | tuple[int, int] = "all"
    """Where the graded step is drawn: all of 0..steps-2, a third of it, or [first, last]."""
    samples: int = 1
    """Graded steps of one rollout, drawn one from each of as many equal parts of `range`; the mean of
    their losses is taken. 1 is the paper's algorithm."""
    precision: Literal["same", "fp8"] = "same"
    """fp8: linear layers and self-attention of the steps without gradient in e4m3; heads of 64 or 128."""
    cache: float = 0.0
    """Steps without gradient reuse what the blocks added before, while the accumulated relative change of
    their modulated input stays below this (TeaCache); 0 computes every step. With 40 steps 0.05 skipped
    0.4 of the demo's, 0.1 0.6 of them."""
    probe_every: int = 50
    """Optimizer steps between measurements of how far an fp8 or cached rollout ends from a plain one."""
    max_drift: float = 0.05
    """Relative distance of the latents above which rollouts are plain until a measurement is below it. On
    the demo fp8 has 0.025, and the last step of 40 by itself moves a latent by 0.09."""
    cuda_graph: bool = False
    """Replay the blocks of steps without gradient as a CUDA graph: worth it where launches cost more than
    the work (few tokens); its working memory stays reserved."""

    def __post_init__(self):
        check(self.cache >= 0, "rollout.cache", self.cache, "at least 0")
        check(self.probe_every >= 1, "rollout.probe_every", self.probe_every, "at least 1")
        check(self.max_drift > 0, "rollout.max_drift", self.max_drift, "a positive number")
        check(self.steps >= 2, "rollout.steps", self.steps, "at least 2")
        check(self.shift > 0, "rollout.shift", self.shift, "a positive number")
        check(self.samples >= 1, "rollout.samples", self.samples, "at least 1")
        if not isinstance(self.range, str):
            first, last = self.range
            check(
                0 <= first <= last <= self.steps - 2, "rollout.range", list(self.range),
                f"[first, last] within 0..{self.steps - 2}",
            )  # fmt: skip


@dataclass(frozen=True)
class ChainConfig:
    window: int | Literal["all"] = 1
    """Denoising steps with gradient before the reward, the graded one included; all: from the noise on."""
    detach_input: bool = False
    """Give the model a detached input at every graded step, so that the gradient goes from step to step
    through the sampler alone (DRTune)."""

    def __post_init__(self):
        check(self.window == "all" or self.window >= 1, "chain.window", self.window, "all or at least 1")


@dataclass(frozen=True)
class LossConfig:
    form: Literal["hinge", "linear", "log"] = "hinge"
    """On the reward r: hinge weight * relu(target - r); linear -weight * r; log -weight * log r."""
    weight: float = 0.1
    """Weight of the reward loss; 0 trains by flow matching alone and computes no rollout."""
    target: float = 2.0
    """Target of the hinge; 2 is never reached by r < 1, which makes it linear."""
    sft_weight: float = 1.0
    """Weight of the flow-matching loss; 0 computes none."""
    alternate: bool = False
    """Flow matching in one optimizer step, the reward in the next, in turn, as the official script has it;
    false: both losses in every step."""

    def __post_init__(self):
        check(self.weight >= 0, "loss.weight", self.weight, "at least 0")
        check(self.sft_weight >= 0, "loss.sft_weight", self.sft_weight, "at least 0")
        check(
            self.weight + self.sft_weight > 0, "loss.weight", self.weight,
            "a positive weight here or in loss.sft_weight",
        )  # fmt: skip
        check(
            not self.alternate or (self.weight > 0 and self.sft_weight > 0), "loss.alternate", self.alternate,
            "false, or positive loss.weight and loss.sft_weight",
        )  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adamw8bit", "apex"] = "adamw"
    """adamw8bit: moments in 8 bits (torchao, the extra [lowmem]); apex: FusedAdam of NVIDIA's apex."""
    lr: float = 5e-6
    """Learning rate of the transformer."""
    lr_head: float = 1e-5
    """Learning rate of queries, pooling and MLP in reward training."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at train.steps."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; null clips nothing."""
    rounding: Literal["master", "stochastic"] = "master"
    """Of bfloat16 weights. master: the optimizer keeps the other 16 bits of a float32 weight; stochastic: it
    keeps none and rounds up or down at random, right on average."""
    grad_dtype: Literal["weights", "float32"] = "weights"
    """Gradients are added up in the dtype of their weights, or in float32."""
    in_backward: bool = False
    """Update a parameter as soon as backward has its gradient, and free that. For one backward in an
    optimizer step (what waits for another would be kept all the same) and without clipping."""
    offload: Literal["none", "states", "all"] = "none"
    """What lives in host memory (pinned for a GPU) and passes through the device in blocks: states, the
    optimizer's; all: gradients too, added up there, clipped as always."""

    def __post_init__(self):
        for name in ("lr", "lr_head", "weight_decay"):
            value = getattr(self, name)
            check(value >= 0, f"optim.{name}", value, "at least 0")
        check(self.warmup >= 0, "optim.warmup", self.warmup, "at least 0")
        check(self.clip is None or self.clip > 0, "optim.clip", self.clip, "a positive number or null")
        if self.in_backward:
            check(
                self.clip is None, "optim.clip", self.clip,
                "null with optim.in_backward: the norm is known when the last update has been made",
            )  # fmt: skip
            check(
                self.offload != "all", "optim.offload", self.offload, "none or states with optim.in_backward"
            )
        if self.name == "apex":
            check(not self.in_backward, "optim.in_backward", True, "false with optim.name apex")
            check(self.offload == "none", "optim.offload", self.offload, "none with optim.name apex")


@dataclass(frozen=True)
class TrainConfig:
    out: str = "runs/prfl"
    """Output folder: metrics, checkpoints, samples."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`; without it a folder with checkpoints is refused."""
    device: str = "auto"
    """auto: the first GPU, or the CPU where there is none."""
    steps: int = 1000
    """Optimizer steps."""
    accumulate: int = 1
    """Micro-batches of one optimizer step; their mean gradient is applied once."""
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    """How many checkpoints are kept, besides the best."""
    log_every: int = 1
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 keeps none."""
    tensorboard: bool = True
    wandb: str | None = None
    """Weights & Biases project; needs the wandb package."""

    def __post_init__(self):
        for name in ("steps", "accumulate", "save_every", "keep", "log_every"):
            value = getattr(self, name)
            check(value >= 1, f"train.{name}", value, "at least 1")
        check(0 <= self.ema < 1, "train.ema", self.ema, "a decay in [0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Optimizer steps between validations; 0 validates never."""
    samples: int = 8
    """Held-out prompts sampled from fixed seeds, and held-out latents for the flow-matching loss."""
    batch_size: int = 4
    timesteps: tuple[float, ...] = (201, 400, 600, 800, 1000)
    """Where rewards and accuracies are measured, with fixed noise."""
    seed: int = 1234
    videos: int = 4
    """How many of the samples are written as latents, and as videos if data are codec latents."""

    def __post_init__(self):
        for name in ("every", "videos"):
            value = getattr(self, name)
            check(value >= 0, f"eval.{name}", value, "at least 0")
        for name in ("samples", "batch_size"):
            value = getattr(self, name)
            check(value >= 1, f"eval.{name}", value, "at least 1")
        for t in self.timesteps:
            check(0 <= t <= 1000, "eval.timesteps", t, "timesteps in 0..1000")


@dataclass(frozen=True)
class SampleConfig:
    count: int = 4
    """How many of the prompts of data.val (in order, repeated if short) are sampled."""
    seed: int = 0
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none, as in training."""
    codec: str | None = None
    """JSON file of the demo's latent codec; None writes latents only."""
    fps: int = 16

    def __post_init__(self):
        check(self.count >= 1, "sample.count", self.count, "at least 1")
        check(self.fps >= 1, "sample.fps", self.fps, "at least 1")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        check(
            self.train.accumulate == 1 or not self.optim.in_backward, "train.accumulate",
            self.train.accumulate, "1 with optim.in_backward: one backward in an optimizer step",
        )  # fmt: skip

    def to_yaml(self) -> str:
        return yaml.safe_dump(plain(asdict(self)), sort_keys=False)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Config from a YAML file (None: all defaults) and overrides such as "train.steps=100"."""
    values = {} if path is None else read_yaml(Path(path))
    for item in overrides:
        override(values, item)
    return from_dict(Config, values, "")
