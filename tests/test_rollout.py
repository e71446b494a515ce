"""Accelerated rollouts: gradients are those of the ordinary step at the visited latents, the drift meter
turns acceleration off and on, and a resumed run does what the whole run did."""

import pytest
import torch
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
from no_sync import NoBlockingCopy, NoSync
from training_runs import assert_equal, content, killed, values

from prfl_engine import chain, flow
from prfl_engine.cli import main
from prfl_engine.config import ChainConfig, Config, DataConfig, RolloutConfig, TrainConfig
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.objectives import bind, graded_windows
from prfl_engine.rollout import accelerated as module
from prfl_engine.rollout import fresh as fresh_module
from prfl_engine.rollout.accelerated import Rollout, make_rollout
from prfl_engine.rollout.drift import DriftMeter

WIDE = dict(dim=128, num_heads=2)  # heads of 64, as e4m3 attention needs them
STEPS = 8
SETTINGS = [{"precision": "fp8"}, {"cache": 0.3}, {"precision": "fp8", "cache": 0.3}]


def setup(model_type="t2v", size=2, **fields):
    model, batch = model_and_batch(model_type, size, **WIDE)
    schedule = flow.make_schedule("unipc", STEPS, 5.0)
    return model, batch, schedule, Rollout(model, RolloutConfig(steps=STEPS, **fields), schedule)


def visited(model, batch, schedule, noise, index, rollout=None):
    with torch.no_grad():
        context = model.embed_context(batch.text, batch.clip)
    stretch = None if rollout is None else rollout.stretches(batch, context)
    way = chain.Chain(bind(model, batch, context), schedule, noise, stretch)
    way.advance_to(index, index)
    return way.at(index, torch.arange(len(index)))


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_where_nothing_is_reused_a_cached_rollout_is_the_plain_one_to_the_bit(model_type):
    model, batch, schedule, rollout = setup(model_type, cache=1e-9)
    noise, index = torch.randn_like(batch.latent), torch.tensor([6, 3])
    want = visited(model, batch, schedule, noise, index)
    for got, right in zip(visited(model, batch, schedule, noise, index, rollout), want, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_an_accelerated_rollout_goes_a_little_elsewhere(fields, model_type):
    """And a sample of a batch goes where it goes alone."""
    model, batch, schedule, rollout = setup(model_type, **fields)
    noise, index = torch.randn_like(batch.latent), torch.tensor([6, 3])
    want = visited(model, batch, schedule, noise, index).x
    got = visited(model, batch, schedule, noise, index, rollout).x
    assert 1e-4 < relative(got, want) < 0.1
    drift = rollout.drift(batch, noise, index).item()
    assert drift == pytest.approx(relative(got, want), rel=1e-5)
    one = type(batch)(*(None if a is None else a[1:] for a in batch))
    alone = visited(model, one, schedule, noise[1:], index[1:], rollout).x
    # Sums over rows in another order may round to another value of e4m3.
    assert relative(alone, got[1:]) < (1e-5 if "precision" not in fields else drift / 2)


def ordinary_step(velocity, schedule, state, index, window):
    """The latent behind the last `window` steps before index + 1, with a plain graph, from `state`."""
    for i in range(index - window + 1, index + 1):
        v = velocity(state.x, schedule.timesteps[i : i + 1], torch.tensor([0]))
        state = flow.step(schedule, state, v, torch.tensor([i]))
    return state.x


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("window", [1, 3])
def test_the_gradient_is_that_of_the_ordinary_step_at_the_visited_state(fields, window):
    """Two graded samples of one rollout: for each, states visited by the accelerated rollout are constants,
    and the steps of the window, the reward and their backward are ordinary."""
    model, batch, schedule, rollout = setup(size=1, **fields)
    reward = tiny_reward(model.config).freeze()
    noise, indices = torch.randn_like(batch.latent), torch.tensor([[3], [6]])

    states = []
    plain = chain.Chain.graded

    def graded(self, index, *rest):
        made = plain(self, index, *rest)
        first = index - (rest[0] - 1)
        states.append(self.at(first, torch.arange(1)))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain.Chain, "graded", graded)
        got_logits = []
        for made in graded_windows(
            model, reward, schedule, batch, noise, indices, ChainConfig(window), rollout.stretches
        ):
            got_logits.append(made.logit.item())
            made.backward(made.logit.sum())
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    for index, state, seen in zip(indices.flatten().tolist(), states, got_logits, strict=True):
        x = ordinary_step(bind(model, batch), schedule, state, index, window)
        logit = reward(x, schedule.timesteps[index + 1 : index + 2], batch.text)
        assert logit.item() == pytest.approx(seen, rel=1e-5)
        logit.sum().backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [{"recompute": "full"}, {"recompute": "attention"}, {"keep": "nothing"}, {"compile": True}],
    ids=str,
)
def test_it_goes_with_recomputation_kept_parts_and_compilation(settings):
    """Two graded windows of two steps of an fp8 rollout: the same gradients, whatever the blocks keep."""
    found = []
    for chosen in ({}, settings):
        torch.manual_seed(0)
        model, batch, schedule, rollout = setup(precision="fp8", cache=0.3)
        reward = tiny_reward(model.config).freeze()
        if chosen.get("compile"):
            for one in (model, reward.transformer):
                one.compile_blocks("aot_eager")
        how = under(chosen.get("recompute", "none"), chosen.get("keep", "all"))
        noise, indices = torch.randn_like(batch.latent), torch.tensor([[2, 3], [6, 4]])
        given = model, reward, schedule, batch, noise, indices, ChainConfig(2)
        for window in graded_windows(*given, rollout.stretches, how):
            window.backward(window.logit.sum())
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.compiler.reset()
    assert relative(found[1], found[0]) < 1e-4


