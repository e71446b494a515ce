"""The planner: bytes against real steps and full dry runs, and the search against brute force."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from helpers import one_line, random_batch, tiny_config, tiny_model, tiny_reward, under, write_run

from prfl_engine import cli, flow
from prfl_engine.config import ChainConfig, Config, ModelConfig, RolloutConfig, UserError, from_dict
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import BlockPolicy, named, of_config
from prfl_engine.objectives import graded_windows, sft_loss
from prfl_engine.planner import dry_run as dry_runs
from prfl_engine.planner import plan as plan
from prfl_engine.planner import search as search
from prfl_engine.planner import seconds
from prfl_engine.planner.dry_run import SCALARS, dry_run
from prfl_engine.planner.meta import call
from prfl_engine.planner.numbers import Numbers
from prfl_engine.planner.setup import RewardSetup, Setup, Validation
from prfl_kernels import extension

LATENT = (1, 16, 3, 8, 8)
ROLLOUT = RolloutConfig(steps=8)
SETUP = Setup(tiny_config(num_layers=5), LATENT, torch.float32, reward=RewardSetup(2), rollout=ROLLOUT)
NAMES = ("none", "attention", "offload attention, input", "offload input")
built = pytest.mark.skipif(extension.absence("cpu", "cpu") is not None, reason="the kernels are not built")


@pytest.fixture(scope="module")
def kinds():
    return plan.make_kinds(SETUP, seconds.Rates(), {}, NAMES)


def test_bytes_scale_exactly_from_one_kind_at_a_time(kinds):
    """Mixed lists of other lengths, against dry runs of all of their blocks: the whole and every block. In
    the first list what is on its way to the host decides, in the forward of a block that keeps everything."""
    picks, (none, _, away, _) = random.Random(0), kinds
    for blocks in ([away, away, none, none], *(picks.choices(kinds, k=count) for count in (3, 7, 8))):
        count, reward = len(blocks), picks.choice(kinds)
        full = dry_run(replace(SETUP, blocks=count), [k.policy for k in blocks], reward.policy)
        assert plan.predicted_peak(blocks, reward) == max(laps.peak for laps in full.values())
        for phase, laps in full.items():
            kept, before = 0, None
            for i, kind in enumerate(blocks):
                more, peak = kind.block(phase, before, i == count - 1)
                found = max(laps.forward[i + 1], laps.backward[count - i]) - laps.base
                assert kept + peak == (max(found, laps.before, laps.after) if before is None else found)
                kept, before = kept + more, kind


def test_setups_with_the_same_blocks_have_one_dry_run(monkeypatch):
    """Whatever their validations are; not where anything of a block differs."""
    made, setup = [], replace(SETUP, config=replace(SETUP.config, text_len=7))
    monkeypatch.setattr(dry_runs, "dry_run", lambda *given: made.append(given) or dry_run(*given))
    first = plan.make_kind("", named("full"), setup, seconds.Rates())
    again = plan.make_kind("", named("full"), replace(setup, validation=Validation(LATENT)), seconds.Rates())
    assert first == again and len(made) == 1
    for other, policy in ((setup, named("none")), (replace(setup, chunk=7), named("full"))):
        plan.make_kind("", policy, other, seconds.Rates())
    assert len(made) == 3


@built
@pytest.mark.parametrize("name, window, first_frame", [
    ("none", 1, False), ("offload attention, input", 3, False), ("none", 1, True),
])  # fmt: skip
def test_a_dry_run_counts_the_bytes_of_a_real_step(name, window, first_frame):
    """Real tensors and kernels, the states of sampler and window included; scalars are rounded up."""
    policy, setup = plan.KINDS[name], replace(SETUP, chain=ChainConfig(window=window))
    if first_frame:
        setup = replace(setup, config=replace(setup.config, model_type="ti2v"), first_frame=True)
    model, reward = tiny_model(setup.config), tiny_reward(setup.config, blocks=2, num_heads=8).freeze()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    batch = random_batch(SETUP.config, 1, LATENT[1:], SETUP.config.text_len)
    batch = batch._replace(condition=batch.latent[:, :, :1].clone() if first_frame else None)
    noise, t = torch.randn(LATENT), torch.tensor([0.5])
    schedule = flow.make_schedule("unipc", 8, 5.0)

    def graded():
        given = schedule, batch, noise, torch.tensor([[6]]), setup.chain
        how = dict(run_blocks=under(policy), score_blocks=under(policy))
        for graded in graded_windows(model, reward, *given, **how):
            graded.backward(torch.sigmoid(graded.logit).sum())
            del graded

    def sft():
        sft_loss(model, batch, noise, t, under(policy)).mean().backward()

    phases = {"flow matching": sft, "graded step": graded}
    want = dry_run(setup, [policy] * 5, policy)
    for phase, run in phases.items():
        run()  # tables of angles are made once
        live = LiveBytes(512)
        live.add([*model.parameters(), *reward.parameters(), *(p.grad for p in model.parameters())])
        base = live.now
        live.add([batch.latent, batch.text, noise, t, *([batch.condition] if first_frame else [])])
        with live:
            run()
        real = live.peak - base
        assert real <= want[phase].peak <= 1.01 * real + SCALARS, phase


def test_results_that_a_dry_run_allocates_itself_are_those_of_torch():
    """Shapes, dtypes and strides on the meta device; what is written in place; numbers of real tensors."""
    aten, wide, row = torch.ops.aten, torch.empty(2, 5, 6, device="meta"), torch.empty(6, device="meta")
    low, weight = wide.bfloat16(), torch.empty(7, 6, device="meta")
    cases = [(aten.linear.default, wide, weight, weight[:, 0])]
    cases += [(aten.linear.default, low, weight.bfloat16())]
    pairs = [(wide, row), (low, row), (low, 2.5), (row, wide), (wide[:, :1], row), (low, wide)]
    pairs += [(wide.mT, wide.mT)]
    cases += [(f, a, b) for f in (aten.mul.Tensor, aten.add.Tensor) for a, b in pairs]
    for func, *args in cases:
        got, want = call(func, tuple(args), {}), func(*args)
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), (func, args)
    into = torch.empty(5, 7, device="meta")
    assert call(aten.addmm_.default, (into, wide[0], weight.mT), {}) is into
    assert call(aten.add.Tensor, (torch.ones(2), 1), {}).tolist() == [2, 2]


def test_a_plan_is_that_of_brute_force(kinds):
    """Every list of four kinds before every kind of reward model, over a range of budgets, with and without a
    limit on the host."""
    setup, every = replace(SETUP, blocks=3), []
    for *blocks, reward in itertools.product(kinds, repeat=4):
        away = sum(b.host for b in blocks[:-1]) + reward.host * (setup.reward_blocks - 1)
        cost = sum(b.cost for b in blocks) + reward.reward_cost
        every.append((cost, away, plan.predicted_peak(blocks, reward)))
    peaks, hosts = sorted(peak for *_, peak in every), sorted(away for _, away, _ in every)
    for budget in (peaks[0], *peaks[1::23], peaks[-1]):
        for host in (hosts[len(hosts) // 3], float("inf")):
            fitting = [v for v in every if v[2] <= budget and v[1] <= host]
            if not fitting:
                with pytest.raises(UserError, match="want at least auto"):
                    plan.choose(kinds, setup, budget, host)
                continue
            made = plan.choose(kinds, setup, budget, host)
            assert (round(1e12 * made.seconds), made.host, made.bytes) == min(fitting)
            assert made.bound == made.seconds and "of all lists the fastest" in str(made)


def test_a_plan_fits_its_budget_and_a_larger_one_is_no_slower(kinds):
    last, peaks = float("inf"), {k.name: plan.predicted_peak([k] * 5, k) for k in kinds}
    for budget in (min(peaks.values()), 1.05 * min(peaks.values()), peaks["attention"], peaks["none"]):
        made = plan.choose(kinds, SETUP, budget)
        assert made.bytes <= budget and made.seconds <= last
        last = made.seconds
        assert all(f"{c.name} " in str(made) for c in made.table)
    assert made.policies == [plan.KINDS["none"]] * 5
    assert plan.choose(kinds, SETUP, peaks["attention"], host=0).host == 0


@pytest.mark.parametrize("scale", [1, 1_234_567])
def test_a_budget_that_nothing_fits_is_refused_with_the_smallest_that_fits(kinds, scale):
    kinds = [
        replace(k, numbers={p: Numbers(*(scale * v for v in n)) for p, n in k.numbers.items()}) for k in kinds
    ]
    with pytest.raises(UserError, match=r"model.recompute: got auto:1e-05, want at least auto:") as e:
        plan.choose(kinds, SETUP, 1e4)
    least = float(str(e.value).split("at least auto:")[1].split(":")[0])
    assert plan.choose(kinds, SETUP, least * 1e9).bytes <= least * 1e9
    with pytest.raises(UserError):
        plan.choose(kinds, SETUP, least * 1e9 - 1001)


def test_a_validation_that_does_not_fit_is_refused_with_the_largest_batch_that_does(kinds, monkeypatch):
    """And where no batch does, with the budget of a single sample. Policies have no part in it."""
    monkeypatch.setattr(plan, "make_kinds", lambda *_: kinds)
    shape = 16, 3, 16, 24
    sizes = {n: replace(SETUP, validation=Validation((n, *shape), scored=False)) for n in (1, 2, 5)}
    needed = {n: plan.validation_bytes(s) for n, s in sizes.items()}
    with pytest.raises(UserError, match="eval.batch_size: got batches of 5, want at most 2: validation"):
        plan.plan(sizes[5], needed[2])
    made = plan.plan(sizes[2], needed[2])
    assert made.validation == needed[2] and "validation  " in str(made)
    with pytest.raises(UserError, match="want at least auto:.*, or eval.every=0: validation with") as e:
        plan.plan(sizes[5], needed[1] - 1)
    least = float(str(e.value).split("at least auto:")[1].split(",")[0])
    assert needed[1] <= least * 1e9 <= needed[1] + 1000
    with pytest.raises(UserError, match="the leanest policies and validation need that much") as e:
        plan.plan(sizes[5], 1.0)
    assert float(str(e.value).split("at least auto:")[1].split(":")[0]) * 1e9 >= needed[5]


def test_branches_that_are_run_again_keep_what_the_configuration_says():
    made = plan.kinds_of(replace(SETUP, keep="nothing"))
    assert {policy.rerun for policy in made.values()} == {"nothing"}
    held = {name: (p.keep, p.offload) for name, p in made.items()}
    assert held == {name: (p.keep, p.offload) for name, p in plan.KINDS.items()}
    lean, usual = (
        seconds.recomputed(replace(plan.KINDS["attention"], rerun=mode), SETUP, seconds.Rates())
        for mode in ("nothing", "all")
    )
    assert lean > usual


def test_kinds_that_all_move_something_want_that_much_of_the_host(kinds):
    """Five blocks and two of the reward model, of which the last one of each stays."""
    away = kinds[2:3]
    with pytest.raises(UserError, match="model.host: got 0, want at least .*offload attention, input") as e:
        plan.choose(away, SETUP, 1e9, 0)
    least = float(str(e.value).split("at least ")[1].split(":")[0])
    assert 5 * away[0].host < least * 1e9 <= 5 * away[0].host + 1000
    assert plan.choose(away, SETUP, 1e9, least * 1e9).host == 5 * away[0].host


def test_a_plan_without_a_proof_says_how_far_off_it_may_be(kinds, monkeypatch):
    monkeypatch.setattr(search, "WIDTHS", (1,))
    setup = replace(SETUP, blocks=8)
    least = min(plan.predicted_peak([k] * 8, k) for k in kinds)
    budgets = range(least, least + 200_000, 20_000)
    made = [plan.choose(kinds, setup, budget) for budget in budgets]
    unproved = [p for p in made if p.bound < p.seconds]
    assert unproved and all(" s above the fastest list" in str(p) for p in unproved)
    monkeypatch.undo()
    for narrow, budget in zip(made, budgets, strict=True):
        best = plan.choose(kinds, setup, budget)
        assert narrow.bound <= best.seconds <= narrow.seconds


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_blocks_are_measured(model_type):
    config = tiny_config(model_type, num_layers=2)
    small = replace(SETUP, config=config, latent=(2, 16, 1, 4, 4), chunk=3)
    found = plan.measure(small, torch.device("cpu"), ("none", "offload input"), 1)
    assert set(found["seconds"]) == {"none", "offload input"} and found["tokens"] == 8


def test_measured_seconds_take_the_place_of_predicted_ones(tmp_path):
    small = replace(SETUP, config=tiny_config(num_layers=2), latent=(1, 16, 1, 4, 4), reward=RewardSetup(1))
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"seconds": {"none": 3.0, "offload input": 2.0}}))
    given = replace(small, rollout=RolloutConfig(steps=5, samples=4), chain=ChainConfig(window=3))
    made = plan.plan(given, 1e9, measured=file)
    assert [k.name for k in made.blocks] == ["offload input"] * 2
    # Of four samples three steps each and flow matching once, through two blocks; one block of the reward.
    assert made.seconds == 13 * 2 * 2.0 + 4 * 2.0
    for text, message in [
        ("{}", "holds no measured seconds"),
        ('{"seconds": []}', "holds no measured seconds"),
        ('{"seconds": {}}', "names no kind"),
        ('{"seconds": {"none": 1.0, "some": 1.0}}', "names 'some', want some of 'none', "),
        ('{"seconds": {"none": -1.0}}', "got -1.0 seconds of 'none'"),
        ('{"seconds": {"none": NaN}}', "got nan seconds"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=f"model.costs: .*{message}"):
            plan.plan(small, 1e9, measured=file)


def test_more_computing_is_more_time_and_the_host_is_slow():
    setup = Setup(replace(SETUP.config, dim=5120, ffn_dim=13824, num_heads=40), (1, 16, 21, 90, 160))
    costs = {n: seconds.block_seconds(p, setup, 0, seconds.Rates()) for n, p in plan.KINDS.items()}
    assert costs["none"] < costs["projections"] < costs["residuals, attention"] < costs["attention"]
    assert costs["attention"] < costs["full"]
    slow = seconds.block_seconds(plan.KINDS["none"], setup, 10**12, seconds.Rates())
    assert slow == pytest.approx(2 * 1e12 / 50e9)
    two = replace(setup, latent=(2, *setup.latent[1:]))  # a token attends to those of its own sample
    for policy in plan.KINDS.values():
        both, one = (seconds.block_seconds(policy, s, 0, seconds.Rates()) for s in (two, setup))
        assert both == pytest.approx(2 * one)


def test_small_pieces_cost_time():
    """By hand: the sums of weight gradients of 14B's block, the copies of pieces, q and k recomputed."""
    setup = Setup(SETUP.config, (1, 16, 21, 90, 160))
    setup = replace(setup, config=replace(setup.config, dim=5120, ffn_dim=13824, num_heads=40))
    rates, policy = seconds.Rates(products=1e15, memory=1e12), plan.KINDS["attention"]

    def costs(chunk: int | None, **other) -> seconds.Chunked:
        return seconds.chunked(policy, replace(setup, chunk=chunk, **other), rates)

    assert costs(None) == costs(setup.tokens) == (0, 0)
    one = seconds.chunked(policy, replace(setup, chunk=8192), rates, frozen=True)
    weights = 4 * 5120**2 + 2 * 5120 * 13824
    assert costs(8192).backward - one.backward == pytest.approx(9 * 16 * weights / 1e12)
    kept = seconds.chunked(plan.KINDS["projections"], replace(setup, chunk=8192), rates)
    again = 4 * setup.tokens * 5120**2 / 1e15 + 6 * setup.tokens * 5120 / 1e12
    assert costs(8192).backward - kept.backward == pytest.approx(again)
    assert costs(8192).forward > 2 * setup.tokens * 5120 * (4 * 2 + 2 * 4) / 1e12
    assert costs(32768) < costs(8192) < costs(1024)
    assert costs(8192, sequence=16) == (0, 0)  # a rank has no more tokens than that


