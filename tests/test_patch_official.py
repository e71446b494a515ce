"""accelerate on transformers with the names, shapes and calls of the official ones (patch_twins)."""

import copy
import io
from functools import cache

import patch_twins as twins
import pytest
import torch
from helpers import randomize, relative
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.checkpoint import checkpoint

from prfl_engine.errors import UserError
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.patch import accelerate, fast_reward_pool, fp8, report_of, restore
from prfl_engine.patch.memo import Memo
from prfl_engine.patch.official import Official
from prfl_engine.patch.view import Call

GRID = (2, 3, 4)
TOKENS = 24
KINDS = {"t2v": {}, "i2v": {"image": True}, "wan22": {"tokenwise": True}}
KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def exact_attention(monkeypatch):
    """In float32, to compare."""
    monkeypatch.setattr(twins, "flash_attention", twins.attend)


def model_of(kind="t2v", **more):
    return randomize(twins.Official(**KINDS[kind], **more))


def inputs_of(kind="t2v", grids=(GRID, GRID), seq_len=TOKENS):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = [(f, 2 * h, 2 * w) for f, h, w in grids]
    x = [normal(16, *s) for s in sizes]
    texts = [normal(n, 12) for n in (512, 470)[: len(x)]]
    arguments = dict(x=x, t=torch.tensor([900.0, 30.0])[: len(x)], context=texts, seq_len=seq_len)
    if kind == "i2v":
        arguments |= dict(clip_fea=normal(len(x), 257, 24), y=[normal(20, *s) for s in sizes])
    return arguments


def outcome(model, arguments):
    """Result, and gradients of every parameter and of the latents, by name."""
    model.zero_grad()
    x = [a.clone().requires_grad_() for a in arguments["x"]]
    made = model(**arguments | {"x": x})
    generator = torch.Generator().manual_seed(5)
    sum((a * torch.randn(a.shape, generator=generator)).sum() for a in made).backward()
    grads = {k: p.grad for k, p in model.named_parameters()} | {f"x{i}": a.grad for i, a in enumerate(x)}
    return torch.cat([a.detach().flatten() for a in made]), grads


def assert_close(got, want, tolerance=1e-5):
    """Gradients below a thousandth of the largest have the rounding of larger ones: relative to that."""
    assert relative(got[0], want[0]) < tolerance
    assert got[1].keys() == want[1].keys()
    floor = 1e-3 * max(a.norm() for a in want[1].values())
    for name, a in want[1].items():
        assert (got[1][name] - a).norm() < tolerance * max(a.norm(), floor), name


def in_float64(kind):
    """The model and its inputs."""
    model, arguments = model_of(kind).double(), inputs_of(kind)
    for name in ("x", "context", "y"):
        arguments |= {name: [a.double() for a in arguments[name]]} if name in arguments else {}
    arguments |= {"clip_fea": arguments["clip_fea"].double()} if kind == "i2v" else {}
    return model, arguments


@cache
def exact(kind):
    """The outcome of the original in float64."""
    return outcome(*in_float64(kind))


def assert_right(got, want, kind="t2v"):
    """In float32, where nothing is further from float64 than twice the original `want` and the rounding of a
    sum over the 512 tokens of a text, whose last one we count many times in place of adding it up."""
    least, (value, truth) = 2**-24 * 512, exact(kind)
    floor = 1e-3 * max(a.norm() for a in truth.values())
    assert (got[0] - value).norm() < 2 * (want[0] - value).norm() + least * value.norm()
    assert got[1].keys() == want[1].keys() == truth.keys()
    for name, a in truth.items():
        limit = 2 * (want[1][name] - a).norm() + least * max(a.norm(), floor)
        assert (got[1][name] - a).norm() < limit, name


@KIND
def test_values_and_all_gradients_are_the_same_in_float64(kind):
    model, arguments = in_float64(kind)
    accelerate(model)
    assert_close(outcome(model, arguments), exact(kind), 1e-11)


