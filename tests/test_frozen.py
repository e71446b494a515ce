"""Frozen matrices that are stored in e4m3, or on the host: their values, gradients, bytes, whole runs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    model_and_batch,
    one_line,
    random_batch,
    relative,
    tiny_config,
    tiny_model,
    tiny_reward,
    under,
    write_run,
)
from plan_runs import measured, random_values
from test_expert_pair import Lazy, written
from training_runs import assert_equal, content, run, values

from prfl_engine import chain
from prfl_engine.config import ChainConfig, LoraConfig, load_config
from prfl_engine.config_models import Storage
from prfl_engine.errors import UserError
from prfl_engine.flow import make_schedule
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.memory.frozen import Frozen, layout
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.model import lora
from prfl_engine.model.layers import Linear
from prfl_engine.model.start import Start
from prfl_engine.model.wan import PRESETS
from prfl_engine.objectives import Grader, Grading, bind, sft_loss
from prfl_engine.parallel import check_many
from prfl_engine.planner.command import predict
from prfl_engine.planner.predict import memory
from prfl_engine.planner.sharded import Shards
from prfl_engine.planner.standing import models_of
from prfl_engine.planner.stored import unpacked
from prfl_engine.planner.subject import find
from prfl_engine.planner.timing import times

CPU = torch.device("cpu")
TRAINING = ("rollout", "graded", "reward", "flow")  # phases of a plan
STORAGES = [Storage(e4m3=True), Storage(host=True), Storage(e4m3=True, host=True)]
POLICIES = ["none", "full", BlockPolicy({"attention"}, {"input"}), BlockPolicy({"input", "after_cross"})]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] in float64 by the formula on paper: every row over its scale, to the nearest."""
    scale = (weight.float().abs().amax(1) / 448).double()
    return (weight.float() / scale.float()[:, None]).to(torch.float8_e4m3fn).double() * scale[:, None]


def adapted(model_type: str, dtype=torch.float64, **fields):
    """A model with adapters that do something, and a batch."""
    torch.manual_seed(3)
    model, batch = model_and_batch(model_type, dtype=dtype, **fields)
    lora.attach(model, LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(5)
    for name, p in lora.parameters(model).items():
        if name.endswith("B"):
            p.data.normal_(std=0.1, generator=generator)
    return model, batch


def matrices(model):
    return [m.weight for block in model.blocks for m in block.modules() if isinstance(m, Linear)]


def trained(model, reward, batch, run_blocks):
    """Losses of flow matching and of a window of two steps, with the gradients of adapters and text. In a
    backward of the window are two forwards of the generator (guidance) and of the reward model (draws)."""
    text = batch.text.clone().requires_grad_()
    batch, noise = batch._replace(text=text), torch.randn(batch.latent.shape).to(batch.latent)
    loss = sft_loss(model, batch, noise, torch.tensor([0.3, 0.7]), run_blocks).sum()
    loss.backward()
    schedule = make_schedule("unipc", 4, 3.0)
    scales = Scales(2, 2, 0.0)
    negative = torch.randn(3, batch.text.shape[2]).to(batch.text)
    grader = Grader(
        model, reward, schedule, ChainConfig(2), run_blocks=run_blocks, draws=2,
        guidance=Guidance(negative, scales, scales, gradient=True),
    )  # fmt: skip
    grading = Grading(grader, batch._replace(text=text.detach()), draw=lambda x: noise)
    (window,) = grading.windows(noise, torch.tensor([[2, 1]]))
    logit = window.logit.detach()
    window.backward(window.logit.sum())
    made = {name: p.grad for name, p in lora.parameters(model).items()}
    return [loss.detach(), logit, text.grad, *made.values()]


CASES = [*itertools.product(["t2v"], STORAGES, POLICIES), ("i2v", STORAGES[2], "full")]


@pytest.mark.parametrize("model_type, storage, policy", CASES)
def test_gradients_are_those_of_a_model_with_the_stored_values(model_type, storage, policy):
    """In float64 to the bit: of adapters, of inputs, and through a frozen reward model that is stored so,
    too."""
    made = []
    for apart in (False, True):
        model, batch = adapted(model_type, num_layers=3)
        reward = tiny_reward(model.config, blocks=2).double().freeze()
        if apart:
            for taken in (model, reward.transformer):
                assert Frozen(storage, CPU).take(taken) is taken
                assert all(p.isnan().all() for p in matrices(taken))
        elif storage.e4m3:
            for p in matrices(model) + matrices(reward.transformer):
                p.data = rounded(p)
        torch.manual_seed(3)
        made.append(trained(model, reward, batch, under(policy)))
    assert all(a.abs().sum() > 0 for a in made[0] if a is not None)
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_weights_in_bfloat16_are_rounded_once():
    model, batch = adapted("t2v", torch.bfloat16)
    want, seen = [rounded(p.double()).bfloat16() for p in matrices(model)], []
    Frozen(STORAGES[0], CPU).take(model)
    for block in model.blocks:
        block.register_forward_hook(
            lambda b, *_: seen.extend(m.weight.clone() for m in b.modules() if isinstance(m, Linear))
        )
    with torch.no_grad():
        model(batch.latent, torch.tensor([300.0, 900.0]), model.embed_context(batch.text))
    assert len(seen) == len(want) and all(torch.equal(*pair) for pair in zip(seen, want, strict=True))


def test_a_matrix_begins_where_the_kernels_want_it():
    places, size = layout([(3, 5), (16, 16), (1, 1)])
    assert places == [slice(0, 15), slice(256, 512), slice(512, 513)] and size == 768


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_block_in_use_and_one_on_its_way(e4m3):
    """In forward, backward and the forward after it, in the direction of the pass. A copy that is awaited
    late gives the same result, and one that nobody awaits has ended before its memory is free."""
    made, seen = [], []
    for late in (False, True):
        model, batch = adapted("t2v", num_layers=4)
        frozen = Frozen(Storage(e4m3, host=True), CPU)
        frozen.copies = lazy = Lazy() if late else frozen.copies
        frozen.copies.stream, frozen.copies.device = None, CPU
        frozen.take(model)
        asked = frozen._ask

        def ask(own, i, following, asked=asked, frozen=frozen, late=late):
            asked(own, i, following)
            if late:
                seen.append((i, [own.index(a) for a in frozen.here if a.arriving]))
            assert [own.index(a) for a in frozen.here if a.used] == [i]
            assert sum(a.used or bool(a.arriving) for a in own) <= 2

        frozen._ask = ask
        reward = tiny_reward(model.config).double().freeze()
        made.append(trained(model, reward, batch, under("full")))
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))
    forward, backward = [(i, [i + 1]) for i in range(3)], [(i, [i - 1]) for i in (3, 2, 1)]
    first = [*forward, (3, [2]), *backward, (0, [1])]
    assert seen[: len(first)] == first
    assert seen[len(first) :][:4] == [*forward, (3, [0])]  # a rollout begins anew with the first block
    frozen.here[-1].leave()
    assert not any(lazy.under_way.values())


