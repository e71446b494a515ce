"""What accelerate refuses, by name, with the model as it was."""

import patch_twins as twins
import pytest
import torch
from helpers import randomize, tiny_config, tiny_model
from torch import nn

from prfl_engine.errors import UserError
from prfl_engine.patch import accelerate, restore


@pytest.fixture(autouse=True)
def exact_attention(monkeypatch):
    monkeypatch.setattr(twins, "flash_attention", twins.attend)


def model_of(**more):
    return randomize(twins.Official(**more))


def window(model):
    model.blocks[1].self_attn.window_size = (1, 1)


def other_forward(model):
    model.blocks[0].self_attn.forward = lambda *a: a[0]


def block_forward(model):
    model.blocks[1].forward = lambda *a, **k: a[0]


def hook(model):
    model.blocks[0].ffn[2].register_forward_hook(lambda *_: None)


def hook_on_norm(model):
    model.blocks[1].cross_attn.norm_k.register_forward_pre_hook(lambda *_: None)


def window_in_a_class(model):
    class Windowed(twins.SelfAttention):
        def forward(self, *arguments):
            self.window_size = (64, 64)
            made = super().forward(*arguments)
            self.window_size = (-1, -1)
            return made

    for block in model.blocks:
        block.self_attn.__class__ = Windowed


def sparse_attention(model):
    """Every token to the 128 of its own block, by a function of its own."""

    class Sparse(twins.SelfAttention):
        def forward(self, x, seq_lens, grid_sizes, freqs):
            q, k = (self.heads(norm(m(x))) for norm, m in ((self.norm_q, self.q), (self.norm_k, self.k)))
            q, k = (twins.rotate(a, grid_sizes, freqs).split(128, 1) for a in (q, k))
            parts = zip(q, k, self.heads(self.v(x)).split(128, 1), strict=True)
            return self.o(torch.cat([twins.attend(*part) for part in parts], 1).flatten(2))

    for block in model.blocks:
        block.self_attn.__class__ = Sparse


def backward_hook(model):
    model.blocks[0].cross_attn.register_full_backward_hook(lambda *_: None)


