"""Chains that persist: which are drawn, that their gradients are exact, and that a run carries them."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import (
    SHAPE,
    one_line,
    random_batch,
    relative,
    rows,
    tiny_config,
    tiny_model,
    tiny_reward,
    write_data,
    write_run,
)
from no_sync import NoBlockingCopy, NoSync
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import assert_equal, content, interrupt, run, values

from prfl_engine import chain as chain_module
from prfl_engine import flow
from prfl_engine import train as train_module
from prfl_engine.config import ChainConfig, Config, DataConfig, LossConfig, RolloutConfig, TrainConfig
from prfl_engine.objectives import Grader, bind, graded_windows, index_range
from prfl_engine.rollout.accelerated import make_rollout
from prfl_engine.rollout.persistent import Persistent
from prfl_engine.rollout.pool import FILE, Finite, Pool
from prfl_engine.rollout.turns import Turns
from prfl_engine.train import due

# first and last step, chains, draws of an optimizer step, of a window, stride
POOLS = [((0, 38), 10, 5, 1, 1), ((6, 18), 32, 8, 8, 1), ((13, 25), 48, 12, 4, 3), ((2, 2), 4, 2, 1, 1)]


def drawn(steps, pool, count, batch, stride, rounds, seed=0):
    """The turns of every optimizer step."""
    turns = Turns(steps, pool, count, batch, stride, seed)
    total = rounds * pool // count
    return [[turns[s * count + i] for i in range(count)] for s in range(total)]


@pytest.mark.parametrize("pool", POOLS)
def test_every_optimizer_step_sees_the_range_evenly(pool):
    """No two slots of a step are the same, and no arc of the range has a chain more than its share."""
    (first, last), _, count, _, _ = pool
    length = last + 1 - first
    for turns in drawn(*pool, rounds=6):
        assert len({turn.slot for turn in turns}) == count
        places = Counter(turn.index - first for turn in turns)
        assert set(places) <= set(range(length))
        for arc in range(1, length + 1, 3):
            for start in range(length):
                held = sum(places[(start + i) % length] for i in range(arc))
                # One of every stratum: the strata that an arc may touch.
                assert held <= math.ceil(arc * count / length) + 1


@pytest.mark.parametrize("pool", POOLS)
def test_the_graded_steps_are_uniform(pool):
    (first, last), size, _, _, stride = pool
    length = last + 1 - first
    found = [t for turns in drawn(*pool, rounds=length) for t in turns]
    by_slot = Counter((t.slot, t.index) for t in found)
    if stride == 1:  # every slot is drawn once at every step
        assert set(by_slot.values()) == {1} and len(by_slot) == size * length
    seeds = range(20)
    counts = Counter(t.index for s in seeds for turns in drawn(*pool, rounds=length, seed=s) for t in turns)
    mean = len(seeds) * size  # a slot's steps of one run are not independent: this is a generous bound
    assert all(abs(counts[i] / mean - 1) < 0.2 for i in range(first, last + 1))
    starts = {Turns(*pool, seed=s)[0].index for s in range(400)}
    assert starts == set(range(first, last + 1))  # missed with a chance of 39 (38/39)^400 = 1e-3


@pytest.mark.parametrize("pool", [p for p in POOLS if p[1] >= 2 * p[2]])
def test_consecutive_steps_do_not_follow_one_chain(pool):
    before, orders = set(), set()
    for turns in drawn(*pool, rounds=12):
        slots = {turn.slot for turn in turns}
        assert not slots & before
        before = slots
        orders.add(tuple(sorted(slots)))
    if pool[1] // pool[2] > 2:
        assert len(orders) > 12  # the company that a slot is drawn in changes


@pytest.mark.parametrize("pool", POOLS)
def test_a_slot_goes_on_by_the_stride_and_then_begins_another_lap(pool):
    (first, last), _, _, _, stride = pool
    length, at, jumps = last + 1 - first, {}, []
    for turns in drawn(*pool, rounds=40):
        moved = set()
        for turn in turns:
            place = turn.lap * length + turn.index - first
            if turn.slot in at:
                moved.add(place - at[turn.slot])
            at[turn.slot] = place
        assert len(moved) <= 1  # as many forwards whatever the indices: ranks stay in step
        jumps += moved
    assert all(1 <= j < 2 * stride for j in jumps)
    assert sum(jumps) / len(jumps) == pytest.approx(stride, rel=0.1)


# Gradients.


def setup(size=2, samples=1, window=1, model_type="t2v", accumulate=1, **rollout):
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

    return Persistent(grader, c, None, sources), grader, c, data


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

    def recorded(self, chains, turns, step):
        found.extend((chain, turn.index) for chain, turn in zip(chains, turns, strict=True))
        return grade(self, chains, turns, step)

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


def test_drift_is_measured_and_bounded():
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
    strict = replace(c, rollout=replace(c.rollout, max_drift=found["chain_drift"].item() / 4))
    source.config = strict
    while found["chain_renewed"] == 0:
        key += 1
        births = {id(chain): chain.numbers.birth for chain in source.pool.alive()}
        found = step(source, key)
    now = {id(chain): chain.numbers.birth for chain in source.pool.alive() if id(chain) in births}
    renewed = [births[chain] for chain, birth in now.items() if birth > births[chain]]
    left = [births[chain] for chain, birth in now.items() if birth == births[chain]]
    assert renewed and max(renewed) <= min(left, default=key)


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


# Whole runs.

RUN = {"mode": "persistent", "steps": 5}


@pytest.mark.parametrize("how", [
    {}, {"rollout.pool": 4, "rollout.pool_place": "host", "chain.window": 2},
    {"rollout.samples": 2, "rollout.stride": 2, "rollout.range": "[1,3]", "loss.sft_every": 2},
], ids=str)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_bit(how, tmp_path, monkeypatch):
    config = write_run(
        tmp_path, train={"steps": 5, "save_every": 3, "accumulate": 2, "ema": 0.9}, rollout=RUN,
        data={"text_dropout": 0.3},
    )  # fmt: skip
    calls = 4 * 2 * how.get("rollout.samples", 1)
    how = [f"{k}={v}" for k, v in how.items()] + ["rollout.probe_every=1", "rollout.max_drift=1e-3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", config, f"train.out={whole}", *how)
    with monkeypatch.context() as patch:
        interrupt(patch, Persistent, "_grade", calls + 1)  # in the fifth step
        run("train", config, f"train.out={cut}", *how, code=130)
    assert [p.name for p in cut.glob("checkpoint-*")] == ["checkpoint-3"]
    run("train", config, f"train.out={cut}", *how, "train.resume=true")
    for name in ("checkpoint-3", "checkpoint-5"):
        assert_equal(content(cut / name), content(whole / name))
        said = [safe_open(out / name / FILE, "pt").metadata() for out in (cut, whole)]
        assert said[0] == said[1]
    assert values(cut) == values(whole)
    for name in ("age", "drift", "renewed"):
        assert max(v.get(f"train/chain_{name}", 0) for v in values(whole).values()) > 0, name


def test_with_a_range_of_one_step_the_modes_are_one_to_the_bit(tmp_path):
    """Every chain is new then, from the noise that a fresh rollout has."""
    config = write_run(tmp_path, train={"steps": 3, "accumulate": 2}, rollout={"steps": 4, "range": [1, 1]})
    out = {mode: tmp_path / mode for mode in ("fresh", "persistent")}
    for mode, folder in out.items():
        run("train", config, f"train.out={folder}", f"rollout.mode={mode}")
    found, want = (content(out[mode] / "checkpoint-3") for mode in ("persistent", "fresh"))
    found.pop(FILE)
    assert_equal(found, want)


def poisoned(monkeypatch, call):
    """The states that a pool gives at its call-th call are not finite, in all fields."""
    get, calls = Pool.get, []

    def given(self, chain):
        calls.append(chain)
        states = get(self, chain)
        if len(calls) != call:
            return states
        return [flow.SolverState(*(torch.full_like(a, math.nan) for a in s)) for s in states]

    monkeypatch.setattr(Pool, "get", given)
    return calls


def test_a_run_survives_a_chain_that_goes_bad(tmp_path, monkeypatch, capsys):
    """Its update is skipped, the chain is dropped and counted, and no weight notices."""
    config = write_run(tmp_path, rollout=RUN | {"max_drift": 1e3}, train={"steps": 6})
    calls = poisoned(monkeypatch, 4)  # in step 3; of two slots this is the second, whose chain is of step 1
    run("train", config)
    lines = capsys.readouterr().err
    assert "no update" in lines and "dropped" in lines
    found = values(tmp_path / "run")
    assert [math.isnan(found[step]["train/grad_norm"]) for step in range(3, 7)] == [False, True, False, False]
    assert [found[step]["train/chain_dropped"] for step in range(4, 7)] == [0, 0, 1]
    assert calls[1] is calls[3] and calls[5] is not calls[3]


def test_what_present_weights_make_from_noise_is_no_fault_of_the_pool(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, rollout=RUN, train={"steps": 5})
    poisoned(monkeypatch, 2)  # a new chain
    capsys.readouterr()
    run("train", config, code=1)
    assert "step 1: the norm of the gradient is nan" in capsys.readouterr().err


WITH = [
    {"lora.rank": 2}, {"rollout.cache": 0.3, "rollout.range": "[2,3]", "rollout.max_drift": 1},
    {"chain.window": "all", "chain.detach_input": "true"}, {"loss.alternate": "true", "train.steps": 8},
    {"optim.in_backward": "true", "optim.clip": "null", "loss.sft_weight": 0}, {"model.recompute": "full"},
]  # fmt: skip


@pytest.mark.parametrize("how", WITH, ids=str)
def test_it_goes_with_the_other_settings(how, tmp_path):
    config = write_run(tmp_path, rollout=RUN, train={"steps": 6})
    run("train", config, *(f"{k}={v}" for k, v in how.items()), "eval.every=6")
    found = [v for v in values(tmp_path / "run").values() if "train/reward" in v]
    assert max(v["train/chain_age"] for v in found) > 0 and all(0 < v["train/reward"] < 1 for v in found)
    assert all(("train/rollout_drift" in v) == ("rollout.cache" in how) for v in found)


REFUSED = {
    "rollout.pool=3": "rollout.pool: got 3, want a multiple of 2 = data.batch_size * train.accumulate",
    "rollout.stride=5": "rollout.stride: got 5, want at most 4, the steps of rollout.range",
    "rollout.mode=fresh rollout.pool=4": "rollout.pool: got 4, want null with rollout.mode fresh",
    "rollout.mode=fresh rollout.stride=2": "rollout.stride: got 2, want 1 with rollout.mode fresh",
    "rollout.mode=fresh rollout.pool_place=host": "rollout.pool_place: got 'host', want device with",
    "loss.sft_every=2 loss.alternate=true": "loss.sft_every: got 2, want 1 with loss.alternate",
    "loss.sft_every=2 loss.weight=0": "loss.sft_every: got 2, want 1, or positive loss.weight and",
    "loss.sft_every=2 loss.sft_weight=0": "loss.sft_every: got 2, want 1, or positive loss.weight and",
    "loss.sft_every=2 optim.in_backward=true optim.clip=null": "loss.alternate: got False, want true or",
}


def test_what_does_not_go_is_refused_by_name(tmp_path, capsys):
    config = write_run(tmp_path, rollout=RUN, train={"accumulate": 1}, data={"batch_size": 2})
    for given, line in REFUSED.items():
        run("train", config, *given.split(), code=2)
        assert line in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_latents_of_several_shapes_need_batches_of_one(tmp_path, capsys):
    config = write_run(tmp_path, rollout=RUN, train={"steps": 6})
    write_data(tmp_path / "data", tiny_config(), 4, [SHAPE, (16, 1, 4, 6)])
    run("train", config, "data.batch_size=2", code=2)
    assert "data.train: got latents of 2 shapes, want one with rollout.mode persistent" in one_line(capsys)
    run("train", config)
    chains = load_file(tmp_path / "run/checkpoint-6" / FILE)
    assert len({chains[f"{slot}.0.x"].shape for slot in (0, 1)}) == 2


# Resuming with other settings, and broken files.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run("train", write_run(folder, rollout=RUN, train={"steps": 3}))
    return folder


def resumed(finished, tmp_path, *overrides, code=0):
    """Another step of a copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    more = f"train.out={tmp_path / 'run'}", "train.resume=true", "train.steps=4"
    run("train", finished / "config.yaml", *more, *overrides, code=code)


