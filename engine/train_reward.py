"""Training and evaluating the latent reward model on noisy latents."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.build import make_reward, pick_device
from prfl_engine.checkpoint_shards import INDEX
from prfl_engine.checks import check_stored
from prfl_engine.config import Config
from prfl_engine.data import Kept, Reader, read_lists
from prfl_engine.errors import UserError
from prfl_engine.loop import fit
from prfl_engine.memory.policy import of_config
from prfl_engine.memory.recompute import run_under
from prfl_engine.metrics import decimal, note, progress
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.model import flops, lora
from prfl_engine.model.checkpoint import (
    load_heads,
    read_heads,
    save_reward,
)
from prfl_engine.model.lora_files import write_peft
from prfl_engine.model.reward import RewardModel
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import bradley_terry, cross_entropy, noisy_reward, train_levels
from prfl_engine.parallel import World, check_config, started
from prfl_engine.phases import count, mark
from prfl_engine.resume import prepare_out
from prfl_engine.seeds import Purpose, integers, noise_like
from prfl_engine.validation import HeldOut, check_labels, partners, read_labels, told_right

ADAPTER = "adapter"  # folder of the adapter in a checkpoint of training with LoRA


def add_updates(model: RewardModel, config: Config, resume: Path | None) -> None:
    """LoRA on the transformer of a reward model, which starts from the checkpoint `resume` if given; pooling
    and MLP are trained as a whole. What a sharded checkpoint holds is loaded later, into the shards."""
    if resume is not None and (resume / INDEX).is_file():
        resume = None
    lora.start(model.transformer, config.lora, config.train.seed, resume and resume / ADAPTER)
    if resume is not None:
        load_heads(model, resume)


def save_adapted(
    model: RewardModel, folder: Path, step: int, values: dict[str, Tensor] | None = None
) -> None:
    """Write a reward model with LoRA: the adapter, to go on from, and the three official files with the
    updates in the weights, in float32, which every reader of a reward model takes. values as save_reward
    takes them."""
    inner = {k.removeprefix("transformer."): v for k, v in (values or {}).items()}
    lora.write(model.transformer, folder / ADAPTER, inner, write_peft)
    with lora.merged(model.transformer, inner):
        save_reward(model, folder, step, values)


def read_adapted(folder: Path) -> dict[str, Tensor]:
    """What `save_adapted` has written of the trained parameters, by their names in the model."""
    updates = lora.named(lora.read(folder / ADAPTER)[0])
    heads = {f"{part}.{k}": a for part, state in read_heads(folder).items() for k, a in state.items()}
    return {f"transformer.{k}": a for k, a in updates.items()} | heads


def train_reward(config: Config) -> None:
    """Train the reward model as the configuration says; results go to config.train.out. Under torchrun on all
    processes."""
    device = pick_device(config)
    with started(config, device) as world:
        check_config(config, world)
        _train_reward(config, device, world)


def _train_reward(config: Config, device: torch.device, world: World) -> None:
    c = config
    c.reward.check_one("in reward training")
    check_stored(c, "in reward training")
    lora.check_path(c.lora)
    adapted = c.lora.rank > 0
    text_dropout, pairs, dtype = c.data.dropout(0.0), c.reward.loss == "bt", flow.latent_dtype(c)
    levels = train_levels(c.rollout, dtype)
    fixed = [levels.at(t, "reward.timesteps") for t in c.reward.timesteps]
    for t in c.eval.timesteps if c.eval.every else ():
        levels.at(t, "eval.timesteps")
    win = read_lists(c.data.train, "data.train")
    lose = read_lists(c.data.lose, "data.lose") if pairs else None
    held_out = read_lists(c.data.val, "data.val") if c.eval.every else []
    val_pairs = pairs and c.eval.pairs
    val_lose = read_lists(c.data.val_lose, "data.val_lose") if val_pairs and c.eval.every else None
    if not pairs:
        check_labels(win, c.data.label, "data.train")
    if c.eval.every and not val_pairs:
        check_labels(held_out, c.data.label, "data.val")
    begin = prepare_out(c, {"data.train": win} | ({"data.lose": lose} if pairs else {}))
    resume = begin.checkpoint
    world.check_checkpoint(resume)
    whole = resume if world.mesh is None and not adapted else None
    world.stop_if_asked()

    def attached(part: torch.nn.Module) -> None:
        if adapted and isinstance(part, WanTransformer):
            lora.start(part, c.lora, c.train.seed, None)
        world.shard(part)

    model = make_reward(c, whole or c.reward.path, device, shard=world.shard and attached)
    if adapted:
        add_updates(model, c, resume)
    world.stop_if_asked()
    given = {"dtype": dtype, "first_frame": c.data.first_frame}
    given["kept"] = Kept(1e9 * c.data.keep_gb)
    reader = Reader(model.transformer.config, c.data.label, c.data.null_text, text_dropout, **given)
    if val_lose is not None:
        val_lose = partners(reader, held_out, val_lose, "data.val_lose")
    broken = {"skip": c.data.skip_broken, "paired": c.data.paired, "agree": world.union}
    broken["at_once"] = at_once = c.reward.pairs_at_once
    with world.agreed():
        batches = MicroBatches(reader, win, c.data.batch_size, c.train.seed, lose, **broken)

    run_blocks = run_under(of_config(c.model))

    def backpropagate(item, key: int, share: float):
        mark("reward")
        sides = [item] if isinstance(item, Batch) else item
        for side in sides:
            count("reward", side.latent)
        first = sides[0]
        latent = first.latent.chunk(2)[0] if at_once else first.latent
        at, n = (c.train.seed, key * c.data.batch_size), len(latent)
        sigma = levels.sigmas[integers(len(levels.sigmas), Purpose.REWARD_LEVEL, *at, n)]
        t = levels.timestep(sigma)
        if fixed:
            turn = key // c.train.accumulate % len(fixed)
            sigma, t = torch.full((n,), fixed[turn]), torch.full((n,), float(c.reward.timesteps[turn]))
        sigma, t = sigma.to(device, non_blocking=True), t.to(device, non_blocking=True)
        noise = flow.rounded(noise_like(latent, Purpose.REWARD_NOISE, *at), dtype)
        if at_once:
            noise, sigma, t = (torch.cat([a, a]) for a in (noise, sigma, t))
        logits = [noisy_reward(model, side, noise, sigma, run_blocks, t) for side in sides]
        if pairs:  # winner and loser share noise and noise level
            logit, logit_lose = logits[0].chunk(2) if at_once else logits
            loss = bradley_terry(logit, logit_lose, c.reward.ce_weight).mean()
            right = told_right(logit - logit_lose)
        else:
            (logit,) = logits
            loss = cross_entropy(logit, first.label).mean()
            right = (logit > 0) == (first.label > 0.5)
        world.add_up_copies(model, c.optim.clip_each or world.last(key, c.train.accumulate))
        (share * loss).backward()
        yield {"loss": loss.detach(), "accuracy": right.float().mean()}

    def validate(step: int) -> dict[str, float]:
        found = evaluate_reward(c, model, held_out, val_lose, world=world)
        values = {f"{name}_t{decimal(t)}": v for t, held in found.items() for name, v in held.items()}
        return values | {"score": score(c, found)}

    def save(folder: Path, step: int, values: dict[str, Tensor] | None = None) -> None:
        (save_adapted if adapted else save_reward)(model, folder, step, values)

    def load(folder: Path) -> dict[str, Tensor]:
        if adapted:
            return read_adapted(folder)
        return dict(make_reward(c, folder, device, torch.float32).named_parameters())

    scored = model.transformer.config, model.feature_layer
    costs = partial(flops.costs, scored[0], reward=scored, reward_trained=not adapted)
    model = world.place(model.train())
    heads = torch.nn.ModuleList([model.pool, model.mlp])
    fit(
        c, begin, model, [(model.transformer, c.optim.lr), (heads, c.optim.lr_head)], batches,
        backpropagate, validate if c.eval.every else None,
        save, load, costs, world=world,
    )  # fmt: skip


@torch.no_grad()
def evaluate_reward(
    config: Config,
    model: RewardModel,
    paths: list[Path],
    lose: list[Path] | None = None,
    show: bool = False,
    world: World = World(),  # noqa: B008 - frozen
) -> dict[float, dict[str, float]]:
    """What is measured on held-out latents at each of eval.timesteps: of sign(logit) against the label
    `by_label`, or with `lose` the accuracy alone, how often paths[i] has a higher logit than lose[i], of the
    same shape, under the same noise (`told_right`).

    The noise of a sample is fixed by eval.seed and the same at every timestep; with eval.one_noise also for
    all samples. Every group of processes evaluates a part of the samples; all get the same result.
    TrainingError for a logit that is not finite.
    """
    e, device, dtype = config.eval, next(model.parameters()).device, flow.latent_dtype(config)
    samples = HeldOut([paths] if lose is None else [paths, lose], world)
    levels, first = train_levels(config.rollout, dtype), config.data.first_frame
    reader = Reader(model.transformer.config, config.data.label, dtype=dtype, first_frame=first)
    batches = samples.batches(reader, e.batch_size, device)
    if show:
        batches = progress(batches, "evaluating", -(-len(paths) // e.batch_size))
    for first, given in batches:
        latent = given[0].latent
        if e.one_noise:
            noise = noise_like(latent[:1], Purpose.ACCURACY, e.seed, 0).expand_as(latent)
        else:
            noise = noise_like(latent, Purpose.ACCURACY, e.seed, first)
        noise = flow.rounded(noise, dtype)
        samples.put("label", given[0].label)
        for t in e.timesteps:
            sigma = torch.full((len(noise),), levels.at(t, "eval.timesteps"), device=device)
            at = torch.full((len(noise),), float(t), device=device)
            for side, batch in enumerate(given):
                samples.put(f"accuracy_t{decimal(t)}", noisy_reward(model, batch, noise, sigma, t=at), side)
    found = samples.all()
    if lose is not None:
        sides = {t: [found[f"accuracy_t{decimal(t)}", side] for side in (0, 1)] for t in e.timesteps}
        return {t: {"accuracy": told_right(a - b).mean().item()} for t, (a, b) in sides.items()}
    return {t: by_label(found[f"accuracy_t{decimal(t)}", 0], found["label", 0]) for t in e.timesteps}


def by_label(logit: Tensor, label: Tensor) -> dict[str, float]:
    """Of logits [n] in float64 against labels [n], 0 or 1, that are positive where sigmoid(logit) > 1/2:
    precision, recall and F1, 0 where nothing is, or is called, positive; cross-entropy, and accuracy."""
    said, good = logit > 0, label > 0.5
    hits = (said & good).sum().item()
    called, there = said.sum().item(), good.sum().item()
    return {
        "precision": hits / called if called else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (called + there) if called + there else 0.0,
        "loss": cross_entropy(logit, label).mean().item(),
        "accuracy": (said == good).double().mean().item(),
    }


def score(config: Config, found: dict[float, dict[str, float]]) -> float:
    """The mean accuracy over eval.scored."""
    return sum(found[t]["accuracy"] for t in config.eval.scored) / len(config.eval.scored)


def eval_reward(config: Config) -> dict[float, dict[str, float]]:
    """What `evaluate_reward` measures of the reward model of reward.path on data.val, with reward.loss bt of
    pairs with data.val_lose unless eval.pairs is false."""
    c = config
    if c.reward.path is None:
        raise UserError("reward.path: got null, want the folder of a reward model")
    c.reward.check_one("in eval-reward")
    check_stored(c, "in eval-reward")
    paths, lose, labels = read_lists(c.data.val, "data.val"), None, set()
    if c.reward.loss == "bt" and c.eval.pairs:
        lose = read_lists(c.data.val_lose, "data.val_lose")
    else:
        labels = set(read_labels(paths, c.data.label, "data.val"))
    model = make_reward(c, c.reward.path, pick_device(c)).freeze()
    if lose is not None:
        lose = partners(Reader(model.transformer.config), paths, lose, "data.val_lose")
    found = evaluate_reward(c, model, paths, lose, show=True)
    if len(labels) == 1:
        note(f"{c.data.label} is {labels.pop():g} in all of data.val: a constant reward may be right on all")
    return found
