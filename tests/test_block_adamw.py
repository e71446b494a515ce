"""AdamW by blocks: the arithmetic, what it keeps, and that where things live changes no bit of the result."""

import sys
import types

import pytest
import torch
from helpers import relative
from torch import nn

from prfl_engine.config import OptimConfig
from prfl_engine.errors import UserError
from prfl_engine.optim import block_adamw
from prfl_engine.optim.block_adamw import (
    BlockAdamW,
    EightBits,
    master,
    round_stochastically,
    split_master,
    update_limit,
)
from prfl_engine.optim.optimizer import make_optimizer, update

SIZES = ((70, 96), (96,), (33,), (64, 64))
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Parameters of several blocks, the last one shorter."""
    monkeypatch.setattr(block_adamw, "BLOCK", 1024)


@pytest.fixture(params=["torchao", "stand-in"])
def coding(request, monkeypatch):
    """torchao's 8-bit numbers, and, for where it is missing, plain ones of the same signatures."""
    if request.param == "torchao":
        return pytest.importorskip("torchao.optim.quant_utils", reason="torchao is not installed")
    module = types.ModuleType("torchao.optim.quant_utils")

    def scale_tensor(x, size):
        scale = x.view(-1, size).abs().amax(1).clip(1e-12)
        return (x.view(-1, size) / scale[:, None]).view(x.shape), scale

    def create_dynamic_map(signed):
        x = torch.linspace(-1.0 if signed else 0.0, 1, 256)
        return (x * x.abs() ** 3).tolist()

    module.create_dynamic_map = create_dynamic_map
    module.scale_tensor = scale_tensor
    module.dequant_with_qmap = lambda codes, table, scale: (
        table[codes.int()].view(len(scale), -1) * scale[:, None]
    ).view(codes.shape)
    optim = types.ModuleType("torchao.optim")
    optim.quant_utils = module
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", optim)
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", module)
    return module


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(s, generator=g).bfloat16().float() for s in SIZES)  # all dtypes start the same
    return nn.ParameterList([nn.Parameter(a.to(dtype)) for a in made])


def gradients(step, dtype=torch.float32):
    g = torch.Generator().manual_seed(100 + step)
    return [(torch.randn(s, generator=g) * 10.0 ** -(i % 3)).to(dtype) for i, s in enumerate(SIZES)]


def train(model, config, steps=5, clip=None, first=0, optimizer=None):
    """Updates by given gradients, which arrive by a backward, as hooks want it; returns the optimizer."""
    optimizer = optimizer or make_optimizer([(model, 1e-2)], config)
    for step in range(first, first + steps):
        pairs = zip(model, gradients(step), strict=True)
        sum((p.float() * g).sum() for p, g in pairs).backward()
        update(optimizer, clip)
    return optimizer


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_the_formula_is_that_of_torch():
    ours, theirs = parameters(), parameters()
    optimizer = train(ours, OptimConfig(offload="states", weight_decay=0.1), clip=3.0)
    reference = train(theirs, OptimConfig(weight_decay=0.1), clip=3.0)
    assert isinstance(optimizer, BlockAdamW) and isinstance(reference, torch.optim.AdamW)
    for p, q, start in zip(ours, theirs, parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, start)
        blocks, state = optimizer.state[p]["blocks"], reference.state[q]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(torch.cat([b[name] for b in blocks]), state[name].flatten())
        assert optimizer.state[p]["step"] == 5


def test_masters_are_the_float32_weights_to_the_bit():
    narrow, wide = parameters(BF16), parameters()
    optimizer = train(narrow, OptimConfig())
    reference = make_optimizer([(wide, 1e-2)], OptimConfig(offload="states"))
    for step in range(5):  # the same gradients, which a bfloat16 weight gets in bfloat16
        for p, g in zip(wide, gradients(step, BF16), strict=True):
            p.grad = g.float()
        update(reference, None)
    for p, q in zip(narrow, wide, strict=True):
        blocks = optimizer.state[p]["blocks"]
        pieces = zip(p.detach().flatten().split(1024), blocks, strict=True)
        assert torch.equal(torch.cat([master(w, b) for w, b in pieces]), q.detach().flatten())
        assert (p.float() - q).abs().le((q.bfloat16().float() - q).abs()).all()
        assert all(b["rest"].dtype == torch.int16 for b in blocks)


