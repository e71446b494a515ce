"""PRFL training: flow matching beside the reward of a graded denoising step."""

from pathlib import Path

import torch
from torch import Tensor

from prfl_engine import chain, flow, lora
from prfl_engine.checkpoint import load_reward, load_transformer, save_transformer
from prfl_engine.config import Config
from prfl_engine.data import Reader, Stream, fixed_batches, noise_like, read_lists, seeded
from prfl_engine.dit import PRESETS, WanTransformer
from prfl_engine.errors import UserError, check
from prfl_engine.fit_memory import fit_memory
from prfl_engine.loop import DTYPES, fit, pick_device, prepare_out, set_up
from prfl_engine.objectives import (
    Batch,
    bind,
    graded_rewards,
    index_range,
    noisy_reward,
    reward_loss,
    sft_loss,
    stratified_indices,
)
from prfl_engine.reward import RewardModel
from prfl_engine.rollout import DriftMeter, make_rollout
from prfl_engine.sample import write_samples


def make_policy(config: Config, resume: Path | None, device: torch.device) -> WanTransformer:
    """The generator, weights in model.weights_dtype: from `resume`, from model.path, or random.

    With LoRA the checkpoint `resume` holds the adapter, which goes onto the generator of the other two.
    """
    m = config.model
    check(
        config.lora.rank > 0 or config.lora.path is None, "lora.path", config.lora.path,
        "null with lora.rank 0, which trains the weights (prfl merge-lora adds an adapter to them)",
    )  # fmt: skip
    source = Path(m.path) if m.path else None
    if resume is not None and not config.lora.rank:
        source = resume
    if source is not None:
        policy = load_transformer(source, DTYPES[m.weights_dtype], device)
    else:
        if m.preset not in PRESETS:
            raise UserError(
                f"model.preset: got {m.preset!r}, want {', '.join(PRESETS)}, or set model.path"
            )
        with torch.device(device):
            policy = WanTransformer(PRESETS[m.preset])
        policy.init_weights(torch.Generator(device).manual_seed(config.train.seed))
        policy.to(DTYPES[m.weights_dtype])
    if config.lora.rank:
        lora.attach(policy, config.lora, config.train.seed)
        if (adapter := resume or config.lora.path) is not None:
            lora.load(policy, adapter)
    return set_up(policy, m)


def make_frozen_reward(config: Config, policy: WanTransformer, device: torch.device) -> RewardModel:
    """The reward model of reward.path, frozen, computing in the precision of the policy."""
    r, m = config.reward, config.model
    if r.path is None:
        raise UserError("reward.path: got null, want the folder of a reward model (loss.weight > 0)")
    reward = load_reward(
        r.path,
        num_heads=r.num_heads,
        add_query=r.return_type == "query",
        feature_layer=r.feature_layer,
        dtype=DTYPES[m.weights_dtype],
        device=device,
    )
    ours, theirs = policy.config, reward.transformer.config
    for name in ("model_type", "in_dim", "text_dim", "text_len"):
        got, want = getattr(theirs, name), getattr(ours, name)
        if got != want:
            raise UserError(f"reward.path: {name} is {got!r}, want the generator's {want!r}")
    set_up(reward.transformer, m)
    return reward.freeze()


def check_one_backward(config: Config) -> None:
    """UserError where an optimizer step of PRFL has more than one backward: not with optim.in_backward."""
    c, want = config, "with optim.in_backward: one backward in an optimizer step"
    both = c.loss.weight > 0 and c.loss.sft_weight > 0
    check(not both or c.loss.alternate, "loss.alternate", c.loss.alternate, f"true or one loss alone {want}")
    if c.loss.weight > 0:
        check(c.rollout.samples == 1, "rollout.samples", c.rollout.samples, f"1 {want}")
        check(c.chain.window == 1, "chain.window", c.chain.window, f"1 {want}")


