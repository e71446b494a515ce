"""An adapter of rollouts alone: they are those of a model that it is merged into, all else is without it."""

import copy
import shutil

import numpy as np
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
    write_adapter,
    write_run,
)
from training_runs import content, goes_on, run, values

from prfl_engine import chain
from prfl_engine.config import ChainConfig, LoraConfig, RolloutConfig, load_config
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.model.layers import Linear
from prfl_engine.objectives import Grader, Grading, bind, graded_windows, schedule_of
from prfl_engine.planner.predict import memory
from prfl_engine.planner.subject import find
from prfl_engine.rollout.accelerated import Rollout

LEVELS = {"sigmas": (0.99, 0.83, 0.6, 0.25), "steps": 4}


def merged_with(model, path):
    """A copy of a model with an adapter in its weights."""
    made = copy.deepcopy(model)
    for name, low in lora.read(path)[0].items():
        weight = made.get_submodule(name).weight.data
        weight += low.scale * low.up.to(weight) @ low.down.to(weight)
    return made


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def states_of(velocity, schedule, noise, index):
    """The states before steps index [B]."""
    way = chain.Chain(velocity, schedule, noise)
    way.advance_to(index, index)
    return way.states


@pytest.mark.parametrize("kind, rank, window, guided", [
    ("t2v", 0, 1, False), ("t2v", 3, 2, False), ("i2v", 0, 1, False), ("t2v", 3, 1, True),
])  # fmt: skip
def test_rollouts_have_it_and_graded_steps_have_not(kind, rank, window, guided, tmp_path):
    """In float64: full training and LoRA; the adapter has updates outside of blocks, too."""
    config = tiny_config(kind)
    path, model, reward = write_adapter(tmp_path, config), tiny_model(config), tiny_reward(config)
    if rank:
        lora.attach(model, LoraConfig(rank))
        for p in lora.parameters(model).values():
            torch.nn.init.normal_(p, std=0.1)
    model, reward = model.double(), reward.double().freeze()
    merged, batch = merged_with(model, path), random_batch(config, 2, dtype=torch.float64)
    guidance = None
    if guided:
        text = torch.randn(3, config.text_dim, dtype=torch.float64)
        guidance = Guidance(text, Scales(2, 2, 0), Scales(2, 2, 0))
    r = RolloutConfig(**LEVELS, lora=str(path))
    schedule, noise, index = schedule_of(r), torch.randn_like(batch.latent), torch.tensor([2, 2])
    lora.lend(model, path)
    rollout = Rollout(model, r, schedule, guidance=guidance)
    grader = Grader(model, reward, schedule, ChainConfig(window), rollout.stretches, guidance=guidance)
    (graded,) = Grading(grader, batch).windows(noise, index[None])
    graded.backward(graded.logit.sum())
    got = gradient(model)

    def rolled(model, with_gradient=False):
        if guidance is None:
            return bind(model, batch)
        both = guidance.both(batch)
        context = model.embed_context(both.text, both.clip)
        return guidance.velocity(lambda *a: bind(model, *a), both, context, with_gradient)

    first = index - (window - 1)
    with torch.no_grad():
        want = states_of(rolled(merged), schedule, noise, first)
        both = batch if guidance is None else guidance.both(batch)
        velocity = rollout.stretches(both, model.embed_context(both.text, both.clip))()
        found = states_of(velocity, schedule, noise, first)
        free = states_of(rolled(model), schedule, noise, first)
    for mine, other, plain in zip(found, want, free, strict=True):
        assert relative(mine[-1].x, other[-1].x) < 1e-12 < 1e-3 < relative(plain[-1].x, other[-1].x)
    apart = [torch.cat([states[-1].x for states in way]) for way in (want, free)]
    plain = Grader(model, reward, schedule, ChainConfig(window), guidance=guidance)
    grading = Grading(plain, batch)
    other = grading.grade(grading.way(want), index)
    torch.testing.assert_close(graded.logit, other.logit.detach(), rtol=1e-12, atol=1e-12)
    other.backward(other.logit.sum())
    assert relative(got, gradient(model)) < 1e-12
    drift = rollout.drift(batch, noise, first).item()
    assert drift == pytest.approx(relative(*apart), rel=1e-9)
    rollout.accelerated = False
    with torch.no_grad():
        velocity = rollout.stretches(both, context := model.embed_context(both.text, both.clip))()
        off = states_of(velocity, schedule, noise, first)
    assert context.requires_grad is False and torch.equal(off[0][-1].x, free[0][-1].x)