def test_a_stretch_keeps_nothing_behind_it(monkeypatch):
    """No residual lives while a graded step runs, and the step behind it is computed."""
    made = []
    plain = module.StepCache
    monkeypatch.setattr(module, "StepCache", lambda *a: made.append(plain(*a)) or made[-1])
    model, batch, schedule, rollout = setup(size=1, cache=100.0)
    reward = tiny_reward(model.config).freeze()
    noise, indices = torch.randn_like(batch.latent), torch.tensor([[2], [6]])
    given = model, reward, schedule, batch, noise, indices, ChainConfig()
    for window in graded_windows(*given, rollout.stretches):
        window.backward(window.logit.sum())
    assert [(c.computed, c.reused) for c in made] == [(1, 1), (1, 2)]  # steps 0 and 1; 3, 4 and 5


# The drift meter.


class Scripted:
    """A rollout whose drift is written down for every optimizer step."""

    def __init__(self, drifts, **fields):
        self.model, self.drifts, self.asked = tiny_model(), drifts, []
        self.config, self.accelerated, self.version = RolloutConfig(**fields), True, None
        self.schedule = None  # what begins at the noise needs none

    def drift(self, batch, noise, index):
        self.asked.append(self.version)
        return torch.tensor(self.drifts[self.version])


def test_acceleration_goes_off_above_the_limit_and_on_below_it(capsys):
    drifts = {0: 0.01, 4: 0.2, 6: 0.3, 8: 0.05, 12: float("nan")}
    rollout = Scripted(drifts, probe_every=4, max_drift=0.1)
    meter = DriftMeter(rollout, random_batch(rollout.model.config, 1), 2, seed=0, save_every=6)
    found = []
    for step in range(14):
        for _ in range(2):  # micro-batches
            meter.begin(step)
        made = {k: v.item() for k, v in meter.values().items()}
        found.append(made["rollout_accelerated"])
        assert rollout.version == step
    assert rollout.asked == [0, 4, 6, 8, 12]
    assert found == [1] * 4 + [0] * 4 + [1] * 4 + [0] * 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "prfl: step 4: rollout drift 0.2, rollout.max_drift 0.1: rollouts are plain until it is below",
        "prfl: step 8: rollout drift 0.05, rollout.max_drift 0.1: rollouts are accelerated again",
        "prfl: step 12: rollout drift nan, rollout.max_drift 0.1: rollouts are plain until it is below",
    ]