def test_a_split_float32_comes_back_to_the_bit():
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,)).int()
    edges = torch.tensor([0, 1, -1, 0x7FFF, 0x8000, 0x8001, 0x3F808000, -0x407F8000]).int()
    x = torch.cat([bits, edges]).view(torch.float32)
    x = x[x.abs() < 3e38]
    high, rest = split_master(x)
    assert torch.equal(master(high, {"rest": rest}).view(torch.int32), x.view(torch.int32))
    assert (high.double() - x.double()).abs().le((x.bfloat16().double() - x.double()).abs()).all()


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-10, -1 - 2**-9, 3e-5, -7.3, 0.0])
    drawn = torch.stack([round_stochastically(x) for _ in range(20_000)]).double()
    low, high = drawn.amin(0), drawn.amax(0)
    assert torch.equal(low[[0, 6]], high[[0, 6]])  # what needs no rounding is not rounded
    assert (high - low <= 2**-7 * x.abs() + 1e-30).all() and (low <= x).all() and (x <= high).all()
    error = (drawn.mean(0) - x).abs() / (high - low).clamp(min=1e-30)
    assert (error < 5 * 0.5 / 20_000**0.5).all()  # five standard errors of the worst case


def test_updates_below_the_spacing_of_bfloat16_are_not_lost():
    """Steps of 1e-4 on weights near 1, which are 2^-7 or 2^-8 apart."""
    moved = {}
    for rounding in ("master", "stochastic"):
        model = nn.ParameterList([nn.Parameter(torch.ones(20_000, dtype=BF16))])
        optimizer = make_optimizer([(model, 1e-4)], OptimConfig(rounding=rounding, weight_decay=0))
        for _ in range(20):
            model[0].grad = torch.ones_like(model[0])
            update(optimizer, None)
        moved[rounding] = model[0].detach().double()
    assert moved["stochastic"].mean() == pytest.approx(1 - 20 * 1e-4, abs=1e-4)
    steps = (1 - moved["stochastic"]) * 2**8
    assert torch.equal(steps, steps.round()) and steps.amax() > 1
    assert moved["master"].unique().tolist() == [1 - 2**-8]  # 20e-4 is more than half of 2^-8