@pytest.mark.parametrize("override, said", [
    ("rollout.range=late", "made with rollout.range [0, 3], now [2, 3]: all chains start anew"),
    ("rollout.pool=4", "made with rollout.pool 2, now 4: all chains start anew"),
    ("chain.window=2", "made with chain.window 1, now 2: all chains start anew"),
    ("rollout.steps=6", "made with rollout.steps 5, now 6: all chains start anew"),
    ("rollout.max_drift=1", None), ("rollout.pool_place=host", None),
])  # fmt: skip
def test_a_pool_of_other_settings_is_left_out(override, said, finished, tmp_path, capsys):
    capsys.readouterr()
    resumed(finished, tmp_path, override)
    printed = capsys.readouterr()
    assert f"prfl: {override.split('=')[0]}: " in printed.out
    assert said is None or said in printed.err
    age = values(tmp_path / "run")[4]["train/chain_age"]
    assert (age > 0) == (said is None)


def test_the_mode_may_change(finished, tmp_path, capsys):
    resumed(finished, tmp_path, "rollout.mode=fresh")
    assert not (tmp_path / "run/checkpoint-4" / FILE).exists()
    more = f"train.out={tmp_path / 'run'}", "train.resume=true", "train.steps=5"
    capsys.readouterr()
    run("train", finished / "config.yaml", *more)
    assert "checkpoint-4 holds no pool of chains: all chains start anew" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint-5" / FILE).exists()