def test_a_resumed_meter_probes_where_it_starts():
    rollout = Scripted({9: 0.5}, probe_every=4, max_drift=0.1)
    meter = DriftMeter(rollout, random_batch(rollout.model.config, 1), 2, seed=0, save_every=9)
    meter.begin(9)
    assert not rollout.accelerated and rollout.asked == [9]


def test_no_probe_is_left_out_where_not_every_step_has_a_rollout():
    """As where flow matching and reward take turns: probes behind steps 4 and 6, 8, 12."""
    rollout = Scripted({step: 0.01 for step in range(20)}, probe_every=4)
    meter = DriftMeter(rollout, random_batch(rollout.model.config, 1), 2, seed=0, save_every=6)
    for step in range(1, 15, 2):
        meter.begin(step)
    assert rollout.asked == [1, 5, 7, 9, 13]


@pytest.mark.parametrize("fields", [{"precision": "fp8"}, {"cache": 1e-9}], ids=str)
@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_no_copy_from_the_host_waits_for_the_device(model_type, fields):
    """In a rollout that samples leave on the way, and between probes. (What is read there is the cache's.)"""
    model, batch, schedule, rollout = setup(model_type, **fields)
    meter = DriftMeter(rollout, random_batch(model.config, 1), 2, seed=0, save_every=100)
    noise, index = torch.randn_like(batch.latent), torch.tensor([6, 3])
    meter.begin(0)  # a probe, and tables of angles are made once
    with NoBlockingCopy(NoSync([noise, *(a for a in batch if a is not None), *model.parameters()])):
        meter.begin(1)
        visited(model, batch, schedule, noise, index, rollout)
        assert meter.values()["rollout_accelerated"] == 1


def test_rollouts_are_plain_while_acceleration_is_off():
    model, batch, schedule, rollout = setup(precision="fp8", cache=0.3)
    noise, index = torch.randn_like(batch.latent), torch.tensor([6, 3])
    want = visited(model, batch, schedule, noise, index).x
    rollout.accelerated = False
    assert torch.equal(visited(model, batch, schedule, noise, index, rollout).x, want)
    rollout.accelerated = True
    assert not torch.equal(visited(model, batch, schedule, noise, index, rollout).x, want)


def test_a_probe_draws_no_random_number():
    model, batch, schedule, rollout = setup(size=1, precision="fp8", cache=0.3)
    before = torch.get_rng_state()
    meter = DriftMeter(rollout, batch, 6, seed=0, save_every=100)
    meter.begin(0)
    first = meter.drift.item()
    meter.begin(50)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < first == meter.drift.item() and all(p.grad is None for p in model.parameters())


# Whole runs.


def wide_run(tmp_path, **sections):
    path = write_run(tmp_path, **sections)
    save_transformer(tiny_model(tiny_config(**WIDE)), tmp_path / "policy")
    return path


def test_a_run_with_the_meter_draws_what_a_run_without_draws(tmp_path):
    """A cache that reuses nothing changes nothing but the metrics."""
    config = write_run(tmp_path, train={"steps": 4, "accumulate": 2, "save_every": 3}, rollout={"steps": 4})
    runs = {name: tmp_path / name for name in ("off", "on")}
    assert main(["train", str(config), f"train.out={runs['off']}"]) == 0
    options = "rollout.cache=1e-9", "rollout.probe_every=2"
    assert main(["train", str(config), f"train.out={runs['on']}", *options]) == 0
    assert_equal(content(runs["on"] / "checkpoint-4"), content(runs["off"] / "checkpoint-4"))
    off, on = values(runs["off"]), values(runs["on"])
    for step, found in on.items():
        assert found.pop("train/rollout_drift") == 0 and found.pop("train/rollout_accelerated") == 1
        assert found == off[step]