def test_the_frozen_start_has_the_stored_values():
    model, batch = adapted("t2v")
    want = tiny_model(model.config).double()
    for p in matrices(want):
        p.data = rounded(p)
    Frozen(STORAGES[2], CPU).take(model)
    t, start = torch.tensor([300.0, 900.0]), Start(model)
    got = start(batch.latent, t, start.embed_context(batch.text))
    with torch.no_grad():
        assert torch.equal(got, want(batch.latent, t, want.embed_context(batch.text)))


def test_the_drift_of_rounded_weights():
    """How far velocities, and the ends of chains of 40 steps, are from those of the weights as they were: of
    random weights of the preset tiny-t2v, which docs/training.md has."""
    torch.manual_seed(0)
    model = tiny_model(PRESETS["tiny-t2v"]).requires_grad_(False)
    batch = random_batch(model.config, 2, (16, 3, 8, 8), 8)
    schedule, t = make_schedule("unipc", 40, 5.0), torch.tensor([900.0, 300.0])

    def made():
        with torch.no_grad():
            velocity = model(batch.latent, t, model.embed_context(batch.text))
            return velocity, chain.sample(bind(model, batch), schedule, batch.latent)

    want = made()
    Frozen(STORAGES[0], CPU).take(model)
    velocity, latent = (relative(*pair) for pair in zip(made(), want, strict=True))
    print(f"relative L2: velocities {velocity:.4f}, latents {latent:.4f}")
    assert 0.005 < velocity < 0.06 and 0.001 < latent < 0.06


# Whole runs.


def lora_run(tmp_path, **sections):
    sections = {"lora": {"rank": 2}, "eval": {"every": 2}} | sections
    return write_run(tmp_path, **sections)


WAITING = ("lora.base_place=host", "reward.place=host")
ROUNDED = ("lora.base=e4m3", "reward.weights=e4m3")