def train(config: Config) -> None:
    """Run PRFL as the configuration says; results go to config.train.out."""
    device, c = pick_device(config), config
    use_reward, use_sft = c.loss.weight > 0, c.loss.sft_weight > 0
    if c.data.text_dropout > 0 and c.data.null_text is None:
        raise UserError("data.null_text: got null, want the null prompt's .npy (text_dropout > 0)")
    if c.optim.in_backward:
        check_one_backward(c)
    schedule = flow.make_schedule(c.rollout.solver, c.rollout.steps, c.rollout.shift)
    sigmas = flow.train_sigmas(c.rollout.shift)
    first, last = index_range(c.rollout)
    paths = read_lists(c.data.train, "data.train")
    held_out = read_lists(c.data.val, "data.val") if c.eval.every else []
    resume = prepare_out(c)
    policy = make_policy(c, resume, device)
    reward = make_frozen_reward(c, policy, device) if use_reward or c.reward.path else None
    reader = Reader(
        policy.config,
        null_text=c.data.null_text,
        text_dropout=c.data.text_dropout,
        long_caption=c.data.long_caption,
    )
    stream = Stream(reader, paths, c.data.batch_size, c.train.seed)
    if c.model.budget is not None:
        shapes = ([reader.shape(p)[1:] for p in of] for of in (paths, held_out))
        print(fit_memory(c, policy, reward, *shapes), flush=True)
    rollout = make_rollout(policy, c.rollout, schedule, device) if use_reward else None
    meter = None
    if rollout is not None and rollout.approximate:
        sample = Batch(*(None if a is None else a[:1] for a in stream[0]))
        meter = DriftMeter(rollout, sample, last, c.train.seed, c.train.save_every)

    def losses(batch: Batch, key: int):
        n = len(batch.latent)
        rng = seeded(c.train.seed, 2, key)
        picks = torch.from_numpy(rng.integers(flow.TRAIN_STEPS, size=n))
        indices = stratified_indices(first, last, torch.from_numpy(rng.random((c.rollout.samples, n))))
        turn = key // c.train.accumulate % 2 if c.loss.alternate else None  # even steps: flow matching
        if use_sft and turn != 1:
            noise = noise_like(batch.latent, c.train.seed, 3, key)
            sigma = sigmas[picks].to(device, non_blocking=True)
            loss = sft_loss(policy, batch, noise, sigma).mean()
            yield c.loss.sft_weight * loss, {"sft_loss": loss.detach()}
        if use_reward and turn != 0:
            noise = noise_like(batch.latent, c.train.seed, 4, key)
            share, extra = 1 / c.rollout.samples, {}
            if meter is not None:
                meter.begin(key // c.train.accumulate)
                extra = meter.values()
            given = policy, reward, schedule, batch, noise, indices, c.chain
            for logit in graded_rewards(*given, rollout and rollout.stretches):
                loss = share * reward_loss(logit, c.loss).mean()
                reward_now = share * torch.sigmoid(logit.detach()).mean()
                yield loss, {"reward_loss": loss.detach(), "reward": reward_now} | extra
                extra = {}  # once for every micro-batch
                del logit, loss  # their graph holds the state before a window and its gradient

    def validate(step: int) -> dict[str, float]:
        return evaluate_policy(c, policy, reward, schedule, held_out, step)

    def save(folder: Path, step: int) -> None:
        (lora.save if c.lora.rank else save_transformer)(policy, folder)

    def load(folder: Path) -> dict[str, Tensor]:
        if c.lora.rank:
            return lora.named(lora.read(folder)[0])
        return dict(load_transformer(folder, torch.float32, device).named_parameters())

    fit(
        c, resume, policy, [(policy, c.optim.lr)], stream, losses,
        validate if c.eval.every else None, save, load,
    )  # fmt: skip


@torch.no_grad()
def evaluate_policy(
    config: Config,
    policy: WanTransformer,
    reward: RewardModel | None,
    schedule: flow.Schedule,
    paths: list[Path],
    step: int,
) -> dict[str, float]:
    """Rewards of samples at held-out prompts and the flow-matching loss on held-out latents.

    Noise is fixed by eval.seed. A sample is noised to every one of eval.timesteps and scored there;
    "score" is the mean reward over all of them, or minus the flow-matching loss without a reward.
    """
    e, device = config.eval, next(policy.parameters()).device
    paths = [paths[i % len(paths)] for i in range(e.samples)]
    sft, rewards, kept = [], {t: [] for t in e.timesteps}, []
    for i, batch in enumerate(fixed_batches(Reader(policy.config), paths, e.batch_size, device)):
        n = len(batch.latent)
        noise = noise_like(batch.latent, e.seed, 0, i)
        level = (torch.arange(n, device=device) + 0.5) / n
        sft.append(sft_loss(policy, batch, noise, flow.shift_sigma(level, config.rollout.shift)))
        noise = noise_like(batch.latent, e.seed, 1, i)
        latent = chain.sample(bind(policy, batch), schedule, noise)
        kept.extend(latent[: max(0, e.videos - len(kept))].cpu())
        if reward is None:
            continue
        sampled, noise = batch._replace(latent=latent), noise_like(batch.latent, e.seed, 2, i)
        for t, found in rewards.items():
            sigma = torch.full((n,), t / flow.TRAIN_STEPS, device=device)
            found.append(torch.sigmoid(noisy_reward(reward, sampled, noise, sigma)))
    if kept:
        write_samples(Path(config.train.out) / "samples" / f"step-{step}", kept, config.sample)
    values = {"sft_loss": torch.cat(sft).mean().item()}
    if reward is None:
        return values | {"score": -values["sft_loss"]}
    by_t = {f"reward_t{t:g}": torch.cat(found).mean().item() for t, found in rewards.items()}
    return values | by_t | {"score": sum(by_t.values()) / len(by_t)}
