"""The leash: distances of velocities to the frozen start, their gradient, what they cost, what they stop."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    LiteralUniPC,
    one_line,
    random_batch,
    randomize,
    relative,
    tiny_config,
    tiny_model,
    tiny_reward,
    under,
    write_run,
)
from training_runs import assert_equal, content, goes_on, run, values

from prfl_engine import flow, phases
from prfl_engine.build import load_generator
from prfl_engine.config import ChainConfig, LoraConfig, load_config
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.memory.idle import Idle
from prfl_engine.model import lora
from prfl_engine.model import start as start_module
from prfl_engine.model.checkpoint import load_transformer
from prfl_engine.model.flops import costs
from prfl_engine.model.start import Start
from prfl_engine.objectives import Grader, Grading, anchored_sft_loss
from prfl_engine.planner.command import predict
from prfl_engine.planner.predict import memory
from prfl_engine.planner.subject import find
from prfl_engine.seeds import Purpose, noise_like
from prfl_kernels import extension

SCHEDULE = flow.make_schedule("unipc", 6, 5.0)
INDEX = torch.tensor([3, 1])
KINDS = pytest.mark.parametrize("kind", ["full", "host", "lora"])


def setup(kind, model_type="t2v", config=None):
    """(model, another of its start's weights, its frozen start, reward, batch) in float64; the model has left
    the start already. With LoRA the text embedding has an update, too."""
    config = config or tiny_config(model_type)
    model, plain = tiny_model(config), tiny_model(config).double()
    if kind == "lora":
        lora.attach(model, LoraConfig(rank=2, targets=("q", "v", "o", "ffn.2", "text_embedding.0")))
        for k, p in lora.parameters(model).items():
            torch.nn.init.normal_(p.data, std=0.3, generator=torch.Generator().manual_seed(len(k)))
        model.double()
        start = Start(model)
    else:
        model, frozen = randomize(model.double(), 5), tiny_model(config).double().requires_grad_(False)
        idle = Idle(torch.device("cpu")) if kind == "host" else None
        if idle is not None:
            idle.take(frozen)
        start = Start(frozen, idle)
    reward = tiny_reward(config).double().freeze()
    return model, plain, start, reward, random_batch(config, 2, dtype=torch.float64)


def taken(model):
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


@KINDS
@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_gradient_on_samples_of_flow_matching(kind, policy):
    model, plain, start, _, batch = setup(kind, "i2v")
    noise, sigma = torch.randn_like(batch.latent), torch.tensor([0.3, 0.8], dtype=torch.float64)
    loss, apart = anchored_sft_loss(model, start, batch, noise, sigma, under(policy))
    (loss + 0.7 * apart).sum().backward()
    got = taken(model)
    want, wanted = [], []
    for b in range(2):
        one = slice(b, b + 1)
        x = (1 - sigma[b]) * batch.latent[one] + sigma[b] * noise[one]
        given = x, 1000 * sigma[one]
        v, v0 = (
            m(*given, m.embed_context(batch.text[one], batch.clip[one]), batch.condition[one])
            for m in (model, plain)
        )
        want.append(((v - noise[one] + batch.latent[one]) ** 2).mean())
        wanted.append(((v - v0.detach()) ** 2).mean())
    (sum(want) + 0.7 * sum(wanted)).backward()
    torch.testing.assert_close(torch.stack([loss, apart]), torch.stack([*map(torch.stack, (want, wanted))]))
    assert apart.min() > 1e-3 and relative(got, taken(model)) < 1e-9
    assert start.model is model or all(p.grad is None for p in start.model.parameters())


def by_hand(model, plain, reward, batch, noise, window, weight, guided):
    """(logits, distances) by a literal sampler and autograd through the last steps, which is run."""
    text, scale = guided or (None, 1.0)

    def velocity(m, x, t, b):
        one = slice(b, b + 1)
        v = m(x, t, m.embed_context(batch.text[one]))
        if text is None:
            return v
        with torch.no_grad():
            base = m(x, t, m.embed_context(text[None]))
        return base + scale * (v - base)

    logits, apart = [], []
    for b, index in enumerate(INDEX.tolist()):
        literal, x = LiteralUniPC(SCHEDULE.sigmas.tolist()), noise[b : b + 1]
        for i in range(index + 1):
            with torch.set_grad_enabled(i > index - window):
                t = SCHEDULE.timesteps[i : i + 1]
                v = velocity(model, x, t, b)
                if i == index:
                    apart.append((v - velocity(plain, x, t, b).detach()).square().mean())
                x = literal.step(x, v)
        t = SCHEDULE.timesteps[index + 1 :][:1]
        logits.append(reward(x, t, batch.text[b : b + 1]).squeeze())
    (sum(logits) + weight * sum(apart)).backward()
    return torch.stack([*logits, *apart]).detach()


@KINDS
@pytest.mark.parametrize("window, policy, guided", [(1, "none", True), (2, "full", False), (2, "none", True)])
def test_the_gradient_on_graded_steps(kind, window, policy, guided):
    """The frozen velocity is a constant; where a window has earlier steps, the gradient goes on to them."""
    model, plain, start, reward, batch = setup(kind)
    noise, text = torch.randn_like(batch.latent), torch.randn(3, model.config.text_dim).double()
    guidance = Guidance(text, Scales(3, 3, 0), Scales(3, 3, 0)) if guided else None
    grader = Grader(model, reward, SCHEDULE, ChainConfig(window), None, under(policy), guidance=guidance)
    (graded,) = Grading(grader, batch, start).windows(noise, INDEX[None])
    found = torch.cat([graded.logit, graded.distance]).detach()
    graded.backward((graded.logit + 50 * graded.distance).sum())
    assert not graded.distance.requires_grad
    got = taken(model)
    want = by_hand(model, plain, reward, batch, noise, window, 50, guided and (text, 3.0))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    assert relative(got, want_gradient := taken(model)) < 1e-9
    by_hand(model, plain, reward, batch, noise, window, 0, guided and (text, 3.0))
    assert relative(taken(model), want_gradient) > 1e-2


def test_compiled_blocks_compute_without_their_updates():
    model, plain, start, _, batch = setup("lora")
    model.float().compile_blocks("eager")
    batch = batch._replace(latent=batch.latent.float(), text=batch.text.float())
    given = batch, torch.randn_like(batch.latent), torch.tensor([0.3, 0.8])
    loss, apart = anchored_sft_loss(model, start, *given)
    want, zero = anchored_sft_loss(plain.float(), start, *given)
    assert apart.min() > 1e-3 and zero.max() < 1e-9 and (loss - want).abs().min() > 1e-4


def test_what_the_distance_costs():
    """A forward of every graded sample and no more, which counts as one without gradient."""
    model, _, start, reward, batch = setup("full")
    grader, noise = Grader(model, reward, SCHEDULE, ChainConfig(2)), torch.randn_like(batch.latent)

    def work(start):
        with phases.timed(torch.device("cpu")) as clock:
            (graded,) = Grading(grader, batch, start).windows(noise, torch.tensor([[3, 3]]))
            graded.backward(graded.logit.sum())
            return {name: n for (name, _), n in clock.lap().work.items()}

    free, leashed = work(None), work(start)
    assert leashed.pop("rollout") == free.pop("rollout") + 2 and leashed == free


LORA = ("lora.rank=2",)


@pytest.mark.parametrize("given", [(), LORA], ids=["full", "lora"])
def test_a_measurement_changes_nothing_to_the_bit(given, tmp_path, monkeypatch):
    config = write_run(tmp_path, train={"steps": 4})
    run("train", config, *given, "loss.anchor_every=2", "optim.clip_each=true")
    plain = tmp_path / "plain"
    with monkeypatch.context() as patch:
        patch.setattr(start_module.Start, "__init__", None)  # is not made
        run("train", config, *given, "optim.clip_each=true", f"train.out={plain}")
    assert_equal(content(tmp_path / "run/checkpoint-4"), content(plain / "checkpoint-4"))
    found, free = values(tmp_path / "run"), values(plain)
    for step, logged in found.items():
        more = {"train/anchor", "train/sft_anchor"} if step % 2 == 0 else set()
        assert logged.keys() - free[step].keys() == more and all(logged[name] > 0 for name in more)
        assert {k: v for k, v in logged.items() if k not in more} == free[step]


@pytest.mark.parametrize("settings", [
    [], ["loss.anchor_place=host"], [*LORA], [*LORA, "rollout.mode=persistent"],
], ids=["full", "host", "lora", "persistent"])  # fmt: skip
def test_a_resumed_run_has_the_start_of_its_first_step(settings, tmp_path):
    config = write_run(tmp_path, loss={"anchor": 0.5})
    goes_on(config, *settings, "train.accumulate=2", "chain.window=2")
    found = values(tmp_path / "run")
    for name in ("train/anchor", "train/sft_anchor"):
        assert found[1][name] == 0 < found[2][name]


def test_the_loss_of_a_run_is_the_sum_of_its_parts(tmp_path):
    """The gradients of two micro-batches, in a run that has left its start, are linear in the weight of the
    leash, and the other losses are what they were."""
    config = write_run(tmp_path, loss={"weight": 0.2}, optim={"weight_decay": 0.0, "clip": 1e9})
    run("train", config, *LORA, "train.steps=1", "optim.lr=1e-2")
    start = [*LORA, f"lora.path={tmp_path / 'run/checkpoint-1'}", "train.accumulate=2", "optim.lr=0"]
    grads, logged = {}, {}
    for weight in (0, 3, 6):
        out = tmp_path / str(weight)
        run("train", config, *start, f"loss.anchor={weight}", f"train.out={out}", "train.steps=1")
        state = torch.load(out / "checkpoint-1/training_state.pt", weights_only=True)["optimizer"]["state"]
        grads[weight] = torch.cat([s["exp_avg"].flatten().double() for s in state.values()])
        logged[weight] = values(out)[1]
    assert relative(grads[6] - grads[3], grads[3] - grads[0]) < 1e-4
    assert relative(grads[3], grads[0]) > 1e-3 and logged[3] != logged[0]
    for name in ("train/reward_loss", "train/sft_loss", "train/reward"):
        assert logged[0][name] == logged[6][name]


def test_a_step_of_descent_by_the_leash_alone_leads_back(tmp_path):
    """From an adapter that moved away, trained by little more than the leash."""
    config = write_run(tmp_path)
    run("train", config, *LORA, "train.steps=3", "optim.lr=2e-2")
    moved = f"lora.path={tmp_path / 'run/checkpoint-3'}"
    out, alone = tmp_path / "back", ("loss.sft_weight=1e-6", "loss.weight=0", "loss.anchor=1")
    run("train", config, *LORA, moved, *alone, f"train.out={out}", "train.steps=12", "optim.lr=1e-2")
    found = [v["train/sft_anchor"] for v in values(out).values()]
    assert sum(found[-3:]) < 0.5 * sum(found[:3])


@pytest.mark.parametrize("given", [LORA, ["loss.anchor_every=50"]], ids=["lora", "copy"])
def test_a_validation_has_the_distance_where_the_start_is_there(given, tmp_path):
    """On held-out latents in several batches, at the fixed noise and levels of the flow-matching loss."""
    config = write_run(tmp_path, eval={"every": 1, "samples": 3, "batch_size": 2})
    run("train", config, "train.steps=1", "optim.lr=1e-2", *given)
    found = values(tmp_path / "run", "eval")
    assert found[0]["eval/sft_anchor"] == 0 < found[1]["eval/sft_anchor"]
    c = load_config(config, given)
    trained = replace(c.lora, path=str(tmp_path / "run/checkpoint-1")) if c.lora.rank else c.lora
    path = c.model.path if c.lora.rank else str(tmp_path / "run/checkpoint-1")
    made = replace(c, lora=trained, model=replace(c.model, path=path))
    models = load_transformer(c.model.path), load_generator(made, torch.device("cpu"))
    apart = []
    for i, name in enumerate(read_lists(c.data.val, "data.val")):
        (batch,) = fixed_batches(Reader(models[0].config), [name], 1, torch.device("cpu"))
        sigma = torch.tensor([flow.shift_sigma((i + 0.5) / 3, c.rollout.shift)])
        noise = noise_like(batch.latent, Purpose.VALIDATION_SFT, c.eval.seed, i)
        x = (1 - sigma) * batch.latent + sigma * noise
        with torch.no_grad():
            first, second = (m(x, 1000 * sigma, m.embed_context(batch.text)) for m in models)
        apart.append((first - second).square().mean().item())
    assert found[1]["eval/sft_anchor"] == pytest.approx(sum(apart) / 3, rel=1e-3)
    plain = f"train.out={tmp_path / 'plain'}"
    run("train", config, "train.steps=1", "lora.rank=0", plain)
    assert "eval/sft_anchor" not in values(tmp_path / "plain", "eval")[0]


def test_a_run_that_goes_too_far_saves_and_ends(tmp_path, capsys):
    config = write_run(tmp_path, loss={"anchor": 1e-3}, train={"steps": 50, "save_every": 50})
    run("train", config, "train.stop_anchor=0.03")
    found = values(tmp_path / "run")
    *within, last, _ = [max(v["train/anchor"], v["train/sft_anchor"]) for v in found.values()]
    assert max(within) <= 0.03 < last and 4 <= len(found) < 50
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("prfl: train.stop_anchor: ") and f"of step {len(found) - 1} is " in said
    assert f"checkpoint-{len(found)} is the last good checkpoint, train.resume=true goes on" in said
    assert (tmp_path / f"run/checkpoint-{len(found)}").is_dir()


@pytest.mark.parametrize("given, line", [
    ("train.stop_anchor=1", "train.stop_anchor: got 1.0, want null without loss.anchor and"),
    ("loss.anchor=1 loss.anchor_every=2", "loss.anchor_every: got 2, want 0 with loss.anchor"),
    ("loss.anchor_place=host", "loss.anchor_place: got 'host', want device without loss.anchor"),
    ("loss.anchor=1 loss.anchor_place=host lora.rank=2", "loss.anchor_place: got 'host', want device with"),
    ("loss.anchor=1 model.boundary=0.9", "model.boundary: got 0.9, want null, or LoRA, with loss.anchor"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, line, tmp_path, capsys):
    run("train", write_run(tmp_path), *given.split(), code=2)
    assert one_line(capsys).startswith(f"prfl: {line}")


built = pytest.mark.skipif(extension.absence("cpu", "cpu") is not None, reason="the kernels are not built")


@built
@pytest.mark.parametrize("given", [[], ["loss.anchor_place=host"], LORA], ids=["full", "host", "lora"])
def test_a_plan_counts_the_frozen_start(given, tmp_path, monkeypatch):
    """Standing bytes, the peak of a step, and host memory, against a run."""
    from plan_runs import configuration, measured

    path = configuration(tmp_path, 1)
    given = ["loss.anchor=0.5", "lora.rank=0", "model.weights_dtype=float32", "loss.weight=0.1", *given]
    path.write_text(load_config(path, given).to_yaml())
    config = load_config(path)
    found = memory(config, find(config, str(path), on_cpu=True).setup, None)
    free = load_config(path, ["loss.anchor=0", "loss.anchor_place=device"])
    less = memory(free, find(free, str(path), on_cpu=True).setup, None)
    told = {phase.name: phase.bytes for phase in found.phases}
    steps = [told[name] for name in told if name.startswith(("rollout", "graded", "reward", "flow"))]
    real = measured(path, monkeypatch)
    assert 0.995 * real.training <= max(steps) <= 1.01 * real.training
    assert found.host.bytes >= real.host
    more = found.phases[-1].bytes - less.phases[-1].bytes
    weights = sum(e.bytes for e in less.phases[-1].entries if e.category == "weights")
    kind = "lora" if config.lora.rank else config.loss.anchor_place
    away = found.host.bytes - less.host.bytes
    assert more + away == (0 if kind == "lora" else weights) and (away > 0) == (kind == "host")


@pytest.mark.parametrize("given, forwards", [(["loss.anchor=1"], 2), (["loss.anchor_every=4", *LORA], 0.5)])
def test_a_plan_counts_the_forwards_of_the_start(given, forwards, tmp_path):
    """Beside the mean half of a forward of a rollout of three steps."""
    rows = {row.phase: row for row in predict(str(write_run(tmp_path)), given).times.rows}
    assert rows["frozen start"].seconds == pytest.approx(forwards / 0.5 * rows["rollout"].seconds)
    assert rows["frozen start"].flops == pytest.approx(forwards / 0.5 * rows["rollout"].flops)


def test_a_plan_counts_the_forward_of_a_validation(tmp_path):
    path = str(write_run(tmp_path, eval={"every": 1, "samples": 3}))

    def flops(*given):
        return next(row.flops for row in predict(path, given).times.rows if row.phase == "validation")

    one = 3 * costs(tiny_config(), (1, 4, 4)).flops["rollout"]
    assert flops(*LORA) - flops() == pytest.approx(one)
    assert flops("loss.anchor=1") - flops() == pytest.approx(one)
    assert flops("loss.anchor=1", "loss.anchor_place=host") == flops()
