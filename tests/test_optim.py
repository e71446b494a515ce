"""The optimizers of a run: configuration, memory, no waiting for the device, training, resuming."""

import sys
import types
from collections import Counter

import pytest
import torch
from helpers import one_line, random_batch, relative, tiny_config, tiny_model, tiny_reward, under, write_run
from no_sync import NoBlockingCopy, NoSync
from safetensors.torch import load_file
from training_runs import NAME, STATE, assert_equal, content, interrupt, reward_run, run, values

from prfl_engine import flow
from prfl_engine import train as train_module
from prfl_engine.checks import check_prfl
from prfl_engine.config import ChainConfig, Config, LossConfig, OptimConfig, load_config
from prfl_engine.errors import UserError
from prfl_engine.measurements import Measured
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.objectives import graded_windows, reward_loss, sft_loss
from prfl_engine.optim import optimizer as optim
from prfl_engine.optim import updates
from prfl_engine.optim.block_adamw import BlockAdamW
from prfl_engine.optim.optimizer import EMA, make_optimizer, update
from prfl_engine.parallel import World
from prfl_engine.phases import Lap

BF16 = torch.bfloat16


# Configuration.


@pytest.mark.parametrize("override, line", [
    ("model.weights_dtype=float16", "model.weights_dtype: got 'float16', want float32 or bfloat16"),
    ("optim.name=sgd", "optim.name: got 'sgd', want adamw or adamw8bit or apex"),
    ("optim.rounding=nearest", "optim.rounding: got 'nearest', want master or stochastic"),
    ("optim.grad_dtype=bfloat16", "optim.grad_dtype: got 'bfloat16', want weights or float32"),
    ("optim.offload=true", "optim.offload: got True, want none or states or all"),
    ("optim.in_backward=1", "optim.in_backward: got 1, want true or false"),
    ("optim.clip=0", "optim.clip: got 0.0, want a number in [1e-09, 1e+09] or null"),
    ("optim.in_backward=true", "optim.clip: got 1.0, want null with optim.in_backward"),
    ("loss.alternate=true loss.weight=0", "loss.alternate: got True, want false, or positive"),
    ("optim.in_backward=true optim.clip=null optim.offload=all", "optim.offload: got 'all', want none or"),
    ("optim.name=apex optim.offload=states", "optim.offload: got 'states', want none with optim.name apex"),
    ("optim.name=apex optim.in_backward=true optim.clip=null", "optim.in_backward: got True, want false"),
])  # fmt: skip
def test_values_that_cannot_be_right(override, line):
    with pytest.raises(UserError) as error:
        load_config(None, override.split())
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize("override, line", [
    ("optim.lr=1e-3", "loss.alternate: got False, want true or one loss alone with optim.in_backward"),
    ("loss.alternate=true rollout.samples=2", "rollout.samples: got 2, want 1 with optim.in_backward"),
    ("loss.sft_weight=0 chain.window=all", "chain.window: got 'all', want 1 with optim.in_backward"),
    ("train.accumulate=2", "train.accumulate: got 2, want 1 with optim.in_backward"),
])  # fmt: skip
def test_in_backward_takes_one_backward_a_step(override, line, tmp_path, capsys):
    config = write_run(tmp_path, optim={"in_backward": True, "clip": None})
    run("train", config, *override.split(), code=2)
    assert line in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config, kind", [
    (OptimConfig(), torch.optim.AdamW), (OptimConfig(offload="states"), BlockAdamW),
    (OptimConfig(in_backward=True, clip=None), BlockAdamW),
])  # fmt: skip
def test_the_optimizer_that_is_made(config, kind):
    model = tiny_model()
    model.patch_embedding.requires_grad_(False)
    optimizer = make_optimizer([(model, 1e-3), (torch.nn.Linear(2, 2), 1e-2)], config)
    assert type(optimizer) is kind
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(list(model.parameters())) - 2, 2]
    assert [g["base_lr"] for g in optimizer.param_groups] == [1e-3, 1e-2]
    assert type(make_optimizer([(tiny_model().to(BF16), 1e-3)], OptimConfig())) is BlockAdamW


# apex, of which there is a likeness here.


class FusedAdam(torch.optim.Optimizer):
    """The constructor and step of apex's, capturable: what it reads from a grad scaler."""

    def __init__(self, params, lr=1e-3, betas=(), eps=0.0, weight_decay=0.0, capturable=False):
        assert capturable
        super().__init__(params, dict(lr=torch.tensor(lr), betas=betas, eps=eps, weight_decay=weight_decay))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            device = group["params"][0].device
            skip = grad_scaler._check_inf_per_device(self)[device]
            scale = grad_scaler._get_scale_async()
            group["step"] = group.get("step", torch.zeros((), dtype=torch.int)) + 1
            for p in group["params"]:
                p.copy_(torch.where(skip == 0, p - group["lr"] * p.grad / scale, p))