def stored(model):
    ffn = model.blocks[1].ffn[0]
    ffn.weight = nn.Parameter(ffn.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def quantised(model):
    class Linear4bit(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model.blocks[1].self_attn.o.__class__ = Linear4bit


def subclass(model):
    class Packed(torch.Tensor):
        pass

    v = model.blocks[0].self_attn.v
    v.weight = nn.Parameter(v.weight.detach().as_subclass(Packed))


def without_bias(model):
    model.blocks[0].self_attn.k.bias = None


def without_norm(model):
    model.blocks[0].norm3 = nn.Identity()


def without_a_layer(model):
    del model.blocks[1].cross_attn.o


def other_eps(model):
    model.blocks[1].cross_attn.norm_k.eps = 1e-5


def norm_of_heads(model):
    model.blocks[0].self_attn.norm_q = twins.RMS(24, 1e-6)


def sparse(model):
    model.blocks[0].to_gate_compress = nn.Linear(48, 48)


def buffer(model):
    model.blocks[0].self_attn.register_buffer("scale", torch.ones(1))


def dropout(model):
    model.blocks[1].ffn.insert(2, nn.Dropout(0.1))


def another_block(model):
    model.blocks[1] = nn.Linear(2, 2)


def table(model):
    model.freqs = twins.table(24, theta=5000.0)


def activation(model):
    for block in model.blocks:
        block.ffn[1] = nn.GELU()


def residual(model):
    class Other(twins.Block):
        def forward(self, x, *a, **k):
            return super().forward(x, *a, **k) + 1e-4 * x

    model.blocks[1].__class__ = Other


WORDS = {
    window: r"blocks.1: self_attn: it attends to a window of \(1, 1\)",
    other_forward: "blocks.0: self_attn: its forward was replaced",
    block_forward: "blocks.1: its forward was replaced .offloading, caching.; call accelerate before",
    hook: "blocks.0: ffn.2: it has hooks, which would not run",
    hook_on_norm: "blocks.1: cross_attn.norm_k: it has hooks",
    window_in_a_class: r"the original Block and ours differ: ValueError: attention to a window of \(64, 64\)",
    sparse_attention: "blocks.0: the original Block and ours differ: a relative distance of",
    backward_hook: "blocks.0: cross_attn: it has hooks",
    stored: "blocks.1: ffn.0: it is stored as float8_e4m3fn",
    quantised: "blocks.1: self_attn.o: it is a Linear4bit, not a plain linear layer",
    subclass: "blocks.0: self_attn.v: it is a Packed",
    without_bias: "blocks.0: self_attn.k: it has no bias",
    without_norm: "blocks.0: norm3: it is no norm over 48 channels with a weight",
    without_a_layer: "blocks.1: it is not as in WanModel .*: 'CrossAttention' object has no attribute 'o'",
    other_eps: "blocks.1: cross_attn.norm_k: its eps is 1e-05, that of the first norm 1e-06",
    norm_of_heads: "blocks.0: self_attn.norm_q: it is no norm over 48 channels",
    sparse: "blocks.0: to_gate_compress.weight, to_gate_compress.bias: our block has nothing like it",
    buffer: "blocks.0: self_attn.scale: our block has nothing like it",
    dropout: r"blocks.1: ffn.2: it drops values out \(p = 0.1\)",
    another_block: "blocks.1: it is a Linear without the parts of WanModel",
    table: "Official: freqs: it has another table of rotations than Wan's",
    activation: r"blocks.0: the original Block and ours differ: a relative distance of \d\.\de-0[45]",
    residual: r"blocks.1: the original Other and ours differ: a relative distance of \d\.\de-0[45]",
}


@pytest.mark.parametrize("change", WORDS, ids=lambda change: change.__name__)
def test_what_ours_does_not_compute_is_refused_by_name(change):
    model = model_of()
    change(model)
    before = [vars(block).get("forward") for block in model.blocks]
    with pytest.raises(UserError, match=WORDS[change]):
        accelerate(model)
    assert [vars(block).get("forward") for block in model.blocks] == before


def test_what_is_no_such_transformer():
    for model, words in (
        (nn.Linear(2, 2), "got a Linear with 0 lists of blocks, want one Wan transformer"),
        (nn.ModuleList([model_of(), model_of()]), "got a ModuleList with 2 lists of blocks"),
        (tiny_model(tiny_config()), "WanTransformer: it is ours, and runs our operations already"),
    ):
        with pytest.raises(UserError, match=words):
            accelerate(model)
    model = model_of()
    model.blocks[0] = nn.Linear(2, 2)
    with pytest.raises(UserError, match="Official: its blocks Linear are none that is known; want WanTr"):
        accelerate(model)


def test_twice_is_once_too_often_and_what_came_after_goes_first():
    model = model_of()
    accelerate(nn.ModuleDict({"dit": model}))
    with pytest.raises(UserError, match="blocks.0: it is accelerated already; restore.model. undoes that"):
        accelerate(model)
    ours, model.blocks[1].forward = model.blocks[1].forward, lambda *a, **k: a[0]
    with pytest.raises(UserError, match="Official: 1 of 2 blocks had their forward replaced"):
        restore(model)
    assert "forward" in vars(model.blocks[0])
    model.blocks[1].forward = ours
    restore(model)
    accelerate(model)


def test_weights_that_are_zero_or_not_there_are_probed_too():
    """Random ones take their place: nothing of the model's own is read."""
    with torch.device("meta"):
        model = twins.Official()
    accelerate(model)
    wrong = twins.Official()
    for block in wrong.blocks:
        nn.init.zeros_(block.ffn[2].weight)
        block.ffn[1] = nn.GELU()
    with pytest.raises(UserError, match="a relative distance of"):
        accelerate(wrong)
    assert all(not block.ffn[2].weight.any() for block in wrong.blocks)


def test_the_generator_of_torch_is_left_alone():
    model, state = model_of(), torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
