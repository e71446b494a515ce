"""Under torch.autocast operations and models compute in the dtypes they were told: the same bits."""

import pytest
import torch
from helpers import model_and_batch, random_batch, randomize, tiny_config, tiny_model, tiny_reward, under
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.config import ChainConfig, LoraConfig, LossConfig, RolloutConfig
from prfl_engine.memory.policy import BlockPolicy
from prfl_engine.model import lora
from prfl_engine.model.wan import plain_blocks
from prfl_engine.objectives import (
    bradley_terry,
    cross_entropy,
    graded_windows,
    noisy_reward,
    reward_loss,
    sft_loss,
)
from prfl_engine.rollout.accelerated import Rollout
from prfl_kernels import dispatch
from prfl_kernels.attention.fp8 import attention_fp8, quantize_values
from prfl_kernels.attention.op import attention_with_lse
from prfl_kernels.bias_gelu import bias_gelu
from prfl_kernels.fp8.linear import fp8_linear
from prfl_kernels.fp8.quantize import quantize_fp8
from prfl_kernels.jit import REGISTERED
from prfl_kernels.linear import linear
from prfl_kernels.norm.gated_add import (
    gated_add,
    gated_add_modulate,
    gated_add_modulate_fp8,
    gated_add_norm,
)
from prfl_kernels.norm.op import layer_norm, modulate, modulate_fp8
from prfl_kernels.qk_norm_rope.op import qk_norm_rope, qk_norm_rope_fp8, rms_norm
from prfl_kernels.reward_pool.op import reward_pool_with_lse
from prfl_kernels.solver_step import solver_step
from prfl_kernels.sublayers.cross_attention import ImageWeights, cross_attention
from prfl_kernels.sublayers.ffn import FFNWeights, modulated_ffn
from prfl_kernels.sublayers.products import AttentionWeights, LowRank
from prfl_kernels.sublayers.self_attention import modulated_attention

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
B, L, C, F, HEADS, GRID, RANK = 2, 6, 32, 48, 2, (1, 2, 3), 2
AUTOCAST = pytest.mark.parametrize("autocast", [BF16, F16])


@pytest.fixture(autouse=True)
def default_table():
    yield
    dispatch.configure("")


def normal(*shape, dtype=F32):
    return torch.randn(shape).to(dtype)


def projections(count):
    return [normal(*s) for s in ((C, C), (C,)) * count]


def attention_sublayer(dtype):
    def run(x, shift, scale, gate, norm_weight, norm_bias, down, up, *weights):
        made = modulated_attention(
            x, shift, scale, gate, AttentionWeights(*weights), GRID, HEADS, norm=(norm_weight, norm_bias),
            dtype=dtype, keep="nothing", low={"q": LowRank(down, up, 2.0)},
        )  # fmt: skip
        return made.x, made.n

    vectors = [normal(B, C) for _ in range(3)]
    update = normal(RANK, C), normal(C, RANK)
    norms = [normal(C) for _ in range(4)]
    return run, [normal(B, L, C), *vectors, *norms[:2], *update, *projections(4), *norms[2:]]


def ffn_sublayer(dtype):
    def run(x, y, shift, scale, gate, down, up, *weights):
        low = {"w1": LowRank(down, up, 2.0)}
        return modulated_ffn(x, y, shift, scale, gate, FFNWeights(*weights), dtype=dtype, low=low)

    update, weights = (normal(RANK, C), normal(F, RANK)), (normal(F, C), normal(F), normal(C, F), normal(C))
    vectors = [normal(B, C) for _ in range(3)]
    return run, [normal(B, L, C), normal(B, L, C, dtype=dtype), *vectors, *update, *weights]


def cross_sublayer(dtype):
    def run(x, context, down, up, *weights):
        whole, image = AttentionWeights(*weights[:10]), ImageWeights(*weights[10:])
        low = {"q": LowRank(down, up, 2.0)}
        return cross_attention(x, context, whole, HEADS, image, 2, 1e-6, dtype, "nothing", 3, low)

    weights = [*projections(4), normal(C), normal(C), *projections(2), normal(C)]
    # One sample: how torch multiplies a strided batch depends on requires_grad, which compiled code drops.
    return run, [normal(1, L, C), normal(1, 5, C), normal(RANK, C), normal(C, RANK), *weights]


def linear_layer(x, weight, bias, down, up):
    return linear(x, weight, bias, LowRank(down, up, 2.0))


def fp8_chain(x, shift, scale, w, bias, norm_q, norm_k):
    """All operations in e4m3, one after the other; no gradient."""
    q = fp8_linear(*modulate_fp8(x, scale, shift), *quantize_fp8(w), bias)
    q8, k8, q_scale, k_scale = qk_norm_rope_fp8(q, q, norm_q, norm_k, GRID, 1)
    out, lse = attention_fp8(q8, q_scale, k8, k_scale, *quantize_values(q.unflatten(2, (1, -1))))
    n = gated_add_modulate_fp8(x, out.flatten(2), shift, scale, shift)
    return [a.float() for a in (*n, *quantize_fp8(q, gelu=True), out, lse)]