@KIND
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_values_and_all_gradients_stay(kind, recompute):
    model, arguments = model_of(kind), inputs_of(kind)
    want = outcome(model, arguments)
    report = accelerate(model, recompute, chunk=None if recompute == "none" else 7)
    assert_right(outcome(model, arguments), want, kind)
    assert (report.calls, report.fallbacks.total()) == (2, 0)
    assert "2 blocks Block (WanModel as Wan2.1" in str(report)
    assert "as they were: patch_embedding, text_embedding, time_embedding, head" in str(report)


def test_a_policy_of_names_and_what_is_refused_of_settings():
    model, arguments = model_of(), inputs_of()
    want = outcome(model, arguments)
    accelerate(model, BlockPolicy({"input", "hidden"}))
    assert_right(outcome(model, arguments), want)
    for settings, words in (
        (dict(recompute="some"), "recompute: got 'some', want one of none, full, attention"),
        (dict(chunk=0), "chunk: got 0, want"),
        (dict(recompute=None), "recompute: got None, want a name or a BlockPolicy"),
    ):
        with pytest.raises(UserError, match=words):
            accelerate(model_of(), **settings)


def test_a_policy_saves_less():
    model, arguments = model_of(), inputs_of()

    def saved():
        kept = {}

        def pack(a):
            kept[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
            return a

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            made = model(**arguments)
        return sum(kept.values()), made

    whole, _ = saved()
    accelerate(model, "full")
    assert saved()[0] < whole / 2


def test_restore_brings_the_original_code_back_and_names_stay():
    model, arguments = model_of(), inputs_of()
    names, want = list(model.state_dict()), outcome(model, arguments)
    assert "forward" not in vars(model.blocks[0])
    report = accelerate(model)
    assert list(model.state_dict()) == names and report_of(model) is report
    restore(model)
    assert "forward" not in vars(model.blocks[0])
    got = outcome(model, arguments)
    assert torch.equal(got[0], want[0]) and report.calls == 0
    with pytest.raises(UserError, match="got 0 patched transformers, want one"):
        report_of(model)


def test_copies_and_pickles_are_patched_on_their_own():
    model, arguments = model_of(), inputs_of()
    report = accelerate(model)
    want = outcome(model, arguments)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert all(block.forward.module is block for block in made.blocks)
        assert_close(outcome(made, arguments), want, 1e-7)
        assert report_of(made) is not report and report_of(made).calls == 4
    assert report.calls == 2


def test_hooks_on_blocks_and_checkpoint_wrappers_stay():
    model, arguments = model_of(), inputs_of()
    want, seen = outcome(model, arguments), []
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    report = accelerate(model)
    model.blocks[0]._checkpoint_wrapped_module.register_forward_pre_hook(lambda *_: seen.append("hook"))
    got, grads = outcome(model, arguments)
    wrapped = "._checkpoint_wrapped_module"
    assert_right((got, {k.replace(wrapped, ""): a for k, a in grads.items()}), want)
    assert seen == ["hook"] * 2 and report.calls == 4  # once more in backward


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_has_the_grid_of_its_own_forward(reentrant):
    """Two forwards of other sizes, then both backwards."""
    model = model_of(layers=1)
    block, (f, h, w) = model.blocks[0], GRID
    generator = torch.Generator().manual_seed(0)

    def gradients(patched):
        total, found = 0, []
        for grid in ((f, h, w), (f, w, h)):
            x = torch.randn(1, TOKENS, 48, generator=generator.manual_seed(1), requires_grad=True)
            e, context = torch.ones(1, 6, 48), torch.ones(1, 5, 48)
            rest = e, torch.tensor([TOKENS]), torch.tensor([grid]), model.freqs, context, None
            total = total + checkpoint(block, x, *rest, use_reentrant=reentrant).square().sum()
            found.append(x)
        total.backward()
        return [a.grad for a in found]

    want = gradients(False)
    accelerate(model)
    for a, b in zip(gradients(True), want, strict=True):
        assert relative(a, b) < 1e-5


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("own", [False, True])
def test_fsdp1_wraps_what_is_patched(one_process, own):
    """With flat parameters, as HY-Video-PRFL trains, and with the original ones."""
    model, arguments = model_of("i2v"), inputs_of("i2v")
    want = outcome(model, arguments)
    norm = torch.stack([a.norm() for k, a in want[1].items() if not k.startswith("x")]).norm()
    report = accelerate(model)
    policy = ModuleWrapPolicy({twins.Block})
    wrapped = FSDP(model, auto_wrap_policy=policy, use_orig_params=own, device_id=torch.device("cpu"))
    got = outcome(wrapped, arguments)
    assert relative(got[0], want[0]) < 1e-5 and relative(got[1]["x1"], want[1]["x1"]) < 1e-5
    assert abs(wrapped.clip_grad_norm_(1e9) / norm - 1) < 1e-5
    assert report.calls == 2 and not report.fallbacks
    restore(wrapped)
    outcome(wrapped, arguments)
    assert report.calls == 2
    with pytest.raises(UserError, match="Official: its blocks are FSDP1 units; call accelerate before FSDP"):
        accelerate(FSDP(model_of(), auto_wrap_policy=policy, device_id=torch.device("cpu")))


def counted(arguments, kind="t2v", change=lambda model: None, **more):
    """The reasons for which the original code ran after `change`, with its very results."""
    model = model_of(kind)
    report = accelerate(model)
    change(model)
    with torch.no_grad():
        got = model(**arguments, **more)
        restore(model)
        want = model(**arguments, **more)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and report.calls == 0
    return report.fallbacks


def test_calls_that_are_not_ours_run_the_original_code_and_are_counted():
    padded = inputs_of(seq_len=TOKENS + 3)
    assert counted(padded) == {"tokens that are padded, or cut over processes": 2}
    ragged = inputs_of(grids=(GRID, (2, 3, 2)))
    assert counted(ragged) == {"samples of several sizes in one batch": 2}
    assert counted(inputs_of(), note="x") == {"argument note, which is not known": 2}
    tokenwise = inputs_of("wan22")
    tokenwise["t"] = torch.rand(2, TOKENS)
    assert counted(tokenwise, "wan22") == {"modulation that differs from token to token": 2}

    def turned(model):
        model.freqs = twins.table(24, theta=5000.0)

    def written(model):
        model.freqs[:, 0] = 1

    for change in (turned, written):
        (why,) = counted(inputs_of(), change=change)
        assert "another table of rotations" in why

    def hooked(model):
        model.blocks[1].ffn[0].register_forward_hook(lambda m, i, o: o + 1)

    model = model_of()
    report = accelerate(model)
    hooked(model)
    outcome(model, inputs_of())
    assert report.calls == 1
    assert report.fallbacks == {"ffn.0: it has hooks, which would not run": 1}
    assert "1 times: ffn.0: it has hooks" in str(report)


def test_compiled_code_sees_another_table():
    """It breaks the graph where it reads it."""
    block, memo, x = model_of(layers=1).blocks[0], Memo(), torch.randn(1, TOKENS, 48)
    rest = torch.ones(1, 6, 48), torch.tensor([TOKENS]), torch.tensor([GRID])

    @torch.compile(backend="eager")
    def ours(freqs):
        return isinstance(Official().bind(block, memo, x, *rest, freqs, x, None), Call)

    torch.compiler.reset()
    assert ours(twins.table(24)) and not ours(twins.table(24, theta=5000.0))


def test_arguments_of_videox_fun_are_known():
    """They say what autocast and weights say; the twin's own block does not take them."""
    model = model_of()
    report = accelerate(model)
    x, e, context = torch.randn(1, TOKENS, 48), torch.randn(1, 6, 48), torch.randn(1, 512, 48)
    rest = torch.tensor([TOKENS]), torch.tensor([GRID]), model.freqs, context, None
    made = model.blocks[0](x, e, *rest, dtype=torch.float32, t=0)
    assert report.calls == 1 and torch.equal(made, model.blocks[0](x, e, *rest))


def test_a_table_that_is_ours_again_counts_again():
    model = model_of()
    report = accelerate(model)
    ours = model.freqs
    for table, calls in ((ours, 2), (twins.table(24, 5000.0), 2), (ours.clone(), 4)):
        model.freqs = table
        model(**inputs_of())
        assert report.calls == calls


def test_bfloat16_autocast_is_as_right_as_the_original():
    """Both against float32: an official block in 16 bits, its stream in float32."""
    model, arguments = model_of(), inputs_of()
    exact = outcome(model, arguments)

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            got, grads = outcome(model, arguments)
        everything = [torch.cat([a.flatten() for a in g.values()]) for g in (grads, exact[1])]
        return relative(got, exact[0]), relative(*everything)

    original = error()
    report = accelerate(model)
    ours = error()
    assert report.calls == 2 and all(1e-4 < a < 1.2 * b for a, b in zip(ours, original, strict=True))


def test_the_official_attention_rounds_to_16_bits_but_the_probe_does_not(monkeypatch):
    monkeypatch.undo()
    model = model_of()
    accelerate(model)
    assert twins.flash_attention is not twins.attend


def test_fp8_runs_blocks_without_gradient():
    model, arguments = model_of(dim=128, heads=2, ffn_dim=128), inputs_of()
    accelerate(model)
    with torch.no_grad():
        plain = torch.cat([a.flatten() for a in model(**arguments)])
        with fp8(model):
            fast = torch.cat([a.flatten() for a in model(**arguments)])
            with torch.enable_grad():
                graded = torch.cat([a.flatten() for a in model(**arguments)])
        after = torch.cat([a.flatten() for a in model(**arguments)])
    assert 1e-3 < relative(fast, plain) < 0.1
    assert relative(graded, plain) < 1e-5 and torch.equal(after, plain)
    rest = []
    model.blocks[0].register_forward_pre_hook(lambda m, a, k: rest.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(**arguments)
    ((x, *_), more) = rest[0]
    with fp8(model), pytest.raises(UserError, match="fp8 and step_cache: .*want use_reentrant=False"):
        checkpoint(lambda x: model.blocks[0](x, **more), x.requires_grad_(), use_reentrant=True)
    del model.blocks[1:]
    restore(model)
    small = model_of()
    accelerate(small)
    with pytest.raises(UserError, match="got fp8 with heads of 24, want heads of 64 or 128"), fp8(small):
        pass


# The reward model's pooling


@pytest.mark.parametrize("queries, kind", [(1, None), (3, None), (2, "query")])
def test_reward_pool(queries, kind):
    torch.manual_seed(0)
    pool, x = randomize(twins.Pool(32, queries, return_type=kind)), torch.randn(2, 9, 32)

    def outcome():
        pool.zero_grad()
        y = x.clone().requires_grad_()
        made = pool(y)
        made.square().sum().backward()
        return made.detach(), {k: p.grad for k, p in pool.named_parameters()} | {"x": y.grad}

    def low():
        with torch.autocast("cpu", torch.bfloat16):
            return pool(x)

    want, rounded = outcome(), low()
    fast_reward_pool(torch.nn.ModuleDict({"pool": pool}))
    got = outcome()
    # The bias of the keys has no gradient: nothing depends on it.
    for grads in (got[1], want[1]):
        grads["multihead_attn.in_proj_bias"] = grads["multihead_attn.in_proj_bias"].clone()
        grads["multihead_attn.in_proj_bias"][32:64] = 0
    assert_close(got, want)
    assert low().dtype == rounded.dtype and relative(low(), want[0]) < 0.01
    restore(pool)
    again = outcome()
    assert torch.equal(again[0], want[0])


def test_reward_pool_leaves_what_it_does_not_know():
    pool = randomize(twins.Pool(32))
    x, e = torch.randn(2, 9, 32), torch.randn(2, 1, 32)
    want = pool(x, e), pool(x[:, 0])
    fast_reward_pool(pool)
    assert torch.equal(pool(x, e), want[0]) and torch.equal(pool(x[:, 0]), want[1])
    with pytest.raises(UserError, match="reward pool: its forward was replaced already"):
        fast_reward_pool(pool)
    with pytest.raises(UserError, match="got 0 QueryAttention in a Linear, want one"):
        fast_reward_pool(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="got layer_norm or product_text"):
        fast_reward_pool(twins.Pool(32, layer_norm=True))
