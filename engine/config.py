"""The configuration: one YAML file over frozen dataclasses, every field settable as section.field=value.

A value that cannot be right raises UserError, one line that names the field, what it got and what
it wants. The bounds of a field are part of its type; the checks here are those that involve several fields.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml

from prfl_engine.bounds import (
    Count,
    FilePath,
    Fraction,
    Matches,
    Name,
    Natural,
    Nonnegative,
    NotEmpty,
    Positive,
    Probability,
    Real,
    Section,
    Seed,
    Within,
)
from prfl_engine.config_file import from_dict, override, plain, read_yaml
from prfl_engine.errors import UserError, check

DEVICE = Matches(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", "auto, cpu, cuda or cuda:N")
Timestep = Annotated[float, Within(0, 1000)]
Rate = Annotated[float, Within(0, 1)]


@dataclass(frozen=True)
class KeptConfig(Section, name="model.recompute"):
    """What a block saves and offloads, where model.recompute is a mapping; the rest is recomputed."""

    keep: tuple[str, ...] = ()
    """Intermediates of a block that stay on the device; engine/memory/policy.py names them."""
    offload: tuple[str, ...] = ()
    """Those that are offloaded to host memory until backward. All others are recomputed."""


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """The generator: where it comes from, its precision, and its memory policy."""

    path: FilePath | None = None
    """Folder with config.json and native safetensors; None: random weights of `preset`."""
    preset: Name | None = None
    """Hyper-parameters when `path` is None: t2v-1.3b, t2v-14b, i2v-14b-480p, -720p, tiny-t2v, tiny-i2v."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Trained weights, and those of a frozen reward model's transformer; bfloat16: see optim.rounding."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Linear layers and attention."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Residual stream; the official code keeps it in float32."""
    recompute: KeptConfig | str = "none"
    """What blocks save for backward. none: all that `keep` names; full: their inputs; attention: also the
    output of their self-attention, which is most of a block's work; auto:GB: the fastest policies whose step
    is predicted to fit in so many 10^9 bytes in addition to weights, gradients and optimizer states, as
    validation has to (engine/planner/plan.py says what is counted); or {keep: [...], offload: [...]} with
    names of engine/memory/policy.py."""
    keep: Literal["nothing", "attention", "projections", "all"] = "all"
    """What the sublayers of a block save for backward (docs/kernels.md); with recompute: what a rerun
    sublayer saves until its own backward."""
    compile: bool = False
    """torch.compile for every block: one compilation serves all, and every shape takes one; blocks with
    gradient are compiled only where recompute is none."""
    chunk: Count | None = None
    """Tokens that the attention and FFN sublayers process at a time (except in attention itself), so that
    their intermediate results exist for that many tokens only; None: all."""
    kernels: Name | None = None
    """Implementations as in PRFL_KERNELS (reference, triton, attention=fa3, ...); None: that variable's."""
    host: Nonnegative | None = None
    """10^9 bytes of tensors that auto:GB may put into host memory; None: no limit, 0: nothing moves. torch
    may round the pinned buffer of each up to a power of two bytes. Refused without auto:GB, as is `costs`."""
    costs: FilePath | None = None
    """JSON of seconds for auto:GB, measured by `prfl_engine.planner.plan.measure`; None: predicted for an
    H100."""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.recompute, str):
            modes = ("none", "full", "attention")
            ok = self.recompute in modes or self.budget is not None
            want = f"{', '.join(modes)} or auto:GB such as auto:40, up to 10^9 GB"
            check(ok, "model.recompute", self.recompute, want)
        if self.budget is None:
            for name in ("host", "costs"):
                value = getattr(self, name)
                check(value is None, f"model.{name}", value, "null without model.recompute=auto:GB")

    @property
    def budget(self) -> float | None:
        """Bytes of auto:GB; None in the other modes."""
        mode, _, size = self.recompute.partition(":") if isinstance(self.recompute, str) else ("", "", "")
        try:
            size = float(size) * 1e9
        except ValueError:
            return None
        return size if mode == "auto" and 1 <= size <= 1e18 else None


