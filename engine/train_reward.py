"""Training and evaluating the latent reward model on noisy latents."""

from pathlib import Path

import torch

from prfl_engine import flow
from prfl_engine.checkpoint import load_reward, load_transformer, new_reward, save_reward
from prfl_engine.config import Config
from prfl_engine.data import Reader, Stream, fixed_batches, noise_like, read_lists, seeded
from prfl_engine.errors import UserError
from prfl_engine.loop import DTYPES, fit, pick_device, set_up
from prfl_engine.metrics import progress
from prfl_engine.objectives import bradley_terry, cross_entropy, noisy_reward
from prfl_engine.resume import prepare_out
from prfl_engine.reward import RewardModel


def make_reward(
    config: Config, source: str | Path | None, device: torch.device, dtype: torch.dtype | None = None
) -> RewardModel:
    """The reward model of the folder `source`, or a new one on the first blocks of model.path.

    The weights of its transformer are in dtype, None: model.weights_dtype; those of the head in float32.
    """
    r, m = config.reward, config.model
    dtype = dtype or DTYPES[m.weights_dtype]
    shared = dict(num_heads=r.num_heads, dropout=r.dropout, add_query=r.return_type == "query",
                  feature_layer=r.feature_layer)  # fmt: skip
    if source is not None:
        model = load_reward(source, dtype=dtype, device=device, **shared)
    else:
        if m.path is None:
            raise UserError("model.path: got null, want the generator that the reward starts from")
        trunk = load_transformer(m.path, dtype, device, trunk=True, blocks=r.blocks)
        torch.manual_seed(config.train.seed)
        with torch.device(device):
            model = new_reward(trunk, r.blocks, r.num_queries, **shared)
    if m.budget is not None:
        raise UserError(f"model.recompute: got {m.recompute!r} for a reward model, want a mode or names")
    set_up(model.transformer, m)
    return model


def train_reward(config: Config) -> None:
    """Train the reward model as the configuration says; results go to config.train.out."""
    c, device = config, pick_device(config)
    if c.data.text_dropout > 0 and c.data.null_text is None:
        raise UserError("data.null_text: got null, want the null prompt's .npy (text_dropout > 0)")
    pairs = c.reward.loss == "bt"
    win = read_lists(c.data.train, "data.train")
    lose = read_lists(c.data.lose, "data.lose") if pairs else None
    held_out = read_lists(c.data.val, "data.val") if c.eval.every else []
    sigmas = flow.train_sigmas(c.rollout.shift)
    begin = prepare_out(c, {"data.train": win} | ({"data.lose": lose} if pairs else {}))
    resume = begin.checkpoint
    model = make_reward(c, resume or c.reward.path, device)
    reader = Reader(
        model.transformer.config, c.data.label, c.data.null_text, c.data.text_dropout
    )
    stream = Stream(reader, win, c.data.batch_size, c.train.seed, lose)

    def losses(item, key: int):
        batch = item[0] if pairs else item
        rng = seeded(c.train.seed, 2, key)
        sigma = sigmas[torch.from_numpy(rng.integers(flow.TRAIN_STEPS, size=len(batch.latent)))]
        sigma = sigma.to(device, non_blocking=True)
        noise = noise_like(batch.latent, c.train.seed, 3, key)
        logit = noisy_reward(model, batch, noise, sigma)
        if pairs:  # winner and loser share noise and noise level
            logit_lose = noisy_reward(model, item[1], noise, sigma)
            loss, right = bradley_terry(logit, logit_lose).mean(), logit > logit_lose
        else:
            loss = cross_entropy(logit, batch.label).mean()
            right = (logit > 0) == (batch.label > 0.5)
        yield loss, {"loss": loss, "accuracy": right.float().mean()}

    def validate(step: int) -> dict[str, float]:
        accuracy = evaluate_reward(c, model, held_out)
        mean = sum(accuracy.values()) / len(accuracy)
        return {f"accuracy_t{t:g}": a for t, a in accuracy.items()} | {"score": mean}

    heads = torch.nn.ModuleList([model.pool, model.mlp])
    model.train()
    fit(
        c, begin, model, [(model.transformer, c.optim.lr), (heads, c.optim.lr_head)], stream,
        losses, validate if c.eval.every else None,
        save=lambda folder, step: save_reward(model, folder, step),
        load=lambda folder: dict(make_reward(c, folder, device, torch.float32).named_parameters()),
    )  # fmt: skip


@torch.no_grad()
def evaluate_reward(
    config: Config, model: RewardModel, paths: list[Path], show: bool = False
) -> dict[float, float]:
    """Accuracy of sign(logit) against the label on held-out latents, at each of eval.timesteps.

    The noise of a sample is fixed by eval.seed and the same at every timestep.
    """
    e, device = config.eval, next(model.parameters()).device
    reader = Reader(model.transformer.config, config.data.label)
    right = {t: [] for t in e.timesteps}
    batches = fixed_batches(reader, paths, e.batch_size, device)
    if show:
        batches = progress(batches, "evaluating", -(-len(paths) // e.batch_size))
    for i, batch in enumerate(batches):
        noise = noise_like(batch.latent, e.seed, i)
        for t, found in right.items():
            sigma = torch.full((len(noise),), t / flow.TRAIN_STEPS, device=device)
            logit = noisy_reward(model, batch, noise, sigma)
            found.append((logit > 0) == (batch.label > 0.5))
    return {t: torch.cat(found).float().mean().item() for t, found in right.items()}


def eval_reward(config: Config) -> dict[float, float]:
    """Accuracies of the reward model of reward.path on data.val."""
    if config.reward.path is None:
        raise UserError("reward.path: got null, want the folder of a reward model")
    paths = read_lists(config.data.val, "data.val")
    model = make_reward(config, config.reward.path, pick_device(config)).freeze()
    return evaluate_reward(config, model, paths, show=True)