def test_e4m3_weights_have_it_too(tmp_path):
    """Of a model and of one that it is merged into: e4m3 rounds both alike, but for ties, which the
    rounding of the merged weights and of the processor's sums decides."""
    model, batch = model_and_batch("t2v", 1, dim=128, num_heads=2)
    path = write_adapter(tmp_path, model.config)
    r = RolloutConfig(**LEVELS, precision="fp8", lora=str(path))
    schedule, noise, index = schedule_of(r), torch.randn_like(batch.latent), torch.tensor([3])
    merged = merged_with(model, path)
    lora.lend(model, path)
    found = {}
    for name, rollout in {
        "lent": Rollout(model, r, schedule),
        "merged": Rollout(merged, RolloutConfig(**LEVELS, precision="fp8"), schedule),
        "free": Rollout(model, RolloutConfig(**LEVELS, precision="fp8"), schedule),
    }.items():
        with torch.no_grad():
            context = rollout.model.embed_context(batch.text)
            velocity = rollout.stretches(batch, context)()
            found[name] = states_of(velocity, schedule, noise, index)[0][-1].x
    lent, free = (relative(found[name], found["merged"]) for name in ("lent", "free"))
    assert 4 * lent < free


@pytest.mark.parametrize("how", ["full", "offload", "compile"])
def test_no_backward_meets_it(how, tmp_path):
    """Where blocks are recomputed and where they are compiled: the gradient of the graded step alone."""
    blocks = {"full": under("full"), "offload": under(BlockPolicy({"attention"}, {"input"}))}
    model, batch = model_and_batch("t2v", 1)
    path, reward = write_adapter(tmp_path, model.config), tiny_reward(model.config).freeze()
    r = RolloutConfig(**LEVELS, lora=str(path))
    schedule, noise = schedule_of(r), torch.randn_like(batch.latent)
    lora.lend(model, path)
    given = model, reward, schedule, batch, noise, torch.tensor([[0], [2]]), ChainConfig(2)
    found = []
    for run_blocks in (under(), blocks.get(how, under())):
        if found and how == "compile":
            model.compile_blocks("aot_eager")
        for window in graded_windows(*given, Rollout(model, r, schedule).stretches, run_blocks):
            window.backward(window.logit.sum())
        found.append(gradient(model))
    torch.compiler.reset()
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_on_to_the_bit_and_saves_none_of_it(rank, tmp_path, capsys):
    given = {"lora": {"rank": rank}, "eval": {"every": 2, "samples": 1}}
    config = write_run(tmp_path, **given)
    path = write_adapter(tmp_path / "fast", tiny_config())
    levels = ["rollout.sigmas=[0.99, 0.83, 0.6, 0.25]", "rollout.steps=4"]
    given = [*levels, f"rollout.lora={path}", "rollout.max_drift=9"]
    cut, plain = tmp_path / "cut", tmp_path / "plain"
    goes_on(config, *given)
    whole = content(tmp_path / "run/checkpoint-4")
    run("train", config, *levels, "train.steps=1", f"train.out={plain}")
    without = content(plain / "checkpoint-1")
    assert {k: of.keys() for k, of in whole.items()} == {k: of.keys() for k, of in without.items()}
    first = values(tmp_path / "run")[1]
    assert 0.001 < first["train/rollout_drift"] < 9 and first["train/rollout_accelerated"] == 1
    assert first["train/reward"] != values(plain)[1]["train/reward"]
    # Validation is without it unless it is asked for: before the first step the models are the same.
    on = tmp_path / "on"
    run("train", config, *given, "train.steps=1", f"train.out={on}", "eval.rollout_lora=true")
    start = {name: values(tmp_path / name, "eval")[0] for name in ("run", "on", "plain")}
    assert start["run"] == start["plain"]
    assert start["on"]["eval/sft_loss"] == start["plain"]["eval/sft_loss"]
    assert start["on"]["eval/reward_t201"] != start["plain"]["eval/reward_t201"]
    capsys.readouterr()
    shutil.rmtree(path)
    write_adapter(path, tiny_config(), seed=4)
    run("train", config, *given, "train.steps=5", f"train.out={cut}", "train.resume=true", code=2)
    assert one_line(capsys).startswith(f"prfl: rollout.lora: got {str(path)!r}, want what it held when")