@pytest.mark.parametrize("how", [
    {"in_backward": True, "clip": None}, {"offload": "states"}, {"offload": "all"},
    {"in_backward": True, "offload": "states", "clip": None}, {"offload": "all", "grad_dtype": "float32"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_where_and_when_change_no_bit(how, rounding):
    plain, other = parameters(BF16), parameters(BF16)
    config = OptimConfig(rounding=rounding, grad_dtype=how.get("grad_dtype", "weights"))
    # Clipping has its own test: a norm that is added up by blocks may differ in its last bit.
    a, b = train(plain, config), train(other, OptimConfig(rounding=rounding, **how))
    assert_same(plain, other)
    for p, q in zip(plain, other, strict=True):
        for x, y in zip(a.state[p]["blocks"], b.state[q]["blocks"], strict=True):
            assert x.keys() == y.keys()
            assert_same(x.values(), y.values())


@pytest.mark.parametrize("grad_dtype", ["weights", "float32"])
def test_gradients_add_up_on_the_host_as_on_the_device(grad_dtype):
    models = {}
    for offload in ("states", "all"):
        model = models[offload] = parameters(BF16)
        optimizer = make_optimizer([(model, 1e-2)], OptimConfig(offload=offload, grad_dtype=grad_dtype))
        for step in range(2):
            for micro in range(3):
                pairs = zip(model, gradients(3 * step + micro), strict=True)
                sum((p.float() * g).sum() for p, g in pairs).backward()
            assert all((p.grad is None) == (offload == "all") for p in model)
            if offload == "states":
                want = BF16 if grad_dtype == "weights" else torch.float32
                assert all(p.grad.dtype == want for p in model)
            norm = update(optimizer, 1.0)
        models[offload].norm = norm
    assert_same(models["states"], models["all"])
    assert models["states"].norm.item() == pytest.approx(models["all"].norm.item(), rel=1e-6)


def test_float32_sums_of_bfloat16_gradients_are_closer():
    error = {}
    for grad_dtype in ("weights", "float32"):
        model = parameters(BF16)
        make_optimizer([(model, 1e-2)], OptimConfig(grad_dtype=grad_dtype))
        want = [torch.zeros(s) for s in SIZES]
        for micro in range(16):
            pairs = list(zip(model, gradients(micro), strict=True))
            sum((p.float() * g).sum() for p, g in pairs).backward()
            want = [a + g.bfloat16().float() for a, (_, g) in zip(want, pairs, strict=True)]
        error[grad_dtype] = max(relative(p.grad, a) for p, a in zip(model, want, strict=True))
    assert error["float32"] < 1e-6 < 1e-3 < error["weights"]


def test_8_bit_moments_take_a_quarter_and_train_as_well(coding):
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    y = x @ torch.randn(64, 128) / 8
    loss = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128))
        optimizer = make_optimizer([(model, 3e-3)], OptimConfig(name=name, offload="states"))
        for _ in range(50):
            loss[name] = (model(x) - y).square().mean()
            loss[name].backward()
            update(optimizer, None)
        blocks = optimizer.state[model[0].weight]["blocks"]
        size = sum(a.nbytes for b in blocks for a in b.values())
        assert size == (8 if name == "adamw" else 2 + 8 / 256) * 64 * 128
        small = optimizer.state[model[0].bias]["blocks"][0]
        assert small["exp_avg"].dtype == torch.float32  # fewer than 4,096 values
    assert loss["adamw8bit"] < 1.1 * loss["adamw"] < 0.5


def test_codes_are_those_of_torchao():
    of = pytest.importorskip("torchao.optim.quant_utils", reason="torchao is not installed")
    m = torch.randn(1 << 16) * torch.logspace(-6, 1, 1 << 16)
    bits = EightBits(m.device, (0.9, 0.999))
    made = bits.encode(m, m.square())
    for name, value in (("exp_avg", m), ("exp_avg_rms", m.abs())):
        scaled, scale = of.scale_tensor(value, 256)
        want = of.quantize_8bit_with_qmap(scaled, bits.tables[name])
        torch.testing.assert_close(made[f"{name}_scale"], scale)
        apart = (made[name].int() - want.int()).abs()
        assert (apart > 0).float().mean() < 1e-4 and apart.max() <= 1


def spread(n, generator):
    """[n] sizes from 1e-4 to 1, the largest in every group of 256."""
    sizes = 10 ** (-4 * torch.rand(n, generator=generator))
    sizes.view(-1, 256)[:, 0] = 1
    return sizes


@pytest.mark.parametrize("noisy", [False, True])
def test_8_bit_updates_are_near_those_in_float32(coding, noisy):
    """Of gradients that span 1e-4 to 1 in every group. At 1e-4 the tables are wrong by at most 25 % for m and
    14 % for the root, and by half of that for every decade up; a third of that is typical. A moment that
    moves by less in a step stays where it is, which adds to it with noise."""
    g = torch.Generator().manual_seed(0)
    sizes, moved, moments = spread(1 << 13, g), {}, {}
    names = "adamw8bit", "adamw"
    models = {name: nn.ParameterList([nn.Parameter(torch.zeros(1 << 13))]) for name in names}
    optimizers = {
        name: make_optimizer([(models[name], 1.0)], OptimConfig(name=name, offload="states", weight_decay=0))
        for name in names
    }
    for _ in range(40):
        gradient = sizes * torch.randn(sizes.shape, generator=g) if noisy else sizes
        for name, (p,) in models.items():
            before = p.detach().clone()
            p.grad = gradient.clone()
            update(optimizers[name], None)
            moved[name] = p.detach() - before
    assert moved["adamw8bit"].abs().max() < (3 if noisy else 1.4)
    assert relative(moved["adamw8bit"], moved["adamw"]) < (0.25 if noisy else 0.1)
    for name, (p,) in models.items():
        pairs = [optimizers[name]._moments(block) for block in optimizers[name].state[p]["blocks"]]
        moments[name] = [torch.cat(a) for a in zip(*pairs, strict=True)]
    for got, want in zip(moments["adamw8bit"], moments["adamw"], strict=True):
        assert relative(got, want) < 0.05


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.99)])
def test_no_codes_make_an_update_larger_than_float32_moments_can(coding, betas):
    """The limit is reached by gradients that grow by beta2 / beta1 a step, and by no others."""
    limit, m, v = update_limit(betas), 0.0, 0.0
    for i in range(300):
        a = (betas[1] / betas[0]) ** i if betas[0] else float(i == 299)
        m, v = betas[0] * m + (1 - betas[0]) * a, betas[1] * v + (1 - betas[1]) * a * a
    assert m / v**0.5 == pytest.approx(limit, rel=1e-3)
    g = torch.Generator().manual_seed(0)
    config = OptimConfig(name="adamw8bit", betas=betas, weight_decay=0)
    for scale in (0.0, 1e-3, 1.0):
        model = nn.ParameterList([nn.Parameter(torch.zeros(1 << 13))])
        optimizer = make_optimizer([(model, 1.0)], config)
        optimizer.state[model[0]]["step"].fill_(10_000)  # no bias correction
        for block in optimizer.state[model[0]]["blocks"]:
            for name, a in block.items():
                codes = torch.randint(256, a.shape, generator=g)
                a.copy_(10.0 ** -(codes % 7) if name.endswith("scale") else codes)
        model[0].grad = scale * spread(1 << 13, g)
        update(optimizer, None)
        assert model[0].isfinite().all() and model[0].abs().max() <= limit * (1 + 1e-5)


