"""The reward model: pooling against torch.nn.MultiheadAttention, freezing, and float32 logits."""

from collections import Counter

import pytest
import torch
from helpers import random_batch, relative, tiny_config, tiny_model, tiny_reward
from rounding import assert_as_right, rounding

from prfl_engine.errors import UserError
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.model.reward import QueryPool, RewardModel


def make_pool(queries=1, dim=24, heads=4, dtype=torch.float64, **arguments):
    pool = QueryPool(dim, queries, heads, **arguments).to(dtype)
    for p in pool.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return pool


def by_attention(pool, x):
    """The pooled vector as it is defined."""
    queries = pool.queries.expand(len(x), -1, -1)
    out, _ = pool.multihead_attn(queries, x, x)
    return out.mean(1) + pool.queries.mean(0) if pool.add_query else out.mean(1)


# Folding the projections is exact; float64 sums of some hundred terms in another order.
@pytest.mark.parametrize("add_query", [True, False])
@pytest.mark.parametrize("samples, tokens, queries", [(1, 1, 1), (1, 13, 1), (3, 13, 1), (2, 7, 5)])
def test_pooling_and_every_gradient_are_those_of_multihead_attention(
    samples, tokens, queries, add_query
):
    pool = make_pool(queries, add_query=add_query)
    x = torch.randn(samples, tokens, 24, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x} | dict(pool.named_parameters())
    direction = torch.randn(samples, 24, dtype=torch.float64)
    results = []
    for out in (pool(x), by_attention(pool, x)):
        gradients = torch.autograd.grad(out, list(leaves.values()), direction)
        results.append({"out": out} | dict(zip(leaves, gradients, strict=True)))
    got, want = results
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=name)
    assert set(leaves) == {
        "x", "queries", "multihead_attn.in_proj_weight", "multihead_attn.in_proj_bias",
        "multihead_attn.out_proj.weight", "multihead_attn.out_proj.bias",
    }  # fmt: skip
    # A constant on all scores of a query drops out of the softmax, and the key bias is one.
    assert got["multihead_attn.in_proj_bias"][24:48].abs().max() < 1e-12
    assert got["multihead_attn.in_proj_bias"][48:].abs().max() > 0


def test_pooling_by_finite_differences():
    pool = make_pool(2, 8, 2)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, (x,))


def test_the_mean_query_is_added_once():
    torch.manual_seed(1)
    plain, added = make_pool(3, add_query=False), make_pool(3, add_query=True)
    added.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(added(x) - plain(x), plain.queries.mean(0).expand(2, -1))


def test_the_order_of_tokens_and_queries_does_not_matter():
    pool = make_pool(4)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    want = pool(x)
    torch.testing.assert_close(pool(x[:, torch.randperm(9)]), want, rtol=1e-12, atol=1e-12)
    pool.queries.data = pool.queries.data.flip(0)
    torch.testing.assert_close(pool(x), want, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_attention_weights_in_training_only():
    pool = make_pool(2, dropout=0.5)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    pool.eval()
    still = pool(x)
    torch.testing.assert_close(still, by_attention(pool, x), rtol=1e-10, atol=1e-10)
    pool.train()
    torch.manual_seed(3)
    dropped = pool(x)
    torch.manual_seed(3)
    queries = pool.queries.expand(2, -1, -1)
    out, _ = pool.multihead_attn(queries, x, x, need_weights=False)
    torch.testing.assert_close(dropped, out.mean(1) + pool.queries.mean(0))
    assert relative(dropped, still) > 1e-3
    # Dropout keeps the mean: the mean of n draws is off by their deviation over sqrt(n).
    draws = torch.stack([pool(x) for _ in range(400)])
    off = (draws.mean(0) - still) / (draws.std(0) / 20)
    assert off.abs().max() < 5


def test_features_in_bfloat16_are_pooled_in_float32():
    pool = make_pool(2, dtype=torch.float32)
    x = torch.randn(2, 9, 24).bfloat16()
    out = pool(x)
    assert out.dtype == torch.float32
    plain = by_attention(pool, x.float())
    assert_as_right(out, by_attention(pool.double(), x.double()), plain, rounding(24))


def test_official_names():
    names = set(tiny_reward().state_dict())
    assert {k for k in names if not k.startswith("transformer.")} == {
        "pool.queries", "pool.multihead_attn.in_proj_weight", "pool.multihead_attn.in_proj_bias",
        "pool.multihead_attn.out_proj.weight", "pool.multihead_attn.out_proj.bias",
        "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
        "mlp.fc3.weight", "mlp.fc3.bias",
    }  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in tiny_reward().mlp.state_dict().items()}
    assert (shapes["fc1.weight"], shapes["fc2.weight"], shapes["fc3.weight"]) == (
        (1024, 32), (512, 1024), (1, 512),
    )  # fmt: skip


