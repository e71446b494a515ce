"""The configuration: one YAML file over frozen dataclasses, every field settable as section.field=value.

The sections model, lora and reward are in config_models.py, rollout, chain and loss in config_method.py, the
others here.

A value that cannot be right raises UserError, one line that names the field, what it got and what
it wants. The bounds of a field are part of its type, and bounds.Section checks them; the checks here are
those that involve several fields.
"""

import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml

from prfl_engine import official_yaml
from prfl_engine.bounds import (
    Count,
    FilePath,
    Fraction,
    Matches,
    Name,
    Natural,
    NotEmpty,
    Positive,
    Probability,
    Section,
    Seed,
    Within,
)
from prfl_engine.config_file import from_dict, override, plain, read_yaml
from prfl_engine.config_method import ChainConfig, LossConfig, RolloutConfig, Scale, scales
from prfl_engine.config_models import KeptConfig, LoraConfig, ModelConfig, MoreReward, RewardConfig
from prfl_engine.errors import UserError, check

__all__ = [
    "ChainConfig", "Config", "DataConfig", "EvalConfig", "KeptConfig", "LoraConfig", "LossConfig",
    "ModelConfig", "MoreReward", "OptimConfig", "ParallelConfig", "RewardConfig", "RolloutConfig",
    "SampleConfig", "TrainConfig", "load_config", "read_config", "values_of",
]  # fmt: skip

