"""Both experts of Wan2.2 A14B in one chain: against plain code in float64, idle on the host, in runs."""

import pytest
import torch
from helpers import (
    LiteralUniPC,
    one_line,
    random_batch,
    relative,
    rows,
    tiny_config,
    tiny_model,
    tiny_reward,
    write_run,
)
from safetensors.torch import load_file
from training_runs import NAME, goes_on, run, values

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.config import ChainConfig
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.memory.idle import Idle
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.model.experts import HIGH, LOW, Experts
from prfl_engine.objectives import Grader, Grading, bind, sft_loss

BOUNDARY = 0.875
SCHEDULE = flow.make_schedule("unipc", 8, 5.0)  # the first four steps are the high-noise expert's
CPU = torch.device("cpu")


def pair(kind="t2v", idle=False, frozen=(), dtype=torch.float64):
    made = [tiny_model(tiny_config(kind), seed).to(dtype) for seed in (0, 7)]
    bring = Idle(CPU) if idle else None
    for i, model in enumerate(made):
        model.requires_grad_(i not in frozen)
        if idle:
            bring.take(model)
    return Experts(*made, BOUNDARY, bring)


def test_the_steps_of_either_expert():
    assert (SCHEDULE.timesteps >= 875).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("idle", [False, True])
def test_every_sample_is_asked_of_its_own_expert(idle):
    experts = pair("i2v-a14b", idle, frozen=(0, 1))
    batch, t = random_batch(experts.config, 4, dtype=torch.float64), torch.tensor([999.0, 874.0, 20.0, 875.0])
    whole = pair("i2v-a14b")
    with torch.no_grad():
        got = bind(experts, batch)(batch.latent, t, torch.arange(4))
        for b, model in enumerate((whole.high, whole.low, whole.low, whole.high)):
            one = rows(batch, slice(b, b + 1))
            want = model(one.latent, t[b : b + 1], model.embed_context(one.text), one.condition)
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("idle, frozen", [(False, ()), (True, (1,)), (True, (0,))])
@pytest.mark.parametrize("window, index", [(3, (5, 3)), (1, (4, 3))])
def test_a_window_across_the_boundary_has_the_gradient_of_plain_code(window, index, idle, frozen):
    """Guided, with a scale for each expert, 1 too; the sampler's history goes through. A frozen one gets
    none."""
    above = 1 if idle else 4
    config = tiny_config()
    experts, reward = pair(idle=idle, frozen=frozen), tiny_reward(config).double().freeze()
    batch, scales = random_batch(config, 2, dtype=torch.float64), Scales(above, 3, 1000 * BOUNDARY)
    guidance = Guidance(torch.randn(3, config.text_dim, dtype=torch.float64), scales, scales, gradient=True)
    noise = torch.randn_like(batch.latent)
    grader = Grader(experts, reward, SCHEDULE, ChainConfig(window), guidance=guidance)
    (graded,) = Grading(grader, batch).windows(noise, torch.tensor([index]))
    graded.backward(graded.logit.sum())
    whole, logits = pair(frozen=frozen), []
    for b, last in enumerate(index):
        literal, x, text = LiteralUniPC(SCHEDULE.sigmas.tolist()), noise[b : b + 1], batch.text[b : b + 1]
        for i in range(last + 1):
            t = SCHEDULE.timesteps[i : i + 1]
            model, scale = (whole.high, above) if t >= 875 else (whole.low, 3)
            with torch.set_grad_enabled(i > last - window):
                v, base = (model(x, t, model.embed_context(a)) for a in (text, guidance.text[None]))
                x = literal.step(x, base + scale * (v - base))
        logits.append(reward(x, SCHEDULE.timesteps[last + 1 :][:1], text))
    torch.testing.assert_close(graded.logit, torch.cat(logits).detach(), rtol=1e-9, atol=1e-9)
    torch.cat(logits).sum().backward()
    wanted = dict(whole.named_parameters())
    for name, p in experts.named_parameters():
        want = wanted[name].grad
        assert (p.grad is None) == (want is None), name
        if want is not None and ".k.bias" not in name:  # whose true gradient is 0
            assert relative(p.grad, want) < 1e-8, name
    touched = {name.split(".")[0] for name, p in experts.named_parameters() if p.grad is not None}
    both = {"high", "low"} if window == 3 or index == (4, 3) else {"high"}
    assert touched == both - {("high", "low")[i] for i in frozen}


def test_one_transfer_at_the_switch():
    """The blocks of one expert alone are there, in turn; an absent one holds no memory, and NaN."""
    experts = pair(idle=True, frozen=(0, 1))
    batch, moved, bring = random_batch(experts.config, dtype=torch.float64), [], experts.bring
    come = bring._come
    bring._come = lambda i: (moved.append(i), come(i))
    with torch.no_grad():
        got = chain.sample(bind(experts, batch), SCHEDULE, batch.latent)
        want = chain.sample(bind(pair(), batch), SCHEDULE, batch.latent)
    assert torch.equal(got, want)
    assert moved == [0, 1] and bring.here == {1}
    weights = [next(model.blocks.parameters()) for model in (experts.high, experts.low)]
    assert weights[0].isnan().all() and weights[0].untyped_storage().nbytes() == 8
    assert weights[1].isfinite().all()
    assert bring.nbytes == sum(p.nbytes for e in (experts.high, experts.low) for p in e.blocks.parameters())


