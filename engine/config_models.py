"""The sections of the configuration that say what the models are: model, lora and reward."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from prfl_engine.bounds import (
    Count,
    FilePath,
    Fraction,
    Matches,
    Name,
    Nonnegative,
    NotEmpty,
    Positive,
    Real,
    Section,
    Within,
)
from prfl_engine.errors import check


class Storage(NamedTuple):
    """How the frozen matrices of blocks are stored until a block needs them (engine/memory/frozen.py)."""

    e4m3: bool = False
    host: bool = False

    @property
    def apart(self) -> bool:
        """Whether they are stored otherwise than they are used."""
        return self.e4m3 or self.host


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
    """Folder or file of the generator, in any layout that engine/model/sources.py lists; None: random weights
    of `preset`."""
    preset: Name | None = None
    """Hyper-parameters when `path` is None: t2v-1.3b, t2v-14b, i2v-14b-480p, -720p, t2v-a14b-high, -low,
    i2v-a14b-high, -low, ti2v-5b, tiny-t2v, tiny-i2v, tiny-i2v-a14b, tiny-ti2v, demo."""
    boundary: Annotated[float, Within(0.001, 0.999)] | None = None
    """Noise level at which chains go from the high-noise expert of Wan2.2 A14B to the low-noise one: 0.875 of
    T2V, 0.9 of I2V; both are loaded. null: model.path is one model, of all levels or an expert alone."""
    low: FilePath | None = None
    """Folder or file of the low-noise expert, where model.path is the high-noise one alone; null: model.path
    has both. For model.boundary."""
    idle: Literal["device", "host"] = "device"
    """Where the frozen blocks of the expert that is not asked wait; host: one transfer when a chain goes from
    one to the other (engine/memory/idle.py)."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Trained weights, and those of a frozen reward model's transformer; bfloat16: see optim.rounding."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Linear layers and attention."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Residual stream; the official code keeps it in float32."""
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    """To what samples, noise and the states of a rollout are rounded in training and validation; the official
    code has bfloat16. `prfl sample` and `prfl score` round nothing."""
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
        if self.boundary is None:
            want = "without model.boundary"
            check(self.low is None, "model.low", self.low, f"null {want}")
            check(self.idle == "device", "model.idle", self.idle, f"device {want}")
        check(self.low is None or self.path is not None, "model.low", self.low, "null without model.path")
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
    """Adapter to start from, or to sample with: a folder in PEFT's format, a sharded checkpoint, or a
    safetensors file in one of the formats of engine/model/lora_files.py."""
    base: Literal["same", "e4m3"] = "same"
    """How the frozen matrices of the generator's blocks are stored, in sampling too. e4m3: in one byte a
    value, rounded with a scale for each row; a block computes, forward and backward, with these values in
    model.weights_dtype. same: in model.weights_dtype."""
    base_place: Literal["device", "host"] = "device"
    """Where they are. host: pinned for a GPU, and copied to the device one block ahead, forward and backward;
    the result is the same to the bit."""

    @property
    def storage(self) -> Storage:
        """base and base_place."""
        return Storage(self.base == "e4m3", self.base_place == "host")


@dataclass(frozen=True)
class MoreReward(Section, name="reward.more"):
    """A further reward of PRFL, whose loss is added to that of loss.form."""

    name: Annotated[str, Matches(r"[a-z0-9_]{1,40}", "lower-case letters, digits and _")]
    """Its metrics are called NAME_reward and so on."""
    path: FilePath
    """Folder with the three files of a reward model, which say how it pools."""
    weight: Positive = 0.1
    form: Literal["hinge", "linear", "log"] = "hinge"
    """As loss.form, with these weight and target."""
    target: Real = 2.0