# Name: what makes (a function of tensors with gradient, the tensors), with the dtypes that autocast leaves
# around it: sublayers in 16 bits on a stream in float32, and all in float32.
CASES = {
    "attention": lambda: (attention_with_lse, [normal(B, n, HEADS, 16) for n in (L, 5, 5)]),
    "attention in bfloat16": lambda: (
        attention_with_lse, [normal(B, n, HEADS, 16, dtype=BF16) for n in (L, 5, 5)]
    ),
    "modulated_attention": lambda: attention_sublayer(F32),
    "modulated_attention in bfloat16": lambda: attention_sublayer(BF16),
    "modulated_ffn": lambda: ffn_sublayer(F32),
    "modulated_ffn in bfloat16": lambda: ffn_sublayer(BF16),
    "cross_attention": lambda: cross_sublayer(F32),
    "cross_attention in bfloat16": lambda: cross_sublayer(BF16),
    "linear": lambda: (
        linear_layer, [normal(B, L, C), normal(F, C), normal(F), normal(RANK, C), normal(F, RANK)]
    ),
    "linear of groups": lambda: (linear, [normal(B, L, C), normal(B, F, C)]),
    "reward_pool": lambda: (reward_pool_with_lse, [normal(B, L, C), normal(3, C)]),
    "reward_pool in bfloat16": lambda: (reward_pool_with_lse, [normal(B, L, C, dtype=BF16), normal(3, C)]),
    "modulate": lambda: (
        lambda x, a, b: modulate(x, a, b, out_dtype=BF16), [normal(B, L, C), normal(B, C), normal(B, C)]
    ),
    "layer_norm": lambda: (layer_norm, [normal(B, L, C), normal(C), normal(C)]),
    "gated_add": lambda: (gated_add, [normal(B, L, C), normal(B, L, C, dtype=BF16), normal(B, C)]),
    "gated_add_modulate": lambda: (
        gated_add_modulate,
        [normal(B, L, C), normal(B, L, C, dtype=BF16), *(normal(B, C) for _ in range(3))],
    ),
    "gated_add_norm": lambda: (
        gated_add_norm, [normal(B, L, C), normal(B, L, C), normal(B, C), normal(C), normal(C)]
    ),
    "rms_norm": lambda: (rms_norm, [normal(B, L, C, dtype=BF16), normal(C)]),
    "qk_norm_rope": lambda: (
        lambda *a: qk_norm_rope(*a, GRID, HEADS),
        [normal(B, L, C, dtype=BF16), normal(B, L, C, dtype=BF16), normal(C), normal(C)],
    ),
    "bias_gelu": lambda: (bias_gelu, [normal(B, L, F, dtype=BF16), normal(F)]),
    "solver_step": lambda: (
        lambda *a: solver_step(*a, torch.linspace(0.1, 0.9, 9).expand(B, -1)),
        [*(normal(B, L) for _ in range(4)), normal(B, L, dtype=BF16)],
    ),
    "fp8": lambda: (
        torch.no_grad()(fp8_chain),
        [normal(*s, 128) for s in ((B, L), (B,), (B,), (128,), (), (), ())],
    ),
}  # fmt: skip


def tensors(made):
    return [made] if isinstance(made, torch.Tensor) else [a for a in made if a is not None]


def outcome(run, inputs, autocast, inside=False):
    """Results and gradients; the forward under autocast to a dtype (None: without), the backward too if
    `inside`."""
    inputs = [a.detach().clone().requires_grad_() for a in inputs]
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        made = tensors(run(*inputs))
    graded = [a for a in made if a.requires_grad]
    if not graded:
        return made
    with torch.autocast("cpu", autocast or BF16, enabled=inside):
        return made + list(torch.autograd.grad(graded, inputs, [torch.ones_like(a) for a in graded]))


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@AUTOCAST
@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_the_same_bits(reference, name, autocast):
    run, inputs = CASES[name]()
    want = outcome(run, inputs, None)
    for inside in (False, True):
        assert_same(outcome(run, inputs, autocast, inside), want)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prfl":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_every_operation_has_a_case(reference):
    with Called() as called:
        for make in CASES.values():
            outcome(*make(), None)
    assert called.names == set(REGISTERED)


@pytest.mark.parametrize("name", [name for name in CASES if name != "fp8"])
def test_a_compiled_operation_gives_the_same_bits(reference, name):
    run, inputs = CASES[name]()
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, inputs, BF16, inside=True), outcome(compiled, inputs, None))


# Models


