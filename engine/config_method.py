"""The sections of the configuration that say what is optimized: rollout, chain and loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from prfl_engine.bounds import Count, FilePath, Natural, Nonnegative, Positive, Real, Section, Within
from prfl_engine.errors import check

Level = Annotated[float, Within(0, 1)]
Scale = Real | tuple[Real, Real]


def scales(scale: Scale) -> tuple[float, float]:
    """The scales of guidance above the boundary of two experts, and below."""
    return scale if isinstance(scale, tuple) else (scale, scale)


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
    sigmas: tuple[Annotated[float, Within(0.001, 1)], ...] = ()
    """Noise levels of the steps, falling, in place of those of `shift`: as many as `steps`, such as the few
    of a distilled generator; the last step ends at 0. Of unipc the first is below 1."""
    shift: Positive = 5.0
    """Shift of the flow schedule, for rollouts, flow matching and reward training alike."""
    sigma_range: tuple[Level, Level] = (0.0, 1.0)
    """Noise levels [low, high) that are trained at, in flow matching, reward training and graded steps alike;
    1 is in [low, 1]. One model alone, such as an expert of Wan2.2 A14B, is used nowhere else: its chains end
    below low, in validation too, where they are scored as they are instead of at eval.timesteps
    (docs/wan22.md)."""
    start: Literal["noise", "data"] = "noise"
    """Where chains begin: data: at the first step of sigma_range, from latents of the data with noise."""
    range: Literal["all", "early", "middle", "late"] | tuple[int, int] = "all"
    """Where the graded step is drawn: all of 0..steps-2 that are in sigma_range, a third of these, or [first,
    last], which are."""
    samples: Annotated[int, Within(1, 10_000)] = 1
    """Graded steps of one rollout, drawn one from each of as many equal parts of `range`; the mean of
    their losses is taken. 1 is the paper's algorithm. Of chains that persist: so many graded steps for
    every sample of a micro-batch, each of another chain."""
    seeds: Annotated[int, Within(1, 1000)] = 1
    """Noises of every sample. More than 1: each is rolled out to `seeds_step` and scored there by the reward
    models, and chains go on from the best alone (docs/training.md says what bias that makes)."""
    seeds_step: Count | None = None
    """Steps of a chain after which its seed is scored, at most as many as come before the last step that may
    be graded; null: a quarter of the chain's."""
    seeds_keep: Literal["steepest", "highest", "lowest", "median", "both"] = "steepest"
    """Which seed goes on: the one at whose reward the reward loss has the largest slope; that with the
    highest, the lowest or the median reward; both: the highest and the lowest, graded in turn, each at a half
    of `samples`."""
    one_index: Natural | Literal["turn"] = 0
    """So many neighbouring micro-batches, of all processes together, have the same graded steps, and those of
    an optimizer step are spread evenly. turn: as many as there are groups of processes, so that none waits
    for a longer rollout, as in the official code; with train.accumulate a step has one. 0: every sample has
    its own, but the second of two in a micro-batch mirrors the first, so that all micro-batches have the same
    work."""
    whole_timesteps: bool = False
    """Flow matching and reward training give the model the timestep without its fraction, as rollouts always
    do and as the official code does; false: 1000 times the noise level."""
    guidance: Scale = 1.0
    """Classifier-free guidance of the steps without gradient, against data.negative_text; 1: none, as in the
    paper. [high, low]: of the two experts of Wan2.2 A14B. Twice the forwards."""
    guidance_at_once: bool = False
    """The two forwards of a guided step, in validation too, as one batch of twice the size. A graded step
    needs them apart, unless chain.unconditional is gradient."""
    lora: FilePath | None = None
    """Adapter of fresh rollouts alone, such as one that is distilled to the few steps of `sigmas`: a folder
    or file as lora.path takes it. Graded steps, rewards and flow matching are without it, and no checkpoint
    holds it. A trained adapter is on in addition to it."""
    precision: Literal["same", "fp8"] = "same"
    """fp8: linear layers and self-attention of the steps without gradient in e4m3; heads of 64 or 128."""
    cache: Nonnegative = 0.0
    """Steps without gradient reuse what the blocks added before, while the accumulated relative change of
    their modulated input stays below this (TeaCache); 0 computes every step. With 40 steps 0.05 skipped
    0.4 of the demo's, 0.1 0.6 of them."""
    probe_every: Count = 50
    """Optimizer steps between measurements of how far a rollout in fp8, cached or with an adapter of its own
    ends from a plain one, and a chain that persists from a rollout by the present weights."""
    max_drift: Positive = 0.05
    """Relative distance of the latents above which rollouts are plain until a measurement is below it, and
    the oldest chains that persist are rolled out again. On the demo fp8 has 0.025, and the last step of 40 by
    itself moves a latent by 0.09."""
    cuda_graph: bool = False
    """Replay the blocks of steps without gradient as a CUDA graph: worth it where launches cost more than
    the work (few tokens); its working memory stays reserved."""

    def __post_init__(self):
        super().__post_init__()
        if self.sigmas:
            falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
            check(falling, "rollout.sigmas", list(self.sigmas), "each below the one before")
            n = len(self.sigmas)
            check(self.steps == n, "rollout.steps", self.steps, f"{n}, the length of rollout.sigmas")
            ok = self.solver != "unipc" or self.sigmas[0] < 1
            check(ok, "rollout.sigmas", list(self.sigmas), "levels below 1 with rollout.solver unipc")
        low, high = self.sigma_range
        check(low < high, "rollout.sigma_range", list(self.sigma_range), "[low, high] with low < high")
        if self.start == "data":
            check(high < 1, "rollout.start", "data", "noise where rollout.sigma_range ends at 1")
        if not isinstance(self.range, str):
            first, last = self.range
            check(
                0 <= first <= last <= self.steps - 2, "rollout.range", list(self.range),
                f"[first, last] within 0..{self.steps - 2}",
            )  # fmt: skip
        if self.seeds == 1:
            want = "with rollout.seeds 1"
            check(self.seeds_step is None, "rollout.seeds_step", self.seeds_step, f"null {want}")
            check(self.seeds_keep == "steepest", "rollout.seeds_keep", self.seeds_keep, f"steepest {want}")
        else:
            want = "1 with rollout.mode persistent, whose chains outlive what they were chosen for"
            check(self.mode == "fresh", "rollout.seeds", self.seeds, want)
            even = self.seeds_keep != "both" or self.samples % 2 == 0
            check(even, "rollout.samples", self.samples, "an even number with rollout.seeds_keep both")
        if self.mode == "fresh":
            want = "with rollout.mode fresh"
            check(self.pool is None, "rollout.pool", self.pool, f"null {want}")
            check(self.pool_place == "device", "rollout.pool_place", self.pool_place, f"device {want}")
            check(self.stride == 1, "rollout.stride", self.stride, f"1 {want}")
        else:
            want = "null with rollout.mode persistent, whose steps are graded steps"
            check(self.lora is None, "rollout.lora", self.lora, want)
            check(not self.one_index, "rollout.one_index", self.one_index, "0 with rollout.mode persistent")