@dataclass(frozen=True)
class LoraConfig(Section, name="lora"):
    """Low-rank adapters."""

    rank: Annotated[int, Within(0, 65536)] = 0
    """Rank of low-rank updates that are trained in place of the weights (in train-reward: those of the
    transformer); 0 trains the weights."""
    alpha: Positive | None = None
    """The updates' scale is alpha / rank; None: rank, so a scale of 1."""
    targets: Annotated[tuple[Name, ...], NotEmpty()] = (
        "q", "k", "v", "o", "k_img", "v_img", "ffn.0", "ffn.2",
    )  # fmt: skip
    """Ends of the names of the linear layers that get one, as in PEFT's target_modules."""
    path: FilePath | None = None
    """Adapter to start from, or to sample with: a folder in PEFT's format, or a safetensors file in one of
    the formats of engine/model/lora_files.py."""


@dataclass(frozen=True)
class RewardConfig(Section, name="reward"):
    """The reward model and how it is trained."""

    path: FilePath | None = None
    """Folder with the three files of a reward model; None: train-reward makes a new one of the generator's
    first blocks."""
    blocks: Annotated[int, Within(1, 10_000)] = 8
    """How many of the generator's first blocks a new reward model is made of."""
    feature_layer: Count | Literal["auto"] = "auto"
    """The block whose output is pooled, counted from 1. auto: as stored with the reward model of `path`, 8
    for an official one, which stores nothing; for a new one its last block. A value that differs from the
    stored one is refused."""
    num_queries: Annotated[int, Within(1, 65536)] = 1
    num_heads: Annotated[int, Within(1, 65536)] | Literal["auto"] = "auto"
    """Heads of the pooling. auto: as stored, or 8."""
    dropout: Fraction = 0.0
    """Dropout of the pooling's attention weights while the reward model is trained."""
    return_type: Literal["query", "auto"] | None = "auto"
    """query: the mean of the queries is added to the pooled vector; null: it is not; auto: as stored, or
    query."""
    train_embeddings: bool = False
    """Train the transformer's embeddings (patches, text, time, image) too; the paper's code freezes them."""
    loss: Literal["ce", "bt"] = "ce"
    """ce: binary cross-entropy on the label; bt: Bradley-Terry on (winner, loser) pairs."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.feature_layer == "auto" or self.feature_layer <= self.blocks, "reward.feature_layer",
            self.feature_layer, f"1 to reward.blocks = {self.blocks}",
        )  # fmt: skip

    @property
    def pooling(self) -> dict[str, int | bool]:
        """num_heads, add_query and feature_layer as functions of checkpoint.py take them, without those that
        are auto."""
        named = {"num_heads": self.num_heads, "feature_layer": self.feature_layer}
        found = {name: value for name, value in named.items() if value != "auto"}
        return found if self.return_type == "auto" else found | {"add_query": self.return_type == "query"}


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Lists of samples and how they are read."""

    train: tuple[FilePath, ...] = ()
    """.list files of meta JSON paths; the winners when reward.loss is bt."""
    lose: tuple[FilePath, ...] = ()
    """.list files of the losers when reward.loss is bt."""
    val: tuple[FilePath, ...] = ()
    """.list files of held-out data; the winners when reward.loss is bt."""
    val_lose: tuple[FilePath, ...] = ()
    """.list files of held-out losers: with reward.loss bt a validation compares pairs."""
    null_text: FilePath | None = None
    """.npy of the null prompt's embedding [1, n, text_dim]; needed when text_dropout > 0."""
    negative_text: FilePath | None = None
    """.npy of the embedding used against the prompt when sample.guidance is not 1."""
    text_dropout: Probability | None = None
    """Probability that the null prompt replaces the text of a training sample; null: 0.1 in PRFL, 0 in reward
    training, as in the paper's code."""
    long_caption: Probability = 0.7
    """Probability of the long caption where a sample has a short and a long one (PRFL only)."""
    label: Name = "motion_quality"
    """Label of reward training: a field of the meta JSONs; motion_quality = physics_quality and
    human_quality. A field that no sample has and data of one class are refused."""
    batch_size: Count = 1
    """Samples of one micro-batch; all of one shape."""
    num_workers: Annotated[int, Within(0, 1024)] = 2
    """Loader processes; 0 loads in the training process."""

    def dropout(self, default: float) -> float:
        """text_dropout, or `default` where it is null. UserError where it needs a null_text and has none."""
        value = default if self.text_dropout is None else self.text_dropout
        if value > 0 and self.null_text is None:
            raise UserError("data.null_text: got null, want the null prompt's .npy (text_dropout > 0)")
        return value