@pytest.mark.parametrize("given", [
    (), ROUNDED, (*ROUNDED, "model.recompute={keep: [], offload: [input]}", "optim.in_backward=true",
                  "optim.clip=null", "loss.alternate=true", "model.weights_dtype=bfloat16"),
    ("rollout.mode=persistent", "chain.window=2", "loss.anchor=0.1", "rollout.cache=0.1"),
], ids=["plain", "e4m3", "in_backward", "persistent"])  # fmt: skip
def test_where_frozen_weights_wait_changes_no_bit(given, tmp_path):
    """And a run that is resumed with them elsewhere goes on to the bit."""
    config = lora_run(tmp_path, train={"save_every": 2, "ema": 0.9})
    run("train", config, *given, "train.steps=4")
    cut = tmp_path / "cut"
    run("train", config, *given, *WAITING, "train.steps=2", f"train.out={cut}")
    more = ("train.steps=4", f"train.out={cut}", "train.resume=true")
    run("train", config, *given, "reward.place=host", *more)
    assert_equal(content(cut / "checkpoint-4"), content(tmp_path / "run/checkpoint-4"))
    assert values(cut, "eval") == values(tmp_path / "run", "eval")


def test_a_pair_of_experts_shares_the_room_of_two_blocks(tmp_path):
    config = written(tmp_path, lora={"rank": 2}, eval={"every": 2})
    run("train", config)
    run("train", config, *WAITING, f"train.out={tmp_path}/other")
    assert_equal(content(tmp_path / "other/checkpoint-2"), content(tmp_path / "run/checkpoint-2"))


def test_an_adapter_of_rounded_weights_is_merged_into_the_original_ones(tmp_path):
    """Sampling reads the weights as training does; merge-lora adds to those of the folder."""
    config = lora_run(tmp_path)
    run("train", config, *ROUNDED)
    adapter, made = tmp_path / "run/checkpoint-2", {}
    for name, given in {"plain": (), "e4m3": ROUNDED, "host": (*ROUNDED, *WAITING)}.items():
        run("sample", config, *given, f"lora.path={adapter}", "--out", str(tmp_path / name))
        made[name] = np.load(tmp_path / name / "sample-00.npy")
    assert np.array_equal(made["e4m3"], made["host"])
    run("merge-lora", tmp_path / "policy", str(adapter), "--out", str(tmp_path / "merged"))
    run("sample", config, f"model.path={tmp_path}/merged", "--out", str(tmp_path / "again"))
    again = np.load(tmp_path / "again/sample-00.npy")
    np.testing.assert_allclose(again, made["plain"], rtol=1e-4, atol=1e-5)
    drift = np.linalg.norm(made["e4m3"] - made["plain"]) / np.linalg.norm(made["plain"])
    assert 1e-3 < drift < 0.1


def planned_run(tmp_path, storage: Storage):
    """The configuration of a run whose bytes are those of its blocks' weights before all others."""
    values = random_values(tmp_path, 1, 3)
    base, place = "e4m3" if storage.e4m3 else "same", "host" if storage.host else "device"
    values["model"] |= {"recompute": "full", "chunk": None, "weights_dtype": "bfloat16"}
    values["lora"] = {"rank": 4, "base": base, "base_place": place}
    values["reward"] |= {"weights": base, "place": place}
    values["loss"], values["optim"] = {"weight": 0.1}, {"clip": None}
    values["rollout"] |= {"mode": "fresh", "samples": 1, "cache": 0.0}
    values["chain"], values["eval"]["every"] = {"window": 1}, 2
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("storage", STORAGES, ids=["e4m3", "host", "both"])
def test_a_plan_has_the_bytes_of_a_run(storage, tmp_path, monkeypatch):
    """Everything that is alive on the device, as the allocator counts it."""
    path = planned_run(tmp_path, storage)
    config = load_config(path)
    found = memory(config, find(config, str(path), on_cpu=True).setup, None)
    real, told = measured(path, monkeypatch), {phase.name: phase.bytes for phase in found.phases}
    training = max(size for name, size in told.items() if name.startswith(TRAINING))
    for want, got in ((training, real.training), (told["validation"], real.validation)):
        print(storage, want, got)
        assert 0.995 * got <= want <= 1.01 * got
    held = {e.category: e.bytes for e in found.host.entries}
    assert ("frozen matrices" in held) == storage.host and held["weights as they are read"] > 0


def planned_rewards(tmp_path, *given: str):
    """The plan where one reward model is taken twice, and several seeds are judged."""
    path = lora_run(tmp_path, eval={"every": 0}, rollout={"steps": 5, "seeds": 2}, data={"batch_size": 2})
    more = f"reward.more=[{{name: again, path: {tmp_path / 'reward'}}}]"
    return predict(str(path), (*given, more))


def test_further_rewards_are_planned_as_they_are_stored(tmp_path):
    def bytes_of(p, phase: str, category: str) -> int:
        phases = {phase.name: phase for phase in (*p.memory.phases, p.memory.host)}
        return sum(e.bytes for e in phases[phase].entries if e.category == category)

    plain, waiting = (planned_rewards(tmp_path, *given) for given in ((), ("reward.place=host",)))
    one = predict(str(tmp_path / "config.yaml"), ("reward.place=host",))
    for phase, category in (("graded step", "reward model"), ("host", "frozen matrices")):
        assert bytes_of(waiting, phase, category) == 2 * bytes_of(one, phase, category) > 0
    assert all(r.storage == Storage(host=True) for r in waiting.subject.setup.rewards)
    assert bytes_of(plain, "host", "frozen matrices") == 0