def test_a_run_with_a_budget_prints_its_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "KINDS", {k: plan.KINDS[k] for k in ("none", "full")})
    path = write_run(tmp_path, model={"recompute": "auto:0.0009"}, train={"steps": 1})
    assert cli.main(["train", str(path)]) == 0
    out = capsys.readouterr().out
    assert "recompute: 2 x none; reward model: none" in out
    path = write_run(tmp_path / "b", model={"recompute": "auto:0.00001"}, train={"steps": 1})
    assert cli.main(["train", str(path)]) == 2
    assert "want at least auto:" in one_line(capsys)


def test_the_configuration_names_modes_budgets_or_intermediates():
    def model(value, **rest):
        return from_dict(Config, {"model": {"recompute": value, **rest}}, "").model

    assert of_config(model("full")) == named("full")
    assert model("auto:40").budget == 40e9 and of_config(model("auto:40")) == named("none")
    made = of_config(model({"keep": ["attention"], "offload": ["input"]}))
    assert made == BlockPolicy({"attention"}, {"input"})
    for value in ("auto", "auto:", "auto:0", "auto:-3", "auto:inf", "auto:nan", "half"):
        with pytest.raises(UserError, match="model.recompute: got"):
            model(value)
    with pytest.raises(UserError, match="model.recompute"):
        model({"kept": ["input"]})
    with pytest.raises(UserError, match="model.recompute: keep: got no input"):
        of_config(model({"keep": ["attention"]}))
    assert ModelConfig().budget is None
    with pytest.raises(UserError, match="model.host: got -1.0, want a number in "):
        model("full", host=-1.0)