DEVICE = Matches(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", "auto, cpu, cuda or cuda:N")
Timestep = Annotated[float, Within(0, 1000)]
Rate = Annotated[float, Within(0, 1)]


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Lists of samples and how they are read."""

    train: tuple[FilePath, ...] = ()
    """.list files of meta JSON paths; the winners when reward.loss is bt."""
    lose: tuple[FilePath, ...] = ()
    """.list files of the losers when reward.loss is bt."""
    paired: bool = False
    """With reward.loss bt the k-th of data.lose is the loser of the k-th of data.train, as where two videos
    of one prompt were compared; false: a random one of its shape, as in the official script."""
    val: tuple[FilePath, ...] = ()
    """.list files of held-out data; the winners when reward.loss is bt."""
    val_lose: tuple[FilePath, ...] = ()
    """.list files of held-out losers: with reward.loss bt a validation compares pairs."""
    null_text: FilePath | None = None
    """.npy of the null prompt's embedding [1, n, text_dim]; needed when text_dropout > 0."""
    negative_text: FilePath | None = None
    """.npy of the embedding used against the prompt where a guidance (of rollout, chain, eval or sample) is
    not 1: of the negative prompt, or data.null_text's file."""
    text_dropout: Probability | None = None
    """Probability that the null prompt replaces the text of a training sample; null: 0.1 in PRFL, 0 in reward
    training, as in the paper's code."""
    long_caption: Probability = 0.7
    """Probability of the long caption where a sample has a short and a long one (PRFL only)."""
    label: Name = "motion_quality"
    """Label of reward training: a field of the meta JSONs; motion_quality = physics_quality and
    human_quality. A field that no sample has and data of one class are refused."""
    first_frame: bool = False
    """Give the first frame of every latent to a ti2v model (image mode); false: it gets the text alone."""
    batch_size: Count = 1
    """Samples of one micro-batch; all of one shape."""
    skip_broken: Natural = 0
    """How many broken samples of training (a file that cannot be read, a wrong shape, NaN) a run leaves out;
    `train.out`/broken.jsonl lists them. Another sample takes the place of each. One more stops the run with
    its name; 0: so does the first. A resumed run leaves out the same, wherever the data are then."""
    num_workers: Annotated[int, Within(0, 1024)] = 2
    """Loader processes; 0 loads in the training process."""
    keep_gb: Annotated[float, Within(0, 1e9)] = 0.0
    """10^9 bytes of training samples that each of these processes keeps in memory, so that they are read once
    and not in every epoch: for small data, or slow disks. Changes of a kept file are not seen."""

    def dropout(self, default: float) -> float:
        """text_dropout, or `default` where it is null. UserError where it needs a null_text and has none."""
        value = default if self.text_dropout is None else self.text_dropout
        if value > 0 and self.null_text is None:
            raise UserError("data.null_text: got null, want the null prompt's .npy (text_dropout > 0)")
        return value


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
    """After the warm-up; cosine falls to 0 at `horizon`."""
    warmup: Natural = 0
    """Updates of linear warm-up; an optimizer step is one, with loss.split two."""
    horizon: Count | None = None
    """Updates, the warm-up included, at which `schedule` ends; null: those of train.steps."""
    cycles: Positive = 0.5
    """Periods of the cosine; 0.5 falls once, 1 falls and rises."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient; null clips nothing."""
    clip_each: bool = False
    """Clip what has been added up after every backward, as the official script does; false: once, before the
    update. So the first losses of an optimizer step weigh less where the norm is above `clip`. Several groups
    of processes make a backward together, so a run is not the same on another number of them."""
    clip_heads: bool = True
    """In reward training pooling and MLP belong to the gradient that is clipped; false: the transformer's
    alone is, as in the official script."""
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
        if self.clip_each:
            check(self.clip is not None, "optim.clip", None, "a norm with optim.clip_each")
            check(self.offload != "all", "optim.offload", self.offload, "none or states with optim.clip_each")
        if not self.clip_heads:
            check(self.clip is not None, "optim.clip", None, "a norm with optim.clip_heads false")
            want = "none or states with optim.clip_heads false"
            check(self.offload != "all", "optim.offload", self.offload, want)
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
    compat: Literal["official"] | None = None
    """official: what HY-Video-PRFL does and we do otherwise is set as there, as far as a field is not set
    itself (docs/official.md has the list); null: our defaults."""
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
    ema_each: Literal["step", "micro_batch"] = "step"
    """When the average moves: once after an optimizer step, or as often as a process has micro-batches in it,
    as in the official script."""
    stop_anchor: Positive | None = None
    """A distance to the frozen start (loss.anchor), of graded steps or of flow matching, above which a PRFL
    run saves a checkpoint and ends, one step after the record (log_every) that has it; null: it goes on."""
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
    """Neighbouring processes that share every sample, each with a part of its tokens; it divides the
    processes of one copy. Where it does not divide the heads, keys and values are gathered, too."""
    resident: bool = False
    """Gather all weights once for a rollout, in the dtype of its products, and drop them before its graded
    step: no collective inside a rollout, at the cost of whole weights on every GPU meanwhile."""
    save_async: bool = True
    """Write checkpoints while the next steps run, from copies of all shards in host memory; false: the run
    waits until they are written. A run without torchrun always waits."""
    timeout: Annotated[float, Within(1, 86400)] = 1800.0
    """Seconds after which a collective that some process does not join ends the run. Writing the shards of a
    checkpoint may take longer."""


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
    guidance: Scale = 1.0
    """Classifier-free guidance of the chains, as rollout.guidance."""
    rollout_lora: bool = False
    """PRFL and `prfl sample`: the chains are made with the adapter of rollout.lora, as those that the
    generator will be used with; false: by the generator alone. Rewards and the flow-matching loss are without
    it."""
    seed: Seed = 1234
    one_noise: bool = False
    """Reward training: all held-out samples have the same noise, as in the official script; false: every
    sample has its own."""
    pairs: bool = True
    """With reward.loss bt a validation compares pairs of data.val and data.val_lose; false: the sign of a
    logit with the label of data.val, as with ce and as in the official script."""
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
    guidance: Scale = 1.0
    """Classifier-free guidance, as rollout.guidance."""
    codec: FilePath | None = None
    """Safetensors file of the demo's latent codec; None writes latents only."""
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
        if self.model.boundary is not None:
            r, want = self.rollout, "with model.boundary: of one expert alone"
            check(r.precision == "same", "rollout.precision", r.precision, f"same {want}")
            check(r.cache == 0, "rollout.cache", r.cache, f"0 {want}")
            check(not r.cuda_graph, "rollout.cuda_graph", True, f"false {want}")
            check(r.lora is None, "rollout.lora", r.lora, f"null {want}")
        for section in ("rollout", "chain", "eval", "sample"):
            scale = getattr(self, section).guidance
            ok = not isinstance(scale, tuple) or self.model.boundary is not None
            check(ok, f"{section}.guidance", plain(scale), "a number without model.boundary")
        parts = [self.rollout, self.eval, self.sample]
        parts += [self.chain] if self.chain.unconditional == "gradient" else []
        guided = any(scales(part.guidance) != (1, 1) for part in parts)
        ok = guided or not self.rollout.guidance_at_once
        check(ok, "rollout.guidance_at_once", True, "false where nothing is guided")
        want = f"a multiple of {self.graded} = data.batch_size * train.accumulate * rollout.samples"
        check(self.pool % self.graded == 0, "rollout.pool", self.pool, want)
        alike, accumulate = self.rollout.one_index, self.train.accumulate
        ok, want = alike in (0, "turn") or accumulate % alike == 0, "0, turn or a divisor of train.accumulate"
        check(ok, "rollout.one_index", alike, f"{want} = {accumulate}")
        ok = self.reward.loss == "bt" or not self.data.paired
        check(ok, "data.paired", True, "false unless reward.loss is bt")
        own = self.eval.rollout_lora and self.rollout.lora is None
        check(not own, "eval.rollout_lora", True, "false without rollout.lora")

    @property
    def trained_experts(self) -> tuple[bool, bool] | None:
        """Which of two experts, high-noise first, are trained: those that rollout.sigma_range has noise
        levels of. None without two."""
        (low, high), boundary = self.rollout.sigma_range, self.model.boundary
        return None if boundary is None else (high > boundary, low < boundary)

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


def values_of(
    path: str | Path | None, overrides: Sequence[str] = (), world: int | None = None
) -> tuple[dict[str, dict], official_yaml.Translation | None]:
    """The fields by section that a YAML file, overrides and train.compat set, and the translation of a file
    of HY-Video-PRFL, for `world` processes; None: those that torchrun has started."""
    values, made = {} if path is None else read_yaml(Path(path)), None
    if official_yaml.recognised(values):
        made = official_yaml.settings(values, world)
        values = copy.deepcopy(made.values)
    for item in overrides:
        override(values, item)
        if made is not None:
            made.origin.pop(item.partition("=")[0], None)
    official_yaml.compat(values, made.updates if made else 0)
    return values, made


def read_config(
    path: str | Path | None, overrides: Sequence[str] = (), world: int | None = None
) -> tuple[Config, official_yaml.Translation | None]:
    """load_config's Config, whose paths need not be there, without a word; and what values_of translates."""
    values, made = values_of(path, overrides, world)
    try:
        return from_dict(Config, values, ""), made
    except UserError as error:
        key = made and made.origin.get(str(error).partition(":")[0])
        raise UserError(f"{key}: {error}" if key else str(error)) from None


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    job: official_yaml.Job | None = None,
    world: int | None = None,
) -> Config:
    """Config from a YAML file (None: all defaults) and overrides such as "train.steps=100".

    The file may be one of HY-Video-PRFL; a line on stderr then names the keys that have no meaning here. With
    a job its paths have to be there, and it has to be of that kind. world: processes of the run, to which its
    batches refer; None: those that torchrun has started.
    """
    config, made = read_config(path, overrides, world)
    if made is not None:
        if job is not None:
            official_yaml.check_paths(made, asdict(config), job)
        if os.environ.get("RANK", "0") == "0":
            line = official_yaml.report(made, Path(path), config.train.compat is not None)
            print(f"prfl: {line}", file=sys.stderr)
    return config