def test_a_sample_has_it_where_it_is_asked_for(tmp_path):
    """In addition to lora.path: that of the generator with both merged into its weights."""
    config = write_run(tmp_path)
    own, fast = (write_adapter(tmp_path / n, tiny_config(), seed=i) for i, n in enumerate(("own", "fast")))
    run("merge-lora", tmp_path / "policy", str(own), "--out", str(tmp_path / "one"))
    run("merge-lora", tmp_path / "one", str(fast), "--out", str(tmp_path / "both"))
    both = f"lora.path={own}", f"rollout.lora={fast}"
    cases = {"off": both, "on": (*both, "eval.rollout_lora=true"), "one": [f"model.path={tmp_path}/one"],
             "merged": [f"model.path={tmp_path}/both"]}  # fmt: skip
    made = {}
    for name, given in cases.items():
        run("sample", config, *given, "sample.count=1", "--out", str(tmp_path / "samples" / name))
        made[name] = torch.from_numpy(np.load(tmp_path / "samples" / name / "sample-00.npy"))
    assert relative(made["on"], made["merged"]) < 1e-5 and relative(made["off"], made["one"]) < 1e-5
    assert relative(made["on"], made["off"]) > 0.01


@pytest.mark.parametrize("given, line", [
    ("rollout.lora={}/none", "{}/none: no such file, want a folder with adapter_model.safetensors"),
    ("rollout.lora={}/fast rollout.mode=persistent", "rollout.lora: got '{}/fast', want null with rollout.m"),
    ("rollout.lora={}/fast loss.weight=0", "rollout.lora: got '{}/fast', want null with loss.weight 0"),
    ("rollout.lora={}/fast model.boundary=0.9", "rollout.lora: got '{}/fast', want null with model.boundary"),
    ("rollout.lora={}/wide", "{}/wide: blocks.0.cross_attn.k updates [64, 64], want [32, 32]"),
    ("eval.rollout_lora=true", "eval.rollout_lora: got True, want false without rollout.lora"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, line, tmp_path, capsys):
    for name, dim in (("fast", 32), ("wide", 64)):
        write_adapter(tmp_path / name, tiny_config(dim=dim))
    run("train", write_run(tmp_path), *given.format(tmp_path, tmp_path).split(), code=2)
    assert one_line(capsys).startswith(f"prfl: {line.format(tmp_path)}")
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_it(tmp_path):
    config = write_run(tmp_path, model={"compute_dtype": "bfloat16"})
    save_transformer(tiny_model(tiny_config()), tmp_path / "policy")
    path = write_adapter(tmp_path / "fast", tiny_config(), rank=4)

    def phases(*given):
        c = load_config(config, given)
        return {phase.name: phase for phase in memory(c, find(c, str(config)).setup, None).phases}

    with_it, without = phases(f"rollout.lora={path}"), phases()
    model = tiny_model(tiny_config()).set_precision(torch.bfloat16)
    lora.lend(model, path)
    lent = [m.lent for m in model.modules() if isinstance(m, Linear)]
    want = sum(-(-a.nbytes // 512) * 512 for low in lent for a in low[:2])
    for name, phase in with_it.items():
        told = {e.category: e.bytes for e in phase.entries}
        assert told.get("rollout adapter", 0) == (0 if name == "load" else want)
    worst = "rollout, worst index 1"
    assert with_it[worst].bytes > without[worst].bytes + want