def test_apex_is_driven_by_flags_on_the_device(monkeypatch, tmp_path):
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim._apex([{"params": [p], "lr": 0.5, "base_lr": 0.5}], OptimConfig())
    optim.set_lr(optimizer, 0.5)
    p.grad = torch.tensor([3.0, 4.0])
    assert update(optimizer, 1.0) == 5 and p.grad is None
    assert torch.allclose(p, -0.25 * torch.tensor([0.6, 0.8]))
    p.grad, before = torch.tensor([float("nan"), 1.0]), p.detach().clone()
    update(optimizer, 1.0)
    assert torch.equal(p, before)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    group = {"params": [p], "lr": 0.125, "base_lr": 0.125}
    optimizer = optim._apex([group], OptimConfig(weight_decay=0.5))
    optim.load_state(optimizer, torch.load(tmp_path / "state.pt", weights_only=True))
    (group,) = optimizer.param_groups
    assert group["step"] == 2 and group["lr"] == group["base_lr"] == 0.125 and group["weight_decay"] == 0.5


def test_apex_that_is_not_there_is_one_line(monkeypatch, tmp_path, capsys):
    config = write_run(tmp_path, optim={"name": "apex"})
    run("train", config, code=2)
    assert "optim.name: got 'apex' with weights on a CPU, want adamw" in one_line(capsys)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="optim.name: got 'apex', but FusedAdam cannot be imported"):
        optim._apex([{"params": [torch.zeros(1)], "lr": 1.0}], OptimConfig())


# One update.


