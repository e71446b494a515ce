"""The settings of the paper's code, as far as this engine has them, to plan beside a configuration's own."""

from collections.abc import Sequence

from prfl_engine.config import read_config
from prfl_engine.planner.command import Options, predict, subject_of
from prfl_engine.planner.report import Prediction

SEQUENCE = 4  # ranks of a sample
SETTINGS = (
    "model.recompute=full", "model.host=null", "model.costs=null", "model.weights_dtype=float32",
    "model.compute_dtype=bfloat16", "model.residual_dtype=float32", "model.chunk=null", "model.keep=all",
    "model.idle=device", "lora.rank=0", "lora.base=same", "lora.base_place=device", "optim.name=adamw",
    "optim.rounding=master", "optim.grad_dtype=weights", "optim.offload=none", "optim.in_backward=false",
    "train.ema=0", "parallel.replicate=1", "parallel.resident=false", "reward.weights=same",
    "reward.place=device", "reward.draws=1", "reward.more=[]",
)  # fmt: skip
PRFL = (
    "rollout.mode=fresh", "rollout.pool=null", "rollout.pool_place=device", "rollout.stride=1",
    "rollout.samples=1", "rollout.one_index=turn", "rollout.precision=same", "rollout.cache=0",
    "rollout.cuda_graph=false", "rollout.seeds=1", "rollout.seeds_step=null",
    "rollout.seeds_keep=steepest", "rollout.lora=null", "eval.rollout_lora=false", "rollout.guidance=1",
    "rollout.guidance_at_once=false", "chain.guidance=1", "chain.unconditional=detached", "chain.window=1",
    "chain.detach_input=false", "loss.alternate=false", "loss.sft_every=1", "loss.anchor=0",
    "loss.anchor_every=0", "loss.anchor_place=device", "train.stop_anchor=null",
)  # fmt: skip
WORDS = (
    "the paper's settings: float32 weights and reward model, all of a block recomputed, float32 residual"
    " stream, fresh rollouts with one graded step, and {ranks}; by this engine's operations"
)


def settings(path: str, overrides: Sequence[str], options: Options) -> tuple[str, ...]:
    """The overrides that make these settings of the configuration in a file, on as many GPUs."""
    count = options.gpus or 1
    config, _ = read_config(path, overrides, count)
    heads = subject_of(config, path, 1, options).setup.config.num_heads
    cut = SEQUENCE if count % SEQUENCE == heads % SEQUENCE == 0 else 1
    groups = count // cut
    accumulate = -(-config.train.accumulate // groups) * groups
    own = SETTINGS if options.train_reward else SETTINGS + PRFL
    return (*overrides, *own, f"parallel.sequence={cut}", f"train.accumulate={accumulate}")


def official(path: str, overrides: Sequence[str], options: Options) -> Prediction:
    """The prediction under these settings."""
    return predict(path, settings(path, overrides, options), options)


def words(p: Prediction) -> str:
    """What the settings are, in words."""
    n = p.shards.sequence
    return WORDS.format(ranks=f"{n} GPUs a sample" if n > 1 else "one GPU a sample")