def test_betas_without_a_limit_are_refused(coding):
    with pytest.raises(UserError, match=r"optim.betas: got \[0.9, 0.8\], want beta1\^2 < beta2"):
        make_optimizer([(parameters(), 1e-2)], OptimConfig(name="adamw8bit", betas=(0.9, 0.8)))


def test_8_bits_without_torchao_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"optim.name: got 'adamw8bit'.*\[lowmem\]"):
        make_optimizer([(parameters(), 1e-2)], OptimConfig(name="adamw8bit"))


HOW = [
    {}, {"rounding": "stochastic"}, {"in_backward": True, "clip": None}, {"offload": "states"},
    {"offload": "all"},
]  # fmt: skip


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_gradient_that_is_not_finite_changes_nothing(how, bad, dtype):
    model = parameters(dtype)
    clip = None if how.get("in_backward") else 1.0
    optimizer = train(model, OptimConfig(**how), steps=2, clip=clip)
    before = [p.detach().clone() for p in model], copy_of(optimizer)
    assert torch.isfinite(before[0][0]).all()
    loss = sum(p.float().sum() for p in model) + bad * model[3].float()[0, 0]
    if how.get("in_backward"):  # all of them, since earlier ones would have been updated
        loss = sum(bad * p.float().sum() for p in model)
    loss.backward()
    assert not update(optimizer, clip).isfinite()
    assert_same(before[0], [p.detach() for p in model])
    assert_equal(before[1], copy_of(optimizer))
    assert all(p.grad is None for p in model)
    train(model, None, steps=1, first=2, clip=clip, optimizer=optimizer)  # and it can go on
    assert not torch.equal(before[0][0], model[0])


def test_8_bit_codes_do_not_change_either(coding):
    model = parameters()
    optimizer = train(model, OptimConfig(name="adamw8bit"), steps=2)
    before = copy_of(optimizer)
    (float("nan") * model[0].sum()).backward()
    update(optimizer, 1.0)
    assert_equal(before, copy_of(optimizer))


def test_the_first_bad_gradient_in_a_backward_stops_the_later_ones():
    model = parameters()
    optimizer = make_optimizer([(model, 1e-2)], OptimConfig(in_backward=True, clip=None))
    before = [p.detach().clone() for p in model]
    x = model[0].sum()  # earlier in the graph, so later in backward
    y = x * 0 + float("nan") * model[1].sum()
    y.backward()
    assert torch.equal(before[1], model[1])
    assert not update(optimizer, None).isfinite()


def copy_of(optimizer):
    return _map(optimizer.state_dict()["state"], lambda a: a.clone() if torch.is_tensor(a) else a)