class Lazy:
    """Copies that are made when they are awaited and no earlier, as on the slowest link."""

    def __init__(self):
        self.under_way, self.waited = {}, []

    def queued(self):
        return None

    def copy(self, pairs, *after):
        key = len(self.under_way)
        self.under_way[key] = list(pairs)
        return key

    def await_copy(self, key):
        if key is not None and self.under_way[key]:
            self.waited.append(key)
            for target, source in self.under_way[key]:
                target.copy_(source)
            self.under_way[key] = []


def test_a_block_waits_for_its_own_part_of_the_transfer():
    """So the forward after the switch runs beside the transfer of the blocks to come."""
    experts, seen = pair(idle=True, frozen=(0, 1)), []
    experts.bring.copies = lazy = Lazy()
    for expert in (experts.high, experts.low):
        for block in expert.blocks:
            block.register_forward_hook(lambda *_: seen.append(len(lazy.waited)))
    batch = random_batch(experts.config, dtype=torch.float64)
    with torch.no_grad():
        got = chain.sample(bind(experts, batch), SCHEDULE, batch.latent)
        want = chain.sample(bind(pair(), batch), SCHEDULE, batch.latent)
    assert torch.equal(got, want)
    assert seen == [1, *[2] * 7, 3, *[4] * 7]  # after every block of four steps of each expert
    with torch.no_grad():  # what has not been awaited has arrived before its memory is given away
        experts.bring({0})
        experts.bring({1})
    assert not any(lazy.under_way[key] for key in range(6))


@pytest.mark.gpu
def test_on_a_gpu():
    """The same samples with an idle expert, in the memory of one."""
    device, found = torch.device("cuda"), []
    for idle in (False, True):
        made = [tiny_model(tiny_config(dim=256, ffn_dim=1024), seed).to(device) for seed in (0, 7)]
        bring = Idle(device) if idle else None
        for model in made:
            model.requires_grad_(False)
            if idle:
                bring.take(model)
        experts = Experts(*made, BOUNDARY, bring)
        noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
        text = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1)).to(device)
        with torch.no_grad():
            found.append(chain.sample(bind(experts, Batch(noise, text)), SCHEDULE, noise).cpu())
    assert torch.equal(*found)


def test_flow_matching_trains_the_expert_of_the_level():
    experts = pair()
    batch = random_batch(experts.config, 2, dtype=torch.float64)
    for sigma, trained in ((0.9, "high"), (0.5, "low")):
        loss = sft_loss(experts, batch, torch.randn_like(batch.latent), torch.tensor([sigma, sigma]))
        loss.sum().backward()
        found = {k.split(".")[0] for k, p in experts.named_parameters() if p.grad is not None}
        assert found == {trained}
        experts.zero_grad()


# Whole runs.


def written(tmp_path, **sections):
    """A configuration with both experts in one folder."""
    sections.setdefault("model", {}).update(path=str(tmp_path / "pair"), boundary=BOUNDARY)
    sections.setdefault("rollout", {}).update(shift=5.0, steps=8)
    config = write_run(tmp_path, **sections)
    for folder, seed in ((HIGH, 0), (LOW, 7)):
        save_transformer(tiny_model(tiny_config(), seed), tmp_path / "pair" / folder)
    return config


HIGH_ALONE, LOW_ALONE = "rollout.sigma_range=[0.875, 1]", "rollout.sigma_range=[0, 0.875]"


@pytest.mark.parametrize("given, trained", [
    ((), {HIGH, LOW}), ((HIGH_ALONE,), {HIGH}), ((LOW_ALONE,), {LOW}),
    ((LOW_ALONE, "rollout.start=data", "rollout.mode=persistent"), {LOW}),
    (("lora.rank=2", "model.idle=host", "rollout.seeds=2"), {HIGH, LOW}),
    (("lora.rank=2", "model.idle=host", HIGH_ALONE, "rollout.mode=persistent"), {HIGH}),
])  # fmt: skip
def test_a_run_of_a_pair_goes_on_to_the_bit(given, trained, tmp_path):
    """A checkpoint holds what is trained. A validation samples whole chains, whatever is trained."""
    config = written(tmp_path, train={"ema": 0.9}, eval={"every": 2})
    goes_on(config, *given)
    last = tmp_path / "run/checkpoint-4"
    assert {p.name for p in last.iterdir() if p.name in (HIGH, LOW)} == trained
    names = {"eval/sft_loss", "eval/reward_t201", "eval/reward_t1000", "eval/score"}
    names |= {"eval/sft_anchor"} if "lora.rank=2" in given else set()
    assert values(tmp_path / "run", "eval")[4].keys() == names