@dataclass(frozen=True)
class RolloutConfig(Section, name="rollout"):
    """Denoising steps, and the chains that graded steps are taken from."""

    mode: Literal["fresh", "persistent"] = "fresh"
    """fresh: a graded step comes from a rollout of its own, as in the paper; persistent: from a chain that
    lives on from one optimizer step to the next (docs/persistent.md)."""
    pool: Count | None = None
    """Chains that persist: a multiple of the graded samples of an optimizer step (data.batch_size *
    train.accumulate * rollout.samples); null: twice that, so that none is drawn in two consecutive steps."""
    pool_place: Literal["device", "host"] = "device"
    """Where the states of chains that persist are held; host: pinned for a GPU."""
    stride: Count = 1
    """Mean steps of a chain that persists from one graded step to the next; those in between have no gradient
    and are made by the present weights."""
    solver: Literal["unipc", "euler"] = "unipc"
    steps: Annotated[int, Within(2, 1000)] = 40
    """Denoising steps of the whole chain."""
    shift: Positive = 5.0
    """Shift of the flow schedule, for rollouts, flow matching and reward training alike."""
    range: Literal["all", "early", "middle", "late"] | tuple[int, int] = "all"
    """Where the graded step is drawn: all of 0..steps-2, a third of it, or [first, last]."""
    samples: Annotated[int, Within(1, 10_000)] = 1
    """Graded steps of one rollout, drawn one from each of as many equal parts of `range`; the mean of
    their losses is taken. 1 is the paper's algorithm. Of chains that persist: so many graded steps for
    every sample of a micro-batch, each of another chain."""
    precision: Literal["same", "fp8"] = "same"
    """fp8: linear layers and self-attention of the steps without gradient in e4m3; heads of 64 or 128."""
    cache: Nonnegative = 0.0
    """Steps without gradient reuse what the blocks added before, while the accumulated relative change of
    their modulated input stays below this (TeaCache); 0 computes every step. With 40 steps 0.05 skipped
    0.4 of the demo's, 0.1 0.6 of them."""
    probe_every: Count = 50
    """Optimizer steps between measurements of how far an fp8 or cached rollout ends from a plain one, and a
    chain that persists from a rollout by the present weights."""
    max_drift: Positive = 0.05
    """Relative distance of the latents above which rollouts are plain until a measurement is below it, and
    the oldest chains that persist are rolled out again. On the demo fp8 has 0.025, and the last step of 40 by
    itself moves a latent by 0.09."""
    cuda_graph: bool = False
    """Replay the blocks of steps without gradient as a CUDA graph: worth it where launches cost more than
    the work (few tokens); its working memory stays reserved."""

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.range, str):
            first, last = self.range
            check(
                0 <= first <= last <= self.steps - 2, "rollout.range", list(self.range),
                f"[first, last] within 0..{self.steps - 2}",
            )  # fmt: skip
        if self.mode == "fresh":
            want = "with rollout.mode fresh"
            check(self.pool is None, "rollout.pool", self.pool, f"null {want}")
            check(self.pool_place == "device", "rollout.pool_place", self.pool_place, f"device {want}")
            check(self.stride == 1, "rollout.stride", self.stride, f"1 {want}")


@dataclass(frozen=True)
class ChainConfig(Section, name="chain"):
    """Denoising steps with gradient."""

    window: Count | Literal["all"] = 1
    """Denoising steps with gradient before the reward, the graded one included; all: from the noise on."""
    detach_input: bool = False
    """Give the model a detached input at every graded step, so that the gradient goes from step to step
    through the sampler alone (DRTune)."""