def _map(value, function):
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    return [_map(v, function) for v in value] if isinstance(value, list) else function(value)


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", [*HOW[1:], {"name": "adamw8bit"}], ids=str)
def test_a_saved_state_goes_on_to_the_bit(how, tmp_path, request):
    if "name" in how:
        pytest.importorskip("torchao", reason="torchao is not installed")
    config, clip = OptimConfig(**how), None if how.get("in_backward") else 1.0
    whole, cut, again = (parameters(BF16) for _ in range(3))
    train(whole, config, 4, clip)
    first = train(cut, config, 2, clip)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    for p, q in zip(again, cut, strict=True):
        p.data.copy_(q)
    second = make_optimizer([(again, 1e-2)], config)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(again, config, 2, clip, first=2, optimizer=second)
    assert_same(whole, again)


def test_an_8_bit_state_of_second_moments_themselves_is_refused(coding):
    """They were stored so until their roots were."""
    optimizer = train(parameters(), OptimConfig(name="adamw8bit"))
    state = optimizer.state_dict()
    state["state"] = {
        i: own | {"blocks": [{k.replace("rms", "sq"): a for k, a in b.items()} for b in own["blocks"]]}
        for i, own in state["state"].items()
    }
    with pytest.raises(ValueError, match="parameter 0: blocks: 0: got .*exp_avg_sq.*want .*exp_avg_rms"):
        optimizer.load_state_dict(state)


def test_rounding_draws_other_bits_for_every_step_and_place(monkeypatch):
    """Uniform 16 bits, and no two draws alike: not those 65,536 places apart either, which torch's generator
    on the CPU, that reads 32 bits of a seed, once gave the same."""
    drawn = []

    def rounded(x, generator):
        drawn.append(torch.randint(1 << 16, x.shape, generator=generator))
        return x.bfloat16()

    monkeypatch.setattr(block_adamw, "round_stochastically", rounded)
    model = nn.ParameterList([nn.Parameter(torch.zeros(n, dtype=BF16)) for n in (2048, 8)])
    optimizer = make_optimizer([(model, 1e-2)], OptimConfig(rounding="stochastic"))
    for step in (0, 1, 32768, 65536):  # of 2 parameters: places 0, 2, 65,536 and 131,072
        optimizer.param_groups[0]["updates"] = step
        for p in model:
            p.grad = torch.ones_like(p)
        update(optimizer, None)
    assert [len(a) for a in drawn] == [1024, 1024, 8] * 4
    assert len({tuple(a[:8].tolist()) for a in drawn}) == len(drawn)
    bits = torch.cat(drawn)
    ones = torch.stack([bits >> i & 1 for i in range(16)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / len(bits) ** 0.5  # five standard errors
    again = [a.clone() for a in drawn[-3:]]
    optimizer.param_groups[0]["updates"] = 65536
    for p in model:
        p.grad = torch.ones_like(p)
    update(optimizer, None)
    assert_same(again, drawn[-3:])


def test_another_state_is_refused():
    state = train(parameters(BF16), OptimConfig()).state_dict()
    other = make_optimizer([(parameters(BF16), 1e-2)], OptimConfig(rounding="stochastic"))
    with pytest.raises(ValueError, match="parameter 0: blocks: 0: got .*rest, want a dict of exp_avg, "):
        other.load_state_dict(state)
    fewer = make_optimizer([(parameters(BF16)[:2], 1e-2)], OptimConfig())
    with pytest.raises(ValueError, match=r"groups of \[4\] parameters, want \[2\]"):
        fewer.load_state_dict(state)
    # Where it lives is no part of it.
    moved = make_optimizer([(parameters(BF16), 1e-2)], OptimConfig(offload="states"))
    moved.load_state_dict(state)
    assert_equal(moved.state_dict()["state"], state["state"])


def test_two_backwards_in_a_step_of_in_backward_are_refused():
    model = parameters()
    make_optimizer([(model, 1e-2)], OptimConfig(in_backward=True, clip=None))
    model[0].sum().backward()
    with pytest.raises(ValueError, match="in_backward: got two gradients"):
        model[0].sum().backward()


def test_a_parameter_in_two_places_of_one_backward_is_updated_once():
    model = parameters()
    optimizer = make_optimizer([(model, 1e-2)], OptimConfig(in_backward=True, clip=None))
    (model[0].sum() + model[0].square().sum()).backward()
    update(optimizer, None)
    assert optimizer.state[model[0]]["step"] == 1


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match="parameter 0: got torch.float16, want"):
        make_optimizer([(parameters(torch.float16), 1e-2)], OptimConfig(offload="all"))