@dataclass(frozen=True)
class ChainConfig(Section, name="chain"):
    """Denoising steps with gradient."""

    window: Count | Literal["all"] = 1
    """Denoising steps with gradient before the reward, the graded one included; all: from the noise on."""
    detach_input: bool = False
    """Give the model a detached input at every graded step, so that the gradient goes from step to step
    through the sampler alone (DRTune)."""
    guidance: Scale = 1.0
    """Classifier-free guidance of the steps with gradient, as rollout.guidance. Where the two differ, graded
    steps start from latents of other chains than their own."""
    unconditional: Literal["detached", "gradient"] = "detached"
    """The half of a guided step with gradient that has data.negative_text. detached: a constant, for one
    forward more; gradient: gets its gradient, too, for the time and the activations of two."""

    def __post_init__(self):
        super().__post_init__()
        guided = scales(self.guidance) != (1, 1)
        ok = guided or self.unconditional == "detached"
        check(ok, "chain.unconditional", self.unconditional, "detached with chain.guidance 1")


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
    both losses of every micro-batch."""
    anchor: Nonnegative = 0.0
    """Weight of the squared distance of velocities to those of the frozen start, its mean over elements as in
    flow matching: a leash on graded steps and on samples of flow matching, for a forward more of each. The
    start is the generator of model.path: with LoRA the trained model without its updates, which takes no
    memory; otherwise a frozen copy."""
    anchor_every: Natural = 0
    """Optimizer steps between measurements of that distance, without gradient, where `anchor` is 0; 0: it is
    not measured."""
    anchor_place: Literal["device", "host"] = "device"
    """Where the blocks of a frozen copy are; host: pinned for a GPU, all of them on the device during a
    forward of it alone."""
    split: bool = False
    """Two updates in an optimizer step, as in the official script: by all gradients up to the flow-matching
    gradient of the last micro-batch, then by the reward gradient of that micro-batch alone, whose rollout is
    by the updated weights."""

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
        free = not self.anchor or not self.anchor_every
        want = "0 with loss.anchor, which measures in every step"
        check(free, "loss.anchor_every", self.anchor_every, want)
        want = "device without loss.anchor and loss.anchor_every"
        check(self.anchored or self.anchor_place == "device", "loss.anchor_place", self.anchor_place, want)
        if self.split:
            both = self.weight > 0 and self.sft_weight > 0
            check(both, "loss.split", True, "false, or positive loss.weight and loss.sft_weight")
            check(not self.alternate, "loss.alternate", True, "false with loss.split")
            check(self.sft_every == 1, "loss.sft_every", self.sft_every, "1 with loss.split")

    @property
    def anchored(self) -> bool:
        """Whether distances to the frozen start are computed."""
        return self.anchor > 0 or self.anchor_every > 0

    def start_there(self, rank: int) -> bool:
        """Whether the frozen start is on the device, with adapters of this rank or without (0): a validation
        measures the distance to it then, which takes no weights."""
        return rank > 0 or (self.anchored and self.anchor_place == "device")