def test_clipping_is_that_of_torch():
    ours, theirs = tiny_model(), tiny_model()
    a, b = (make_optimizer([(m, 1e-2)], OptimConfig()) for m in (ours, theirs))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    want = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    b.step()
    assert update(a, 0.1).item() == pytest.approx(want.item(), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(a.state[p]["exp_avg"], b.state[q]["exp_avg"]) < 1e-5  # torch adds 1e-6 to the norm
        assert p.grad is None


def test_torch_changes_nothing_either_where_a_gradient_is_not_finite():
    model = tiny_model()
    optimizer = make_optimizer([(model, 1e-2)], OptimConfig())
    for bad in (0.0, float("nan"), float("inf")):
        before = [p.detach().clone() for p in model.parameters()]
        state = [optimizer.state[p].get("exp_avg", torch.zeros_like(p)).clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.head.head.weight.grad[0, 0] += bad
        update(optimizer, 1.0)
        same = [torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True)]
        assert all(same) if bad else not any(same)
        now = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
        assert all(torch.equal(x, y) for x, y in zip(state, now, strict=True)) == bool(bad)
        assert {optimizer.state[p]["step"].item() for p in model.parameters()} == {1}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_model_updated_in_backward_is_the_same_in_less_memory(dtype, recompute):
    config = tiny_config(dim=64, ffn_dim=256)
    batch = random_batch(config, 1)
    weights, peaks, states = {}, {}, {}
    for in_backward in (False, True):
        model = tiny_model(config).to(dtype)
        how = OptimConfig(in_backward=in_backward, rounding="stochastic", clip=None, offload="states")
        optimizer = make_optimizer([(model, 1e-3)], how)
        live = LiveBytes()
        live.add([*model.parameters(), *tensors(optimizer.state_dict()["state"])])
        before = live.now
        with live:
            noise, sigma = torch.ones_like(batch.latent), torch.tensor([0.3])
            sft_loss(model, batch, noise, sigma, under(recompute)).mean().backward()
            assert all((p.grad is None) == in_backward for p in model.parameters())
            update(optimizer, None)
        peaks[in_backward] = live.peak - before
        weights[in_backward] = [p.detach() for p in model.parameters()]
        states[in_backward] = optimizer.state_dict()["state"]
    for a, b in zip(weights[False], weights[True], strict=True):
        assert torch.equal(a, b)
    assert_equal(states[False], states[True])
    gradients = sum(p.nbytes for p in weights[True])
    # The largest parameter's gradient lives all the same, and so does the arithmetic of its update.
    assert peaks[True] < peaks[False] - 0.5 * gradients


def tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [a for v in value for a in tensors(v)] if isinstance(value, list) else [value]


# Nothing waits for the device.


def test_the_watch_for_syncs_sees_them():
    x, host = torch.ones(3), torch.arange(3)
    for sync in (
        lambda: x.sum().item(), lambda: bool(x.sum() > 1), lambda: float(x[0] + 1), lambda: x.equal(x),
        lambda: x[host > 1], lambda: host[x > 1], lambda: (x > 1).nonzero(),
    ):  # fmt: skip
        with NoSync([x]), pytest.raises(AssertionError, match="waits for the device"):
            sync()
    watch = NoSync([x])
    for copy in (lambda: host.to(x.device), lambda: torch.tensor(1.0, device=x.device)):
        with NoBlockingCopy(watch), pytest.raises(AssertionError, match="waits"):
            copy()
    with NoSync([x]) as watch, NoBlockingCopy(watch):
        assert (host > 1).any() and host[1].item() == 1
        assert x.to(x.device) is x and host.to(x.device, non_blocking=True).float().to(x.dtype).any()
        assert x[host[host > 1]].shape == (1,)


@pytest.mark.parametrize("dtype, how", [
    (torch.float32, {}), (torch.float32, {"offload": "states", "clip": None}), (BF16, {}),
    (BF16, {"rounding": "stochastic", "offload": "all"}),
    (BF16, {"rounding": "stochastic", "offload": "states", "in_backward": True, "clip": None}),
], ids=str)  # fmt: skip
def test_a_step_takes_no_number_out_of_a_tensor(how, dtype):
    """Losses, backward, clipping, update and average, as loop.fit makes them."""
    config = OptimConfig(**how)
    policy, reward = tiny_model().to(dtype), tiny_reward().freeze()
    batch, schedule = random_batch(policy.config, 2), flow.make_schedule("unipc", 4, 5.0)
    noise, indices = torch.randn_like(batch.latent), torch.tensor([[1, 2]])
    window = ChainConfig(window=1 if config.in_backward else 2)
    if not config.in_backward:
        indices = torch.tensor([[0, 2], [1, 2]])
    optimizer, ema = make_optimizer([(policy, 1e-3)], config), EMA(policy, 0.9)
    before = [p.detach().clone() for p in policy.parameters()]
    given = [noise, *(a for a in batch if a is not None), *policy.parameters(), *reward.parameters()]
    with NoSync(given) as watch, NoBlockingCopy(watch):
        optim.set_lr(optimizer, 0.5)
        if not config.in_backward:
            sft_loss(policy, batch, noise, torch.tensor([0.3, 0.6])).mean().backward()
        for graded in graded_windows(policy, reward, schedule, batch, noise, indices, window):
            graded.backward(reward_loss(graded.logit, LossConfig()).mean())
        norm = update(optimizer, config.clip)
        ema.update()
        measured = Measured(0, 1e-3, {"grad_norm": norm}, Lap([], Counter()), World().mean)
    assert measured.read()["grad_norm"] > 0
    assert not any(torch.equal(a, p) for a, p in zip(before, policy.parameters(), strict=True) if a.dim() > 1)


def test_the_flag_of_a_step_is_read_while_the_next_one_runs(tmp_path, monkeypatch):
    config, order = write_run(tmp_path), []
    read, make, loss = Measured.read, updates.update, train_module.sft_loss

    def counted(self):
        order.append(f"read {self.step}")
        return read(self)

    monkeypatch.setattr(Measured, "read", counted)
    monkeypatch.setattr(updates, "update", lambda *args: order.append("update") or make(*args))
    monkeypatch.setattr(train_module, "sft_loss", lambda *args: order.append("loss") or loss(*args))
    run("train", config, "train.steps=3")
    assert order == [
        "loss", "update", "loss", "read 0", "update", "loss", "read 1", "update", "read 2",
    ]  # fmt: skip


# Whole runs.


WAYS = {
    "master": ["model.weights_dtype=bfloat16"],
    "stochastic on the host": [
        "model.weights_dtype=bfloat16", "optim.rounding=stochastic", "optim.offload=all",
    ],
    "float32 on the host": ["optim.offload=states"],
    "in backward": [
        "model.weights_dtype=bfloat16", "optim.rounding=stochastic", "optim.offload=states",
        "optim.in_backward=true", "optim.clip=null", "loss.alternate=true",
    ],
    "float32 sums": ["model.weights_dtype=bfloat16", "optim.grad_dtype=float32", "train.accumulate=2"],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_to_the_bit(way, tmp_path, monkeypatch):
    config = write_run(tmp_path, train={"steps": 4, "save_every": 2, "ema": 0.999}, eval={"every": 2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train", config, *WAYS[way], f"train.out={whole}")
    with monkeypatch.context() as patch:
        interrupt(patch, updates, "update", 4)
        run("train", config, *WAYS[way], f"train.out={cut}", code=130)
    assert max(values(cut)) == 3
    run("train", config, *WAYS[way], f"train.out={cut}", "train.resume=true")
    assert_equal(content(cut / "checkpoint-4"), content(whole / "checkpoint-4"))
    assert values(cut) == values(whole) and values(cut, "eval") == values(whole, "eval")
    last = content(whole / "checkpoint-4")
    weights, average = last[NAME], last[f"ema/{NAME}"]
    want = BF16 if "model.weights_dtype=bfloat16" in WAYS[way] else torch.float32
    assert all(a.dtype == want for a in weights.values())
    # An average in bfloat16 would never move by a thousandth of what its weights move by.
    assert all(a.dtype == torch.float32 for a in average.values())
    start = load_file(tmp_path / "policy" / NAME)
    assert all(not torch.equal(average[k], start[k].to(want).float()) for k in start)


def test_reward_training_in_bfloat16(tmp_path):
    config = reward_run(tmp_path, "ce", train={"steps": 20})
    narrow = ["model.weights_dtype=bfloat16", "optim.in_backward=true", "optim.clip=null"]
    ways = {"float32": [], "bfloat16": narrow}
    losses = {}
    for dtype, overrides in ways.items():
        out = tmp_path / dtype
        run("train-reward", config, *overrides, f"train.out={out}")
        losses[dtype] = [v["train/loss"] for v in values(out).values()]
        saved = load_file(out / "checkpoint-20" / NAME)
        assert all(str(a.dtype) == f"torch.{dtype}" for a in saved.values())
    assert losses["bfloat16"][-1] < 0.8 * losses["bfloat16"][0]
    assert losses["bfloat16"][:5] == pytest.approx(losses["float32"][:5], rel=0.1)


def test_another_optimizer_does_not_take_the_state(tmp_path, capsys):
    config = write_run(tmp_path)
    run("train", config)
    capsys.readouterr()
    run("train", config, "train.resume=true", "train.steps=3", "optim.offload=all", code=2)
    assert "holds a state of AdamW, want BlockAdamW" in one_line(capsys)
    other = tmp_path / "other"
    run("train", config, "model.weights_dtype=bfloat16", f"train.out={other}")
    capsys.readouterr()
    stochastic = ["model.weights_dtype=bfloat16", "optim.rounding=stochastic", f"train.out={other}"]
    run("train", config, "train.resume=true", "train.steps=3", *stochastic, code=2)
    line = one_line(capsys)
    assert STATE in line and "does not fit this run" in line and "exp_avg, exp_avg_sq, rest" in line


def test_losses_in_turn(tmp_path):
    config = write_run(tmp_path, train={"steps": 4, "accumulate": 2})
    run("train", config, "loss.alternate=true")
    logged = list(values(tmp_path / "run").values())
    assert ["train/sft_loss" in v for v in logged] == [True, False, True, False]
    assert ["train/reward" in v for v in logged] == [False, True, False, True]
    assert all(v["train/grad_norm"] > 0 for v in logged)
    out = tmp_path / "other"
    run("train", config, "loss.alternate=true", "train.log_every=2", f"train.out={out}")
    assert [("train/sft_loss" in v, "train/reward" in v) for v in values(out).values()] == [(True, True)] * 2


def test_what_a_stopped_run_had_not_logged_yet_is_logged(tmp_path):
    """Steps 4 to 6 have a line together; flow matching was in the fifth."""
    turns = ["loss.alternate=true", "train.log_every=3"]
    config = write_run(tmp_path, train={"save_every": 5})
    run("train", config, *turns, "train.steps=6", f"train.out={tmp_path}/whole")
    run("train", config, *turns, "train.steps=5")
    run("train", config, *turns, "train.steps=6", "train.resume=true")
    assert "train/sft_loss" in values(tmp_path / "whole")[6]
    assert values(tmp_path / "run") == values(tmp_path / "whole")


def test_a_gradient_that_is_not_a_number_in_backward_stops_the_run(tmp_path, capsys, monkeypatch):
    config = write_run(tmp_path)
    way = WAYS["in backward"]
    run("train", config, *way)
    out = tmp_path / "run"
    before = {p: p.read_bytes() for p in out.glob("checkpoint-2/**/*") if p.is_file()}
    monkeypatch.setattr(train_module, "sft_loss", lambda *args: float("nan") * sft_loss(*args))
    capsys.readouterr()
    run("train", config, *way, "train.resume=true", "train.steps=6", code=1)
    assert "step 2" in (line := one_line(capsys)) and "nan" in line
    assert {p: p.read_bytes() for p in out.glob("checkpoint-*/**/*") if p.is_file()} == before


def test_configs_of_in_backward_are_whole():
    ok = Config(optim=OptimConfig(in_backward=True, clip=None), loss=LossConfig(alternate=True))
    check_prfl(ok)