def gradients(module, *more):
    found = [*(p.grad for p in module.parameters()), *(a.grad for a in more)]
    return [None if a is None else a.clone() for a in found]


def same_outcome(step, autocast):
    """step(forward, backward) gives tensors, with these two contexts around its parts; all the same bits."""

    def context(on):
        return lambda: torch.autocast("cpu", autocast, enabled=on)

    want = step(context(False), context(False))
    for forward, backward in ((True, False), (True, True), (False, True)):
        got = step(context(forward), context(backward))
        assert all((a is None) == (b is None) for a, b in zip(got, want, strict=True))
        assert_same(tensors(got), tensors(want))


def velocity_step(model, batch, run_blocks=plain_blocks):
    """A forward and backward of a transformer."""

    def step(forward, backward):
        x = batch.latent.clone().requires_grad_()
        model.zero_grad()
        with forward():
            context = model.embed_context(batch.text, batch.clip)
            v = model(x, torch.tensor([500.0, 20.0]), context, batch.condition, run_blocks)
        with backward():
            v.square().sum().backward()
        return [v.detach(), *gradients(model, x)]

    return step


@AUTOCAST
@pytest.mark.parametrize("kernels", ["reference", ""])
@pytest.mark.parametrize("model_type, dtype", [("t2v", None), ("i2v", None), ("t2v", BF16)])
def test_a_transformer_gives_the_same_bits(model_type, dtype, kernels, autocast):
    dispatch.configure(kernels)
    config = tiny_config(model_type)
    model = tiny_model(config).set_precision(dtype)
    same_outcome(velocity_step(model, random_batch(config)), autocast)


POLICIES = {
    "full": "full",
    "attention": "attention",
    "offload": BlockPolicy({"cross_queries"}, {"input", "attention", "hidden"}),
}


@pytest.mark.parametrize("trained", ["whole", "lora"])
@pytest.mark.parametrize("policy", POLICIES)
def test_recomputed_blocks_give_the_same_bits(reference, policy, trained):
    """The backward computes again under another autocast than the forward."""
    model, batch = model_and_batch()
    if trained == "lora":
        lora.attach(model, LoraConfig(rank=2))
        randomize(model)
    same_outcome(velocity_step(model, batch, under(POLICIES[policy])), BF16)


@AUTOCAST
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_reward_model_gives_the_same_bits(reference, dropout, autocast):
    """Both losses of its training."""
    config = tiny_config()
    reward = tiny_reward(config, num_queries=3, dropout=dropout).train()
    win, lose = random_batch(config), random_batch(config)
    sigma, label = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 0.0])

    def step(forward, backward):
        torch.manual_seed(0)
        reward.zero_grad()
        with forward():
            noise = torch.ones_like(win.latent)
            logits = [noisy_reward(reward, batch, noise, sigma) for batch in (win, lose)]
            loss = cross_entropy(logits[0], label) + bradley_terry(*logits)
        with backward():
            loss.sum().backward()
        return [loss.detach(), *gradients(reward)]

    same_outcome(step, autocast)


@AUTOCAST
def test_graded_windows_and_flow_matching_give_the_same_bits(reference, autocast):
    config = tiny_config()
    policy, reward, batch = tiny_model(config), tiny_reward(config).freeze(), random_batch(config)
    schedule, noise = flow.make_schedule("unipc", steps=4, shift=5.0), torch.randn_like(batch.latent)
    indices = torch.tensor([[0, 1], [2, 2]])

    def step(forward, backward):
        policy.zero_grad()
        with forward():
            losses = [sft_loss(policy, batch, noise, torch.tensor([0.3, 0.8]))]
            given = policy, reward, schedule, batch, noise, indices, ChainConfig(window=2)
            for window in graded_windows(*given):
                losses.append(reward_loss(window.logit, LossConfig()))
                with backward():
                    window.backward(losses[-1].sum())
        with backward():
            losses[0].sum().backward()
        return [*(a.detach() for a in losses), *gradients(policy)]

    same_outcome(step, autocast)


def test_a_rollout_in_fp8_with_lora_gives_the_same_bits(reference):
    model, batch = model_and_batch(dim=64, num_heads=1, ffn_dim=64)
    randomize(lora.attach(model, LoraConfig(rank=2)))
    schedule, noise = flow.make_schedule("unipc", steps=3, shift=5.0), torch.randn_like(batch.latent)
    rollout = Rollout(model, RolloutConfig(precision="fp8"), schedule)

    def step(forward, backward):
        with forward():
            return [rollout.drift(Batch(*batch), noise, torch.tensor([2, 2]))]

    same_outcome(step, BF16)


def test_compiled_blocks_give_the_same_bits(reference):
    model, batch = model_and_batch()
    torch.compiler.reset()
    model.compile_blocks("aot_eager")
    same_outcome(velocity_step(model, batch), BF16)
