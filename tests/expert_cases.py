"""What test_expert_ranks.py runs on every rank: two experts in one chain, sharded, and both whole."""

import torch
from helpers import random_batch, randomize, tiny_config, tiny_model, tiny_reward, under
from shard_cases import SCHEDULE, SHAPE, collectives, compare, prfl, sft, world_of

from prfl_engine.config import ChainConfig, LoraConfig
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.model import lora
from prfl_engine.model.experts import Experts
from prfl_engine.model.start import Start
from prfl_engine.objectives import Grader, Grading, anchored_sft_loss

BOUNDARY = 0.75  # of the steps of SCHEDULE 0 to 3 are above it, and one of four samples of flow matching


def pair(kind: str = "t2v", frozen: int | None = None, updates: bool = False) -> Experts:
    """Two experts in float64, one frozen, or of both updates alone trained."""
    made = [tiny_model(tiny_config(kind), seed) for seed in (0, 7)]
    for i, model in enumerate(made):
        if updates:
            lora.start(model, LoraConfig(rank=2), 0, None)
            made[i] = randomize(model, i)
        model.double().requires_grad_(model.blocks[0].ffn[0].weight.requires_grad and i != frozen)
        for p in lora.parameters(model).values():
            p.requires_grad_(i != frozen)
    return Experts(*made, BOUNDARY)


def both(kind: str = "t2v", frozen: int | None = None):
    """With a frozen reward model."""
    return [pair(kind, frozen), tiny_reward(tiny_config(kind.removesuffix("-a14b"))).double().freeze()]


def flow_matching(policy, layouts):
    """Of two ranks one asks both experts, the other the low-noise one alone."""
    return compare(lambda *a: sft(*a, policy), lambda: [pair()], layouts)


def graded(window, indices, frozen, resident, layouts):
    def run(*given):
        return prfl(*given, window, indices)

    return compare(run, lambda: both("t2v", frozen), layouts, resident)


def image(layouts):
    """Flow matching and a window of a generator with a first frame and without CLIP features."""

    def run(model, reward, inputs, own, world):
        loss = sft(model, inputs, own).detach()
        return loss + prfl(model, reward, inputs, own, world, 2, [[1, 4, 3, 2]])

    def make():
        return [pair("i2v-a14b"), tiny_reward(tiny_config("i2v-a14b")).double().freeze()]

    return compare(run, make, layouts, kind="i2v-a14b")


def leashed(high, indices, layouts):
    """Updates of both, guided, that of high noise by the scale `high`, windows, and the distance to the
    start."""
    text = torch.randn(3, tiny_config().text_dim, generator=torch.Generator().manual_seed(3)).double()
    scales = Scales(high, 3, 1000 * BOUNDARY)

    def run(model, reward, inputs, own, world):
        (batch, noise, _), start = inputs, Start(model)
        loss = torch.stack(anchored_sft_loss(model, start, *inputs, under("full"))).sum(0).mean()
        loss.backward()
        guidance = Guidance(text, scales, scales, always=world.readers > 1)
        grader = Grader(
            model, reward, SCHEDULE, ChainConfig(2), together=world.together(model), guidance=guidance
        )
        index = torch.tensor(indices)[:, own]
        (window,) = Grading(grader, batch, start).windows(noise, index)
        more = (window.logit + window.distance).mean()
        window.backward(more)
        return loss.detach() + more.detach()

    def make():
        return [pair(updates=True), tiny_reward(tiny_config()).double().freeze()]

    return compare(run, make, layouts)


def accumulated(layouts):
    """The second micro-batch asks one expert alone; copies add up what the first has left of the other."""

    def run(model, reward, inputs, own, world):
        total = 0.0
        for last, indices in ((False, [[1, 1, 1, 1]]), (True, [[4, 4, 4, 4]])):
            world.add_up_copies(model, last)
            total = total + prfl(model, reward, inputs, own, world, 1, indices)
        return total

    return compare(run, both, layouts)


def resident(index: int) -> tuple[list[tuple[bool, bool]], int]:
    """(which experts are there whole in every step without gradient; collectives inside of these steps) in a
    rollout of the last rank to step `index`, of the others to step 1."""
    world = world_of(resident=True)
    model, reward = world.place(pair()), tiny_reward(tiny_config()).double().freeze()
    together, found, inside = world.together(model), [], 0
    whole = together.model
    batch = random_batch(tiny_config(), 1, SHAPE, dtype=torch.float64)
    grading = Grading(Grader(model, reward, SCHEDULE, together=together), batch)
    plain = grading.plain

    def watched(x, t, active):
        nonlocal inside
        sizes = [[p.untyped_storage().nbytes() for p in m.parameters()] for m in (whole.high, whole.low)]
        found.append(tuple(all(each) if any(each) else False for each in sizes))
        with collectives() as calls:
            made = plain(x, t, active)
        inside += len(calls)
        return made

    grading.plain = watched
    to = torch.tensor([index if world.rank == world.size - 1 else 1])
    grading.way(batch.latent).advance_to(to, to)
    return found, inside