def test_seeds_are_judged_by_rewards_that_come_from_the_host(tmp_path):
    """A micro-batch brings the matrices of both rewards once for every seed; of two samples e4m3 is unpacked
    once."""
    p = planned_rewards(tmp_path, "reward.place=host")
    made, setup, s, one = p.memory, p.subject.setup, p.subject.config, Shards()
    models = models_of(setup)

    def row(rates, setup=setup):
        given = made.kinds, made.reward, models, p.gpu._replace(rates=rates), one, p.exchanged
        return next(row for row in times(s, setup, *given).rows if row.phase == "seeds")

    fast, slow = (p.gpu.rates._replace(link=link) for link in (1e18, 1.0))
    brought = 2 * sum(a.nbytes for a in matrices(tiny_reward(tiny_config()).transformer))
    count = s.train.accumulate * s.rollout.seeds
    assert row(fast).waits == 0
    assert row(slow).seconds == pytest.approx(count * brought)
    rewards = [replace(r, storage=Storage(e4m3=True)) for r in setup.rewards]
    rounded = replace(setup, reward=rewards[0], more=(rewards[1],))
    memory_alone = fast._replace(memory=1.0)
    more = row(memory_alone, rounded).seconds - row(memory_alone).seconds
    assert more == pytest.approx(count * 2 * unpacked(tiny_config(), torch.float32, Storage(e4m3=True)))


@pytest.mark.parametrize("given, want", [
    ("lora.rank=0 lora.base=e4m3", "lora.base: got 'e4m3', want same with lora.rank 0"),
    ("lora.rank=0 lora.base_place=host", "lora.base_place: got 'host', want device with lora.rank 0"),
    ("lora.base=e4m3 model.compile=true", "model.compile: got True, want false with lora.base e4m3"),
    ("reward.place=host model.compile=true", "model.compile: got True, want false with reward.weights"),
    ("lora.base_place=host rollout.precision=fp8", "rollout.precision: got 'fp8', want same with lora.base"),
    ("lora.base=e4m3 rollout.cuda_graph=true", "rollout.cuda_graph: got True, want false with lora.base"),
    ("reward.weights=e4m3 loss.weight=0 reward.path=null", "reward.weights: got 'e4m3', want same with loss"),
    ("reward.place=host loss.weight=0 reward.path=null", "reward.place: got 'host', want device with loss.w"),
    ("lora.base=fp8", "lora.base: got 'fp8', want same or e4m3"),
    ("lora.base=e4m3 model.boundary=0.5 model.idle=host", "model.idle: got 'host', want device with lora"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(given, want, tmp_path, capsys):
    run("train", lora_run(tmp_path), *given.split(), code=2)
    assert want in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["lora.base=e4m3", "lora.base_place=host", "reward.place=host"])
def test_several_processes_refuse_them(given, tmp_path):
    path = lora_run(tmp_path)
    with pytest.raises(UserError, match=rf"^{given.split('=')[0]}: got .* with several processes"):
        check_many(load_config(path, [given]), 1)


def test_reward_training_refuses_them(tmp_path, capsys):
    for command in ("train-reward", "eval-reward"):
        run(command, lora_run(tmp_path), "reward.weights=e4m3", code=2)
        assert "reward.weights: got 'e4m3', want same in " in one_line(capsys)


def test_another_base_is_no_run_to_resume(tmp_path, capsys):
    config = lora_run(tmp_path)
    run("train", config)
    run("train", config, "lora.base=e4m3", "train.resume=true", "train.steps=3", code=2)
    assert "lora.base" in one_line(capsys)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES, ids=["e4m3", "host", "both"])
def test_on_a_gpu(storage):
    """The gradients of a model that has the stored values, whatever the copies take."""
    made, device = [], torch.device("cuda")
    for apart in (False, True):
        model, batch = adapted("t2v", torch.float32, dim=256, ffn_dim=1024, num_layers=4)
        reward = tiny_reward(model.config, blocks=2).freeze()
        if storage.e4m3 and not apart:
            for p in matrices(model) + matrices(reward.transformer):
                p.data = rounded(p.double()).float()
        for taken in (model, reward.transformer) if apart else ():
            Frozen(storage, device).take(taken)
        model, reward = model.to(device), reward.to(device)
        batch = batch._replace(latent=batch.latent.to(device), text=batch.text.to(device))
        made.append(trained(model, reward, batch, under("full")))
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