def broken(path, change):
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["pool"])
    tensors = load_file(path)
    change(said, tensors)
    save_file(tensors, path, {"pool": json.dumps(said)})


CHANGES = {
    "no numbers of a pool": lambda said, tensors: said["chains"]["0"].pop("lap"),
    "got no numbers of a pool": lambda said, tensors: said["counts"].update(drawn="3"),
    "slot 0 holds no whole chain": lambda said, tensors: tensors.pop("0.text"),
    "numbers of a pool, want": lambda said, tensors: said["counts"].update(drawn=-1),
    "slot 1 holds no whole chain": lambda said, tensors: tensors.update({"1.0.m0": torch.zeros(3)}),
    "slot 7 holds no whole chain": lambda said, tensors: said["chains"].update({"7": said["chains"]["0"]}),
    "got 'other', want the tensors of the chains": lambda said, tensors: tensors.update(other=torch.ones(1)),
    "0.0.x holds NaN": lambda said, tensors: tensors["0.0.x"].fill_(math.nan),
}


@pytest.mark.parametrize("line", CHANGES)
def test_a_broken_pool_is_refused_and_nothing_is_written(line, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    broken(finished / "run/checkpoint-3" / FILE, CHANGES[line])
    try:
        capsys.readouterr()
        resumed(finished, tmp_path, code=2)
    finally:
        shutil.copytree(tmp_path / "copy", finished, dirs_exist_ok=True)
    assert line in one_line(capsys) and not (tmp_path / "run/checkpoint-4").exists()


# Losses.


def test_flow_matching_in_one_step_of_several():
    assert [due(LossConfig(sft_every=3), s) for s in range(4)] == [
        (True, True), (False, True), (False, True), (True, True),
    ]  # fmt: skip
    assert [due(LossConfig(alternate=True), s) for s in range(2)] == [(True, False), (False, True)]
    assert due(LossConfig(weight=0), 1) == (True, False) and due(LossConfig(sft_weight=0), 0) == (False, True)


def test_the_other_steps_compute_no_flow_matching(tmp_path, monkeypatch):
    config = write_run(tmp_path, train={"steps": 5, "accumulate": 2})
    calls, loss = [], train_module.sft_loss
    monkeypatch.setattr(train_module, "sft_loss", lambda *args: calls.append(0) or loss(*args))
    run("train", config, "loss.sft_every=2")
    assert len(calls) == 6  # two micro-batches each of the steps 0, 2, 4
    assert ["train/sft_loss" in v for v in values(tmp_path / "run").values()] == [True, False] * 2 + [True]
