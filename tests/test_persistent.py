"""Chains that persist: their gradients are exact, their staleness is measured and bounded."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import random_batch, relative, rows, tiny_config, tiny_model, tiny_reward
from no_sync import NoBlockingCopy, NoSync
from ranks import LIMIT

from prfl_engine import chain as chain_module
from prfl_engine import flow
from prfl_engine.config import ChainConfig, Config, DataConfig, RolloutConfig, TrainConfig
from prfl_engine.objectives import Grader, bind, graded_windows, index_range
from prfl_engine.parallel import World
from prfl_engine.rollout.accelerated import make_rollout
from prfl_engine.rollout.persistent import Persistent
from prfl_engine.rollout.pool import Finite


def setup(size=2, samples=1, window=1, model_type="t2v", accumulate=1, world=World(), **rollout):  # noqa: B008
    """A float64 grader, a configuration and micro-batches with their positions in the stream."""
    config = tiny_config(model_type)
    model, reward = tiny_model(config).double(), tiny_reward(config).double().freeze()
    rollout = {"mode": "persistent", "steps": 6, "samples": samples, "max_drift": 1e3} | rollout
    c = Config(
        data=DataConfig(batch_size=size), rollout=RolloutConfig(**rollout), chain=ChainConfig(window),
        train=TrainConfig(accumulate=accumulate),
    )  # fmt: skip
    schedule = flow.make_schedule(c.rollout.solver, c.rollout.steps, c.rollout.shift)
    grader = Grader(model, reward, schedule, c.chain)
    torch.manual_seed(0)
    tokens = (4, 2, 6, 3)
    data = [random_batch(config, size, tokens=tokens[i % 4], dtype=torch.float64) for i in range(4)]

    def sources(key):
        return [key % 4 * size + row for row in range(size)]

    return Persistent(grader, c, None, sources, world), grader, c, data


def backward(windows):
    for window, _ in windows:
        window.backward(torch.sigmoid(window.logit).sum())


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


CASES = [
    {}, {"solver": "euler"}, {"size": 1, "accumulate": 2, "pool": 2}, {"window": 3}, {"window": "all"},
    {"samples": 2, "window": 2}, {"range": (2, 4), "pool": 8}, {"stride": 2, "pool": 6, "window": 2},
    {"pool_place": "host"}, {"model_type": "i2v", "size": 1},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_fixed_weights_gradients_are_those_of_fresh_rollouts(case, monkeypatch):
    """At the same noise and index, in float64, of chains that have lived for some updates."""
    source, grader, c, data = setup(**case)
    grade, found = Persistent._grade, []

    def recorded(self, chains, turns, step, key):
        found.extend((chain, turn.index) for chain, turn in zip(chains, turns, strict=True))
        return grade(self, chains, turns, step, key)

    monkeypatch.setattr(Persistent, "_grade", recorded)
    steps, ages = index_range(c.rollout), []
    for key in range(last := 8 * c.train.accumulate):
        found.clear()
        backward(source.windows(data[key % 4], key))
        got = gradient(grader.model)
        if key < last - 2:
            continue
        assert len(found) == c.data.batch_size * c.rollout.samples
        for chain, index in found:
            n = chain.numbers
            assert steps[0] <= index <= steps[1]
            ages.append(key // c.train.accumulate - n.birth)
            at, row = divmod(n.source, c.data.batch_size)
            one = rows(data[at], slice(row, row + 1))
            noise = source.noise(one.latent, n.position)
            given = grader.model, grader.reward, grader.schedule, one, noise, torch.tensor([[index]])
            for window in graded_windows(*given, c.chain):
                window.backward(torch.sigmoid(window.logit).sum())
        assert relative(got, gradient(grader.model)) < 1e-12
    assert max(ages) >= 2


def test_only_new_chains_are_rolled_out(monkeypatch):
    """After the first round, a range that begins at the noise costs one forward a graded sample."""
    source, grader, _, data = setup(size=1, pool=3)
    source.pool.counts.probed, calls = 10**6, []  # no probes
    forward = type(grader.model).forward
    monkeypatch.setattr(type(grader.model), "forward", lambda *a: calls.append(len(a[1])) or forward(*a))
    for key in range(3):
        backward(source.windows(data[key], key))
    assert sum(calls) > 3
    calls.clear()
    for key in range(3, 30):
        backward(source.windows(data[key % 4], key))
    assert sum(calls) == 27


def test_steps_before_the_range_are_accelerated_where_a_chain_passes_them():
    source, grader, c, data = setup(size=1, pool=1, range=(2, 4))
    model, made = grader.model, []

    def stretches(batch, context):
        def velocity(x, t, active):
            made.append(t.item())
            return model(x, t, context.detach(), batch.condition)

        return lambda: velocity

    source = Persistent(replace(grader, stretches=stretches), c, None, source.sources)
    steps = grader.schedule.timesteps.tolist()
    for key in range(9):
        made.clear()
        _, turn = len(source.pool.alive()), source.turns[key]
        backward(source.windows(data[key % 4], key))
        born = key == 0 or turn.index == 2
        assert made == (steps[: turn.index] if born else [])


def test_chains_of_a_step_are_of_different_prompts():
    """Also where the stream comes back to a sample while a chain of it is alive."""
    source, _, c, data = setup(size=2, pool=4)
    for key in range(12):
        backward(source.windows(data[key % 4], key))
        held = [chain.numbers.source for chain in source.pool.alive()]
        assert len(set(held)) == len(held)
        assert len({chain.numbers.position for chain in source.pool.alive()}) == len(held)


def test_a_smaller_micro_batch_takes_fewer_chains():
    source, _, c, data = setup(size=2, pool=4)
    indices = []
    for key in range(13):
        batch = data[key % 4] if key % 3 else rows(data[key % 4], slice(1))
        before = source.pool.counts.drawn
        backward(source.windows(batch, key))
        assert source.pool.counts.drawn - before == len(batch.latent)
        indices += [source.turns[k].index for k in range(before, source.pool.counts.drawn)]
    for i in range(0, len(indices) - 1, 2):  # and every two draws are still on both sides of the range
        assert (indices[i] - indices[i + 1]) % 5 in (2, 3)


def test_a_step_waits_for_the_device_only_where_drift_is_measured(monkeypatch):
    """What is read on the host is the flag of a chain, which was copied an optimizer step before."""
    source, grader, _, data = setup(size=2, pool=8, window=2, samples=2)
    source.pool.counts.probed = 10**6
    for key in range(2):
        backward(source.windows(data[key], key))
    held = [a for chain in source.pool.alive() for state in chain.states for a in state]
    prompts = [chain.prompt.text for chain in source.pool.alive()]
    batches = [a for batch in data for a in batch if a is not None]
    monkeypatch.setattr(Finite, "__getitem__", lambda self, row: True)
    for chain in source.pool.alive():
        chain.finite = lambda: True
    watch = NoSync([*held, *prompts, *batches, *grader.model.parameters(), *grader.reward.parameters()])
    with NoBlockingCopy(watch):
        for key in range(2, 8):
            backward(source.windows(data[key % 4], key))


@pytest.mark.parametrize("how", [{"precision": "fp8"}, {"cache": 0.3}], ids=str)
def test_accelerated_steps_lead_to_the_range_and_graded_ones_go_on_plainly(how):
    config = tiny_config(dim=128, num_heads=2)
    model, reward = tiny_model(config), tiny_reward(config).freeze()
    c = Config(rollout=RolloutConfig(mode="persistent", steps=8, range=(4, 6), pool=1, **how))
    schedule = flow.make_schedule("unipc", 8, 5.0)
    rollout = make_rollout(model, c.rollout, schedule, torch.device("cpu"))
    grader = Grader(model, reward, schedule, stretches=rollout.stretches)
    source = Persistent(grader, c, None, lambda key: [0])
    batch, seen = random_batch(config, 1), []
    for key in range(8):
        backward(source.windows(batch, key))
        (chain,) = source.pool.alive()
        noise, index = source.noise(batch.latent, chain.numbers.position), torch.tensor([chain.numbers.index])
        with torch.no_grad():
            plain = chain_module.rollout(bind(model, batch), schedule, noise, index)
        seen.append(relative(chain.states[-1].x, plain.x))
    assert 1e-5 < max(seen) < 0.2


# Staleness.


def test_drift_is_measured_and_bounded(monkeypatch):
    """With weights that move, ages and drift grow. Above the bound the oldest chains are rolled out again
    until one of them was closer than that."""
    source, grader, c, data = setup(size=1, pool=4, probe_every=1, max_drift=1e3)
    p, generator = next(grader.model.parameters()), torch.Generator().manual_seed(0)

    def step(source, key):
        ((_, extra),) = source.windows(data[key % 4], key)
        with torch.no_grad():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=generator), alpha=0.02)
        return extra

    for key in range(24):
        found = step(source, key)
    assert found["chain_age"] > 4 and found["chain_drift"] > 0.01 and found["chain_renewed"] == 0
    bound = found["chain_drift"].item() / 4
    source.config = replace(c, rollout=replace(c.rollout, max_drift=bound))
    rolled, seen = Persistent._rolled, []

    def recorded(self, chain):
        states, drift = rolled(self, chain)
        seen.append((chain.numbers.birth, drift))
        return states, drift

    monkeypatch.setattr(Persistent, "_rolled", recorded)
    while found["chain_renewed"] == 0:
        key += 1
        seen.clear()
        found = step(source, key)
    (_, measured), *renewed = seen
    births, drifts = zip(*renewed, strict=True)
    assert measured > bound and found["chain_drift"].item() == pytest.approx(measured)
    alive = source.pool.alive()
    assert list(births) == sorted(births) and found["chain_renewed"] == len(renewed) < len(alive)
    assert all(drift > bound for drift in drifts[:-1]) and drifts[-1] <= bound
    assert [chain.numbers.birth for chain in alive].count(key) >= len(renewed)


def test_a_renewed_chain_is_what_present_weights_make():
    source, grader, c, data = setup(size=1, pool=3, window=2)
    for key in range(6):
        backward(source.windows(data[key % 4], key))
    grader.model.zero_grad()
    chain = source.pool.alive()[0]
    same, distance = source._rolled(chain)
    assert distance < 1e-12
    assert len(same) == len(chain.states) == min(2, chain.numbers.index + 1)
    with torch.no_grad():
        for p in grader.model.parameters():
            p *= 1.1
    new, distance = source._rolled(chain)
    assert distance == pytest.approx(relative(chain.states[-1].x, new[-1].x)) and distance > 1e-3


def test_a_chain_that_is_not_finite_is_dropped_and_counted():
    source, _, _, data = setup(size=1, pool=2)
    for key in range(4):
        backward(source.windows(data[key], key))
    slot = source.turns[4].slot
    bad = source.pool.chains[slot]
    bad.states[-1].m1.fill_(math.nan)
    bad.finite = lambda: Finite(bad.states)[0]
    for key in range(4, 8):
        ((window, extra),) = source.windows(data[key % 4], key)
        assert window.logit.isfinite().all()
        assert source.pool.chains[slot] is not bad
    assert extra["chain_dropped"] == 1 and len(source.pool.alive()) == 2


# Several processes.


class Lockstep:
    """A rank of two that are threads, as Persistent knows it; a rank that waits alone fails in the end."""

    readers, sequence = 2, 1

    def __init__(self, reader, barrier, numbers):
        self.reader = self.rank = reader
        self.barrier, self.numbers = barrier, numbers

    def most(self, number):
        self.numbers[self.reader] = number
        self.barrier.wait(LIMIT)
        found = max(self.numbers)
        self.barrier.wait(LIMIT)
        return found


def test_ranks_make_the_same_forwards_whatever_happens_to_one():
    """Their forwards are those of sharded weights, which wait for each other. Chains of the second rank alone
    go bad, and drift is above the bound on either."""
    numbers, barrier = [0, 0], threading.Barrier(2)

    def rank(reader):
        how = {"accumulate": 4, "pool": 12, "range": (1, 4), "probe_every": 2, "max_drift": 0.02, "stride": 2}
        source, grader, _, data = setup(size=1, world=Lockstep(reader, barrier, numbers), **how)
        pool, generator = source.pool, torch.Generator().manual_seed(0)
        calls, forwards, turns, lost, poisoned = [], [], [], [], []
        grader.model.register_forward_pre_hook(lambda *_: calls.append(0))
        for micro in range(28):
            step, turn = micro // 2, source.turns[pool.counts.drawn]
            chain = pool.chains[turn.slot]
            old = chain is not None and chain.numbers.lap == turn.lap and chain.numbers.birth < step
            if old and micro % 8 == 2:
                poisoned.append(step)
                if reader == 1:
                    chain.states[-1].x.fill_(math.nan)
            for window, _ in source.windows(data[(micro + reader) % 4], 2 * micro + reader):
                bad = reader == 1 and poisoned[-1:] == [step] and micro % 2 == 0
                assert window.logit.isfinite().all() != bad
            forwards.append(len(calls))
            turns.append(turn)
            if micro % 2:
                lost.append(source.lost(step))
                with torch.no_grad():
                    for p in grader.model.parameters():
                        p.add_(torch.randn(p.shape, dtype=p.dtype, generator=generator), alpha=0.01)
        assert [step for step, flag in enumerate(lost) if flag] == poisoned
        return (forwards, turns, lost, pool.counts), {chain.numbers.position for chain in pool.alive()}

    with ThreadPoolExecutor(2) as threads:
        (first, positions), (second, others) = threads.map(rank, (0, 1))
    assert first == second and not positions & others
    _, turns, lost, counts = first
    assert counts.dropped == sum(lost) > 1
    assert counts.renewed > 0 and counts.drift > 0 and len({turn.index for turn in turns}) == 4
