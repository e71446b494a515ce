"""Several seeds of a sample: which go on, gradients against runs from the chosen noise, runs, bytes."""

import math
import random
from dataclasses import replace
from weakref import WeakSet

import pytest
import torch
import yaml
from helpers import one_line, random_batch, relative, rows, tiny_config, tiny_model, tiny_reward, write_run
from plan_runs import configuration, measured
from training_runs import goes_on, run, values

from prfl_engine import chain, phases
from prfl_engine.config import (
    ChainConfig,
    Config,
    DataConfig,
    LossConfig,
    MoreReward,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    load_config,
)
from prfl_engine.model.flops import costs
from prfl_engine.objectives import Grader, Grading, bind, schedule_of
from prfl_engine.planner.command import predict
from prfl_engine.planner.predict import memory
from prfl_engine.planner.subject import find
from prfl_engine.rollout import choice, fresh
from prfl_engine.rollout.choice import choose, judged_step, ranks, slope
from prfl_engine.rollout.fresh import Fresh
from prfl_engine.seeds import Purpose, noise_like, seed_position

SEEDS, STEP = 4, 2


def noises(latent, first):
    """What all seeds of the samples from position `first` on begin with [SEEDS, B, ...]."""
    found = []
    for seed in range(SEEDS):
        purpose = Purpose.SEED_NOISE if seed else Purpose.ROLLOUT_NOISE
        found.append(noise_like(latent, purpose, 5, seed_position(seed, first)).double())
    return torch.stack(found)