@dataclass(frozen=True)
class RewardConfig(Section, name="reward"):
    """The reward model and how it is trained."""

    path: FilePath | None = None
    """Folder with the three files of a reward model, or a sharded checkpoint of one; None: train-reward makes
    a new one of the generator's first blocks."""
    query_attention: FilePath | None = None
    """File of the pooling, where it is not in `path`."""
    mlp: FilePath | None = None
    """File of the MLP, where it is not in `path`."""
    blocks: Annotated[int, Within(1, 10_000)] = 8
    """How many of the generator's first blocks a new reward model is made of."""
    feature_layer: Count | Annotated[tuple[Count, ...], NotEmpty()] | Literal["auto"] = "auto"
    """The block whose output is pooled, counted from 1, or several, whose pooled vectors are averaged. auto:
    as stored with the reward model of `path`, 8 for an official one, which stores nothing; for a new one its
    last block. A value that differs from the stored one is refused."""
    pool: Literal["query", "mean", "max", "auto"] = "auto"
    """What makes one vector of all tokens: attention of learned queries, their mean, or the largest value of
    every channel (of several layers too). auto: as stored, or query."""
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
    ce_weight: Nonnegative = 0.0
    """With bt, weight of the cross-entropy that is added, of winners as good samples and losers as poor ones.
    Bradley-Terry alone leaves open what all logits have in common: where that is large, the reward, their
    sigmoid, is 1 for all."""
    pairs_at_once: bool = False
    """With bt, winners and losers go through the model as one batch, not as one after the other: weights are
    gathered half as often, and a block holds twice as much on its way."""
    timesteps: tuple[Annotated[float, Within(0, 1000)], ...] = ()
    """Train at these timesteps alone, one optimizer step after another in turn; empty: at a noise level that
    is drawn for every sample from the 1000 of the schedule."""

    more: tuple[MoreReward, ...] = ()
    """PRFL: a list of further rewards, each with name, path, weight, form and target; that of `path` has the
    weight, form and target of the section loss. The score of a validation is their weighted mean."""
    weights: Literal["same", "e4m3"] = "same"
    """PRFL, `prfl sample --best-of` and `prfl score`: how the matrices of the blocks of all reward models are
    stored, as lora.base."""
    place: Literal["device", "host"] = "device"
    """Where they are, as lora.base_place."""
    draws: Annotated[int, Within(1, 1000)] = 1
    """PRFL: noise levels at which every reward scores the result of a graded step; the mean of their losses
    is taken. The first is the level that it has. For the others, evenly spread from there to pure noise, it
    gets more noise, by the same random numbers at all levels and for all rewards."""

    def __post_init__(self):
        super().__post_init__()
        names = [more.name for more in self.more]
        check(len(set(names)) == len(names), "reward.more", names, "a name of its own for each")
        layers = self.feature_layer
        several = isinstance(layers, tuple)
        ok = layers == "auto" or max(layers if several else (layers,)) <= self.blocks
        check(ok, "reward.feature_layer", layers, f"1 to reward.blocks = {self.blocks}")
        rising = not several or all(a < b for a, b in zip(layers, layers[1:], strict=False))
        check(rising, "reward.feature_layer", layers, "each layer after the one before")
        if self.query_attention is not None or self.mlp is not None:
            check(self.path is not None, "reward.path", None, "the folder of the transformer of reward.mlp")
        ok = self.loss == "bt" or self.ce_weight == 0
        check(ok, "reward.ce_weight", self.ce_weight, "0 unless reward.loss is bt")
        ok = self.loss == "bt" or not self.pairs_at_once
        check(ok, "reward.pairs_at_once", True, "false unless reward.loss is bt")
        if self.pool in ("mean", "max"):
            check(self.dropout == 0, "reward.dropout", self.dropout, f"0 with reward.pool {self.pool}")
            path = self.query_attention
            check(path is None, "reward.query_attention", path, f"null with reward.pool {self.pool}")
            for name, usual in (("num_queries", 1), ("num_heads", "auto"), ("return_type", "auto")):
                value = getattr(self, name)
                check(value == usual, f"reward.{name}", value, f"{usual} with reward.pool {self.pool}")

    def check_one(self, why: str) -> None:
        """UserError for more than one reward or draw, which `why` rules out."""
        names = [more.name for more in self.more]
        check(not names, "reward.more", names, f"none {why}")
        check(self.draws == 1, "reward.draws", self.draws, f"1 {why}")

    @property
    def storage(self) -> Storage:
        """weights and place."""
        return Storage(self.weights == "e4m3", self.place == "host")

    @property
    def further(self) -> list[tuple[str, "RewardConfig"]]:
        """(name, section of its own) of every further reward: stored and placed as all are."""
        made = dict(weights=self.weights, place=self.place)
        return [(more.name, RewardConfig(path=more.path, **made)) for more in self.more]

    @property
    def heads(self) -> dict[str, str | None]:
        """query_attention and mlp as load_reward takes them."""
        return {"query_attention": self.query_attention, "mlp": self.mlp}

    @property
    def pooling(self) -> dict[str, int | bool | str | tuple[int, ...]]:
        """num_heads, add_query, feature_layer and pool as functions of checkpoint.py take them, without those
        that are auto."""
        named = {"num_heads": self.num_heads, "feature_layer": self.feature_layer, "pool": self.pool}
        found = {name: value for name, value in named.items() if value != "auto"}
        return found if self.return_type == "auto" else found | {"add_query": self.return_type == "query"}