def test_where_the_idle_expert_waits_changes_nothing(tmp_path):
    config = written(tmp_path, eval={"every": 2})
    for idle in ("device", "host"):
        run("train", config, "lora.rank=2", f"model.idle={idle}", f"train.out={tmp_path / idle}")
    assert values(tmp_path / "device") == values(tmp_path / "host")
    assert values(tmp_path / "device", "eval") == values(tmp_path / "host", "eval")


def test_samples_with_both_and_their_adapters(tmp_path):
    """From one folder, or from two; an adapter of either alone changes the sample, and in its own steps."""
    config, found = written(tmp_path), {}
    run("train", config, "lora.rank=2", "optim.lr=0.1", "train.steps=4")
    for name in (HIGH, LOW):
        (tmp_path / f"only-{name}" / name).parent.mkdir()
        (tmp_path / f"only-{name}" / name).symlink_to(tmp_path / "run/checkpoint-4" / name)
    two = [f"model.path={tmp_path / 'pair' / HIGH}", f"model.low={tmp_path / 'pair' / LOW}"]
    for name, more in {
        "one": [], "two": [*two, "model.idle=host"], "both": [f"lora.path={tmp_path / 'run/checkpoint-4'}"],
        HIGH: [f"lora.path={tmp_path / f'only-{HIGH}'}"], LOW: [f"lora.path={tmp_path / f'only-{LOW}'}"],
    }.items():  # fmt: skip
        run("sample", config, "sample.count=1", *more, "--out", str(tmp_path / "samples" / name))
        found[name] = (tmp_path / "samples" / name / "sample-00.npy").read_bytes()
    assert found["one"] == found["two"]
    assert len({found[name] for name in ("one", "both", HIGH, LOW)}) == 4


def test_only_what_is_trained_changes(tmp_path):
    config = written(tmp_path)
    run("train", config, HIGH_ALONE, "train.steps=1", "optim.lr=0.01")
    before = load_file(tmp_path / "pair" / HIGH / NAME)
    after = load_file(tmp_path / "run/checkpoint-1" / HIGH / NAME)
    assert all(not torch.equal(after[k], before[k]) for k in before if not k.endswith("k.bias"))
    # The best one with the low-noise expert that it was trained with.
    run("sample", config, f"model.path={tmp_path / 'run/checkpoint-1' / HIGH}",
        f"model.low={tmp_path / 'pair' / LOW}", "--out", str(tmp_path / "samples"))  # fmt: skip


@pytest.mark.parametrize("given, line", [
    (["model.boundary=null"], "pair: got two experts of Wan2.2 A14B"),
    ([f"model.path={'{}'}/policy"], "model.path: {}/policy: got no high_noise_model and low_noise_model"),
    (["rollout.cache=0.1"], "rollout.cache: got 0.1, want 0 with model.boundary"),
    (["rollout.precision=fp8"], "rollout.precision: got 'fp8', want same with model.boundary"),
    (["rollout.cuda_graph=true"], "rollout.cuda_graph: got True, want false with model.boundary"),
    (["model.boundary=null", "model.idle=host"], "model.idle: got 'host', want device without"),
    (["model.boundary=null", "model.low=x"], "model.low: got 'x', want null without model.boundary"),
    (["lora.rank=2", "lora.path={}"], "lora.path: got '{}', want a folder with high_noise_model or low"),
])  # fmt: skip
def test_what_a_pair_is_refused_with(given, line, tmp_path, capsys):
    run("train", written(tmp_path), *(g.replace("{}", str(tmp_path)) for g in given), code=2)
    assert line.replace("{}", str(tmp_path)) in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_experts_of_different_structure_are_refused(tmp_path, capsys):
    config = written(tmp_path)
    save_transformer(tiny_model(tiny_config(num_layers=1)), tmp_path / "other")
    run("train", config, f"model.path={tmp_path / 'pair' / HIGH}", f"model.low={tmp_path / 'other'}", code=2)
    assert "model.low: got " in one_line(capsys)


@pytest.mark.parametrize("given", [(), (HIGH_ALONE,)], ids=["both", "high"])
def test_the_leash_of_a_pair_with_updates(given, tmp_path):
    """From a start of distance 0, which is the start of the resumed run, too."""
    config = written(tmp_path, lora={"rank": 2}, loss={"anchor": 0.5}, model={"idle": "host"})
    run("train", config, *given, "train.steps=4", "train.save_every=2")
    cut = f"train.out={tmp_path / 'cut'}"
    run("train", config, *given, "train.steps=2", "train.save_every=2", cut)
    run("train", config, *given, "train.steps=4", "train.save_every=2", cut, "train.resume=true")
    found = values(tmp_path / "run")
    assert found == values(tmp_path / "cut")
    for name in ("train/anchor", "train/sft_anchor"):
        assert found[1][name] == 0 < found[4][name]