def test_the_logit_is_the_mlp_of_the_pooled_features():
    config = tiny_config(num_layers=3)
    reward, batch = tiny_reward(config, blocks=3, feature_layer=2).double(), random_batch(config)
    x, text = batch.latent.double(), batch.text.double()
    t = torch.tensor([900.0, 201.0])
    trunk = reward.transformer
    features = trunk.features(x, t, trunk.embed_context(text), blocks=2)
    pooled = by_attention(reward.pool, features)
    fc1, fc2, fc3 = reward.mlp.fc1, reward.mlp.fc2, reward.mlp.fc3
    want = fc3(fc2(fc1(pooled).relu()).relu()).squeeze(1)
    got = reward(x, t, text)
    assert got.shape == (2,)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_a_frozen_model_gives_gradient_to_its_input_alone(model_type):
    config = tiny_config(model_type)
    reward, batch = tiny_reward(config).freeze(), random_batch(config)
    x = batch.latent.clone().requires_grad_()
    t = torch.tensor([900.0, 201.0])
    reward(x, t, batch.text, batch.clip, batch.condition).sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in reward.parameters())
    assert not reward.training


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul")


class MatrixProducts(LiveBytes):
    """Counts the shapes of the results of matrix products, those inside fused operations too."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if function.overloadpacket.__name__ in PRODUCTS:
            self.shapes[tuple(out.shape)] += 1
        return out


def test_a_frozen_model_computes_no_weight_gradient():
    # With 5 video and 6 text tokens no gradient of an activation has the shape of a weight, but
    # for single rows (one sample, one query), which are left out.
    config = tiny_config(dim=40)
    reward, batch = tiny_reward(config), random_batch(config, 1, (16, 5, 2, 2))
    weights = {tuple(p.shape) for p in reward.parameters() if p.dim() == 2 and len(p) > 1}
    weights |= {s[::-1] for s in weights}
    found = []
    for frozen in (False, True):
        if frozen:
            reward.freeze()
        x = batch.latent.clone().requires_grad_()
        logit = reward(x, torch.tensor([900.0]), batch.text)
        with MatrixProducts() as products:
            logit.sum().backward()
        found.append(sum(n for s, n in products.shapes.items() if s in weights))
    trainable, frozen = found
    assert trainable >= 10  # the linear layers of the one block, at the least
    assert frozen == 0


def test_a_large_logit_keeps_its_gradient():
    """In bfloat16 the sigmoid is 1 above a logit of about 6.2, and its gradient 0."""
    config = tiny_config()
    reward, batch = tiny_reward(config), random_batch(config)
    reward.transformer.set_precision(torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        t = torch.tensor([900.0, 201.0])
        reward.mlp.fc3.bias += 9 - reward(batch.latent, t, batch.text).min()
    x = batch.latent.clone().requires_grad_()
    logit = reward(x, t, batch.text)
    assert logit.dtype == torch.float32
    assert (logit > 8.9).all()
    r = torch.sigmoid(logit)
    assert (r < 1).all()
    (gradient,) = torch.autograd.grad(r.sum(), x)
    assert gradient.flatten(1).abs().amax(1).min() > 0
    assert torch.sigmoid(logit.bfloat16()).eq(1).all()


def test_impossible_reward_models_are_refused():
    with pytest.raises(UserError, match="reward.num_heads: got 7"):
        QueryPool(32, num_heads=7)
    trunk = tiny_model(num_blocks=1, head=False)
    for layer in (0, 2):
        with pytest.raises(UserError, match=f"reward.feature_layer: got {layer}"):
            RewardModel(trunk, QueryPool(32), layer)


def products_of(model, x, t, text, clip=None, condition=None):
    """(products of the forward, of the backward to the latent)."""
    x = x.detach().requires_grad_()
    with MatrixProducts() as products:
        logit = model(x, t, text, clip, condition)
        forward = products.shapes.total()
        logit.sum().backward()
    return forward, products.shapes.total() - forward


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_a_frozen_model_makes_input_gradients_alone(model_type):
    """A block more: its products forward, and backward one for each that the latent goes through."""
    config = tiny_config(model_type, num_layers=3)
    batch, t = random_batch(config, 1), torch.tensor([500.0])
    given = (batch.latent, t, batch.text, batch.clip, batch.condition)
    small, large = (products_of(tiny_reward(config, blocks=n).freeze(), *given) for n in (1, 2))
    image = 2 if model_type == "i2v" else 0  # keys and values of the picture
    # q, k, v, o; q, o of the cross-attention and k, v of the text; two of the FFN
    assert large[0] - small[0] == 4 + 4 + image + 2
    assert large[1] - small[1] == 4 + 2 + 2
    trained = products_of(tiny_reward(config, blocks=2), *given)
    assert trained[0] == large[0] and trained[1] > 2 * large[1]