@pytest.mark.parametrize("fields", [["rollout.precision=fp8"], ["rollout.cache=1.5", "rollout.samples=2"]])
def test_a_killed_accelerated_run_goes_on_to_the_bit(fields, tmp_path):
    """With a limit that drifts fall on both sides of: acceleration is off for some steps, on for others."""
    config = wide_run(
        tmp_path,
        train={"steps": 6, "accumulate": 2, "save_every": 3},
        rollout={"steps": 6, "probe_every": 2},
        optim={"lr": 3e-3},
    )  # fmt: skip
    found = tmp_path / "found"
    assert main(["train", str(config), f"train.out={found}", "rollout.max_drift=10", *fields]) == 0
    drifts = sorted({v["train/rollout_drift"] for v in values(found).values()})
    assert len(drifts) >= 3 and drifts[0] > 0
    options = [*fields, f"rollout.max_drift={(drifts[-1] + drifts[-2]) / 2}"]  # they fall, in either run
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", str(config), f"train.out={whole}", *options]) == 0
    killed(whole, 3, cut)
    assert main(["train", str(config), f"train.out={cut}", *options, "train.resume=true"]) == 0
    assert_equal(content(cut / "checkpoint-6"), content(whole / "checkpoint-6"))
    assert values(cut) == values(whole)
    on = {v["train/rollout_accelerated"] for v in values(whole).values()}
    assert on == {0, 1}
    assert any(values(whole)[s] != values(found)[s] for s in values(whole))


@pytest.mark.parametrize("samples", [1, 3])
def test_graded_steps_are_drawn_by_sample_or_by_optimizer_step(samples):
    """Uniform over the range in all cases. Those of neighbouring micro-batches are spread over an optimizer
    step, those of two samples of one have a constant sum."""

    def drawn(one_index: int, batch: int, steps: int) -> torch.Tensor:
        fields = {"steps": 7, "samples": samples, "one_index": one_index}
        c = Config(
            rollout=RolloutConfig(**fields), data=DataConfig(batch_size=batch),
            train=TrainConfig(accumulate=6 // batch),
        )  # fmt: skip
        fresh = fresh_module.Fresh(None, c)
        return torch.cat([fresh.indices(key, batch) for key in range(steps * 6 // batch)], 1)

    own, paired = (drawn(0, batch, 400) for batch in (1, 2))
    assert torch.equal(own[:, ::2], paired[:, ::2])
    assert (paired[:, ::2] + paired[:, 1::2] == 5 + 2 * (6 // samples * torch.arange(samples)[:, None])
            - (samples - 1) * 6 // samples).all()  # fmt: skip
    assert torch.equal(drawn(0, 3, 400)[:, 2::3], own[:, 2::3])
    step, spread = drawn(6, 1, 400).view(samples, 400, 6), drawn(2, 1, 400).view(samples, 400, 3, 2)
    assert (step == step[:, :, :1]).all() and (spread == spread[..., :1]).all()
    assert torch.equal(drawn(6, 1, 400), drawn(3, 2, 400))
    if samples == 1:  # one in each third
        assert (spread[..., 0].sort(-1).values // 2 == torch.arange(3)).all()
    for found in (own, paired[:, 1::2], step[:, :, 0], spread[:, :, 0, 0], spread[:, :, 2, 0]):
        share = torch.bincount(found.flatten(), minlength=6) / found.numel()
        assert len(share) == 6 and (share - 1 / 6).abs().max() < (0.03 if found is own else 0.05)


def test_nothing_is_made_where_nothing_is_asked_for():
    schedule = flow.make_schedule("unipc", STEPS, 5.0)
    assert make_rollout(tiny_model(), RolloutConfig(), schedule, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "options, named",
    [
        (["rollout.cuda_graph=true"], "rollout.cuda_graph: got true on cpu, want a CUDA device"),
        (["rollout.precision=fp8"], "rollout.precision: got fp8 with heads of 16, want heads of 64 or 128"),
        (["rollout.precision=fp4"], "rollout.precision: got 'fp4', want same or fp8"),
        (["rollout.cache=-1"], "rollout.cache: got -1.0, want a number in [0, 1e+09]"),
        (["rollout.probe_every=0"], "rollout.probe_every: got 0, want a whole number in [1, "),
        (["rollout.max_drift=0"], "rollout.max_drift: got 0.0, want a number in [1e-09, 1e+09]"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, options, named):
    config = write_run(tmp_path)
    assert main(["train", str(config), *options]) == 2
    assert named in one_line(capsys)