@dataclass(frozen=True)
class LossConfig(Section, name="loss"):
    """Losses of PRFL."""

    form: Literal["hinge", "linear", "log"] = "hinge"
    """On the reward r: hinge weight * relu(target - r); linear -weight * r; log -weight * log r."""
    weight: Nonnegative = 0.1
    """Weight of the reward loss; 0 trains by flow matching alone and computes no rollout."""
    target: Real = 2.0
    """Target of the hinge; 2 is never reached by r < 1, which makes it linear."""
    sft_weight: Nonnegative = 1.0
    """Weight of the flow-matching loss; 0 computes none."""
    sft_every: Count = 1
    """Flow matching in one optimizer step of so many, in the first, at its full weight; the others have the
    reward loss alone."""
    alternate: bool = False
    """true: one optimizer step has the flow-matching loss of all its micro-batches, the next one the reward
    loss of all of its own, in turn. false: every step has the reward loss, and as many as sft_every says have
    both losses of every micro-batch. The official
    script computes both losses of every micro-batch and updates twice for a = `train.accumulate` of them: by
    a gradients of flow matching and a - 1 of the reward, then by the last one of the reward. With a = 1 it
    alternates too, but both updates are by the same sample."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.weight + self.sft_weight > 0, "loss.weight", self.weight,
            "a positive weight here or in loss.sft_weight",
        )  # fmt: skip
        check(
            not self.alternate or (self.weight > 0 and self.sft_weight > 0), "loss.alternate", self.alternate,
            "false, or positive loss.weight and loss.sft_weight",
        )  # fmt: skip
        if self.sft_every > 1:
            both = self.weight > 0 and self.sft_weight > 0
            want = "1, or positive loss.weight and loss.sft_weight"
            check(both, "loss.sft_every", self.sft_every, want)
            check(not self.alternate, "loss.sft_every", self.sft_every, "1 with loss.alternate")


@dataclass(frozen=True)
class OptimConfig(Section, name="optim"):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw8bit", "apex"] = "adamw"
    """adamw8bit: moments in 8 bits (torchao, the extra [lowmem]), for betas with beta1^2 < beta2; apex:
    FusedAdam of NVIDIA's apex."""
    lr: Rate = 5e-6
    """Learning rate of the transformer."""
    lr_head: Rate = 1e-5
    """Learning rate of queries, pooling and MLP in reward training."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Within(1e-15, 1)] = 1e-8
    weight_decay: Annotated[float, Within(0, 1000)] = 0.01
    """In an update a weight loses its learning rate times this of itself, at the most all of it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at train.steps."""
    warmup: Natural = 0
    """Optimizer steps of linear warm-up."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient; null clips nothing."""
    rounding: Literal["master", "stochastic"] = "master"
    """Of bfloat16 weights. master: the optimizer keeps the other 16 bits of a float32 weight; stochastic: it
    keeps none and rounds up or down at random; the expected value is right."""
    grad_dtype: Literal["weights", "float32"] = "weights"
    """Gradients are added up in the dtype of their weights, or in float32."""
    in_backward: bool = False
    """Update a parameter as soon as backward has computed its gradient, then free the gradient. Needs one
    backward in an optimizer step (gradients that wait for another one would have to be stored) and no
    clipping."""
    offload: Literal["none", "states", "all"] = "none"
    """What lives in host memory (pinned for a GPU) and passes through the device in blocks: states, the
    optimizer's; all: gradients too, added up there, clipped as always."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("lr", "lr_head"):
            check(
                getattr(self, name) * self.weight_decay <= 1, "optim.weight_decay", self.weight_decay,
                f"at most 1 / optim.{name}",
            )  # fmt: skip
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
class TrainConfig(Section, name="train"):
    """Length of the run, its output, and checkpoints."""

    out: FilePath = "runs/prfl"
    """Output folder: metrics, checkpoints, samples."""
    resume: bool | Literal["auto"] = False
    """true: go on from the newest checkpoint in `out`, which must hold a run; auto: start if it holds none;
    false: a folder that holds a run is refused. docs/training.md says what a resumed run may change."""
    device: Annotated[str, DEVICE] = "auto"
    """auto: the first GPU, or the CPU where there is none."""
    steps: Count = 1000
    """Optimizer steps."""
    accumulate: Count = 1
    """Micro-batches of one optimizer step, of all processes together; their mean gradient is applied once. So
    a run is the same on any number of GPUs."""
    seed: Seed = 0
    save_every: Count = 100
    keep: Count = 2
    """How many checkpoints are kept, besides the best."""
    log_every: Count = 1
    ema: Fraction = 0.0
    """Decay of the exponential moving average of the weights; 0 keeps none."""
    tensorboard: bool = True
    wandb: Name | None = None
    """Weights & Biases project; needs the wandb package."""


@dataclass(frozen=True)
class ParallelConfig(Section, name="parallel"):
    """How the processes that torchrun has started share the weights and the work."""

    replicate: Count | None = None
    """Copies of the sharded weights (HSDP); it divides the processes. null: one a node, so that weights are
    gathered inside nodes; 1 shards over all processes."""
    sequence: Count = 1
    """Neighbouring processes that share every sample, each with a part of its tokens; it divides the heads
    and the processes of one copy."""
    resident: bool = False
    """Gather all weights once for a rollout, and drop them before its graded step: no collective inside a
    rollout, at the cost of whole weights on every GPU meanwhile."""
    timeout: Annotated[float, Within(1, 86400)] = 1800.0
    """Seconds after which a collective that some process does not join ends the run."""


@dataclass(frozen=True)
class EvalConfig(Section, name="eval"):
    """Validation."""

    every: Natural = 0
    """Optimizer steps between validations; 0 validates never. The weights with the highest score are kept as
    `best`. The score of PRFL is the mean reward of samples, where loss.weight is 0 minus the flow-matching
    loss; that of reward training is the mean accuracy, with reward.loss bt that of pairs."""
    samples: Annotated[int, Within(1, 10**6)] = 8
    """Held-out prompts sampled from fixed seeds, and held-out latents for the flow-matching loss."""
    batch_size: Count = 4
    timesteps: Annotated[tuple[Timestep, ...], NotEmpty()] = (201, 400, 600, 800, 1000)
    """Where rewards and accuracies are measured, with fixed noise. At 1000 the input is noise alone: it is
    shown, and is no part of a score."""
    seed: Seed = 1234
    videos: Natural = 4
    """How many of the samples are written as latents, and as videos if data are codec latents."""

    def __post_init__(self):
        super().__post_init__()
        check(
            bool(self.scored), "eval.timesteps", list(self.timesteps),
            "one below 1000, where the input is noise alone",
        )  # fmt: skip

    @property
    def scored(self) -> tuple[float, ...]:
        """Those of `timesteps` at which something of the latent is left."""
        return tuple(t for t in self.timesteps if t < 1000)


@dataclass(frozen=True)
class SampleConfig(Section, name="sample"):
    """What `prfl sample` makes."""

    count: Annotated[int, Within(1, 10**6)] = 4
    """How many of the prompts of data.val (in order, repeated if short) are sampled."""
    seed: Seed = 0
    guidance: Real = 1.0
    """Classifier-free guidance scale; 1 is none, as in training."""
    codec: FilePath | None = None
    """JSON file of the demo's latent codec; None writes latents only."""
    fps: Annotated[int, Within(1, 1000)] = 16


@dataclass(frozen=True)
class Config(Section, name=""):
    """A whole configuration: one field a section of the YAML."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        super().__post_init__()
        check(
            self.pool % self.graded == 0, "rollout.pool", self.pool,
            f"a multiple of {self.graded} = data.batch_size * train.accumulate * rollout.samples",
        )  # fmt: skip

    @property
    def graded(self) -> int:
        """Graded samples of an optimizer step, where all micro-batches are full."""
        return self.data.batch_size * self.train.accumulate * self.rollout.samples

    @property
    def pool(self) -> int:
        """Chains that persist: rollout.pool, or its default."""
        return self.rollout.pool or 2 * self.graded

    def to_yaml(self) -> str:
        return yaml.safe_dump(plain(asdict(self)), sort_keys=False)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Config from a YAML file (None: all defaults) and overrides such as "train.steps=100"."""
    values = {} if path is None else read_yaml(Path(path))
    for item in overrides:
        override(values, item)
    return from_dict(Config, values, "")