def taken(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def wanted(keep, rewards, slopes):
    """The seeds of a sample that go on, from its rewards and slopes [SEEDS]."""
    order = rewards.argsort().tolist()
    return {
        "highest": order[-1:], "lowest": order[:1], "median": [order[(SEEDS - 1) // 2]],
        "both": [order[-1], order[0]], "steepest": [int(slopes.argmax())],
    }[keep]  # fmt: skip


@pytest.mark.parametrize("keep, samples, window", [
    ("steepest", 1, 1), ("highest", 1, 3), ("lowest", 2, 1), ("median", 1, 1), ("both", 2, 1),
    ("both", 4, 2),
])  # fmt: skip
def test_graded_steps_are_those_of_runs_from_the_chosen_noise(keep, samples, window, monkeypatch):
    """Before the judgement and after it, in float64, of samples that choose different seeds."""
    for module in (choice, fresh):
        monkeypatch.setattr(module, "noise_like", lambda *a, **k: noise_like(*a, **k).double())
    config, key, size = tiny_config(), 3, 3
    model = tiny_model(config).double()
    loss, more = LossConfig(), MoreReward("other", "x", weight=0.3, form="log")
    forms = loss, more
    models = [tiny_reward(config, seed).double().freeze() for seed in (1, 2)]
    r = RolloutConfig(steps=7, seeds=SEEDS, seeds_step=STEP, seeds_keep=keep, samples=samples)
    c = Config(
        rollout=r, data=DataConfig(batch_size=size), train=TrainConfig(seed=5),
        reward=RewardConfig(path="x", more=(more,)), loss=loss,
    )  # fmt: skip
    schedule, batch = schedule_of(r), random_batch(config, size, dtype=torch.float64)
    grader = Grader(model, models[0], schedule, ChainConfig(window), more=tuple(models[1:]))
    source = Fresh(grader, c)
    indices = source.indices(key, size)
    logits, said = [], {}
    with phases.timed(torch.device("cpu")) as clock:
        for graded, found in source.windows(batch, key):
            logits.append(torch.stack(graded.logits))
            graded.backward(torch.stack(graded.logits).sum())
            logits[-1], said = logits[-1].detach(), said | found
        work = {name: n for (name, _), n in clock.lap().work.items()}
    got = taken(model)

    begun, t = noises(batch.latent, key * size), schedule.timesteps[STEP].expand(size)
    early = []
    for noise in begun:
        with torch.no_grad():
            x = chain.rollout(bind(model, batch), schedule, noise, torch.full((size,), STEP)).x
            early.append(torch.stack([m(x, t, batch.text) for m in models]))
    early = torch.stack(early)  # [SEEDS, 2, B]
    weights = torch.tensor([[loss.weight], [more.weight]]).double()
    rewards = (weights * early.sigmoid()).sum(1) / weights.sum()
    slopes = sum(slope(early[:, i], forms[i]) for i in range(2))
    plain = Grader(model, models[0], schedule, ChainConfig(window), more=tuple(models[1:]))
    forwards, chosen = SEEDS * STEP * size, set()
    for b in range(size):
        picked = wanted(keep, rewards[:, b], slopes[:, b])
        turned = keep == "both" and choice.integers(2, Purpose.SEED_TURN, 5, key * size + b, 1).item()
        picked = picked[::-1] if turned else picked
        chosen |= set(picked)
        for place, seed in enumerate(picked):
            own = indices[place :: len(picked), b : b + 1]
            forwards += max(0, int(own[-1]) - STEP) - int((own[:-1] >= STEP).sum())
            windows = Grading(plain, rows(batch, slice(b, b + 1))).windows(begun[seed, b : b + 1], own)
            for number, graded in enumerate(windows):
                found = torch.stack(graded.logits)[:, 0]
                # Windows come chain after chain.
                at = place * (samples // len(picked)) + number
                torch.testing.assert_close(logits[at][:, b], found.detach(), rtol=1e-11, atol=1e-11)
                graded.backward(torch.stack(graded.logits).sum())
    assert relative(got, taken(model)) < 1e-12
    assert work["rollout"] == forwards and work["judged"] == SEEDS * size
    assert len(chosen) > 1 and said["seed_reward"].item() == pytest.approx(rewards.mean().item(), rel=1e-5)
    spread = (rewards.amax(0) - rewards.amin(0)).mean().item()
    assert said["seed_spread"].item() == pytest.approx(spread, rel=1e-4)


class State:
    """What stands for a state; those that live are counted."""

    def __init__(self, seed, alive):
        self.x, self.seed = torch.tensor([[float(seed)]]), seed
        alive.add(self)


def made_of(places, kept, monkeypatch):
    """(the seeds that are chosen, the most states that a sample had at a time) by places [B][count]."""
    monkeypatch.setattr(choice, "copied", lambda states: states)
    alive, most = [WeakSet() for _ in places], [0]

    def rolled(seed):
        return [[State(seed, own)] for own in alive]

    def judge(x):
        most[0] = max(most[0], *map(len, alive))
        return [own[int(x[0, 0])] for own in places], [0.0] * len(places)

    count = len(places[0])
    found, _ = choose(map(rolled, range(count)), judge, count, kept)
    return [[states[b][0].seed for states in found] for b in range(len(places))], most[0]


@pytest.mark.parametrize("keep", ["steepest", "lowest", "median", "both"])
def test_seeds_are_ranked_and_dropped_as_soon_as_they_may(keep, monkeypatch):
    """In any order, with equal ones and NaN; none is held that has no chance."""
    draw = random.Random(0)
    for count in (2, 3, 5, 8):
        kinds = 0.1, 0.5, 0.9, math.nan
        places = [[draw.choice((*kinds, draw.random())) for _ in range(count)] for _ in range(3)]
        kept = ranks(RolloutConfig(seeds=count, seeds_keep=keep, samples=2))
        seeds, most = made_of(places, kept, monkeypatch)
        for own, found in zip(places, seeds, strict=True):
            order = sorted(range(count), key=lambda s: (own[s] if own[s] == own[s] else math.inf, -s))
            assert found == [order[rank] for rank in kept]
        assert most <= (count // 2 + 2 if keep == "median" else len(kept) + 1)


def test_the_slope_is_that_of_the_loss():
    logit = torch.tensor([-2.0, 0.1, 3.0], dtype=torch.float64)
    r = logit.sigmoid()
    for form, want in {"hinge": r * (1 - r), "linear": r * (1 - r), "log": 1 - r}.items():
        torch.testing.assert_close(slope(logit, LossConfig(form=form, weight=0.5)), 0.5 * want)


def test_where_seeds_are_judged():
    r = RolloutConfig(seeds=2)
    assert judged_step(r) == 10 and judged_step(RolloutConfig()) == 0
    assert judged_step(replace(r, range=(0, 3))) == 3
    assert judged_step(replace(r, seeds_step=7)) == 7
    low = replace(r, sigma_range=(0.0, 0.875), start="data")
    assert judged_step(low) == -(-len(schedule_of(low)) // 4) < 10


@pytest.mark.parametrize("given", [
    ["rollout.seeds=3", "data.batch_size=2"], ["rollout.seeds=2", "rollout.samples=2", "rollout.cache=1e-9",
     "rollout.seeds_keep=both", "rollout.guidance=2", "chain.window=2"],
], ids=["plain", "both"])  # fmt: skip
def test_a_run_with_seeds_goes_on_to_the_bit(given, tmp_path):
    negative = {"negative_text": str(tmp_path / "data/null.npy")}
    config = write_run(tmp_path, data=negative, rollout={"steps": 5})
    goes_on(config, *given)
    assert all(of["train/seed_spread"] > 0 for of in values(tmp_path / "run").values())


@pytest.mark.parametrize("given, line", [
    ("rollout.seeds_step=2", "rollout.seeds_step: got 2, want null with rollout.seeds 1"),
    ("rollout.seeds_keep=median", "rollout.seeds_keep: got 'median', want steepest with rollout.seeds 1"),
    ("rollout.seeds=2 rollout.mode=persistent", "rollout.seeds: got 2, want 1 with rollout.mode persistent"),
    ("rollout.seeds=2 rollout.seeds_keep=both", "rollout.samples: got 1, want an even number with"),
    ("rollout.seeds=2 rollout.seeds_step=2", "rollout.seeds_step: got 2, want 1 to 1, the last step that"),
    ("rollout.seeds=2 rollout.range=[0,0]", "rollout.seeds: got 2, want 1 where the first step of the"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, line, tmp_path, capsys):
    run("train", write_run(tmp_path), *given.split(), code=2)
    assert one_line(capsys).startswith(f"prfl: {line}")


def test_a_plan_has_their_forwards(tmp_path):
    """Three of a seed before the judgement, and 15/8 after it: indices are 0 to 7. Without 3.5."""
    path = str(write_run(tmp_path, eval={"every": 0}, rollout={"steps": 9}))

    def rows(*given):
        return {row.phase: row for row in predict(path, given).times.rows}

    seeds, one = rows("rollout.seeds=3", "rollout.seeds_step=2"), rows()
    assert seeds["rollout"].flops == pytest.approx((3 * 2 + 15 / 8) / 3.5 * one["rollout"].flops)
    judged = costs(tiny_config(), (1, 4, 4), reward=(tiny_config(), 1)).flops["judged"]
    assert seeds["seeds"].flops == pytest.approx(3 * judged) and "seeds" not in one
    assert all(seeds[name].flops == row.flops for name, row in one.items() if name != "rollout")


GUIDED = {"seeds": 3, "seeds_step": 2, "guidance": 3, "guidance_at_once": True}


@pytest.mark.parametrize("seed, rollout, above", [
    (4, {"seeds": 3, "seeds_step": 2}, 0.1), (7, {"seeds": 5, "seeds_keep": "both", "samples": 2}, 0.1),
    (4, GUIDED, 0.01), (4, GUIDED | {"guidance_at_once": False}, 0.01),
])  # fmt: skip
def test_the_bytes_of_seeds_are_predicted(seed, rollout, above, tmp_path, monkeypatch):
    """Guided ones are judged as the samples that they are, not as both halves of a step."""
    path = configuration(tmp_path, seed)
    made = yaml.safe_load(path.read_text())
    made["rollout"] |= {"mode": "fresh", "steps": 5, "range": [0, 3], **rollout}
    made["loss"], made["eval"]["every"] = {"weight": 0.1, "sft_weight": 0.0}, 0
    made["data"] |= {"batch_size": 2, "negative_text": str(next(tmp_path.glob("data/**/null.npy")))}
    path.write_text(yaml.safe_dump(made))
    config = load_config(path)
    found = memory(config, find(config, str(path), on_cpu=True).setup, None)
    real = measured(path, monkeypatch)
    want = max(p.bytes for p in found.phases if p.name.startswith(("rollout", "graded", "reward")))
    assert 0.995 * real.training <= want <= (1 + above) * real.training
