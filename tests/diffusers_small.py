"""diffusers' own WanTransformer3DModel, small, and what its calls give."""

import torch
from diffusers import WanTransformer3DModel
from helpers import randomize, relative
from torch.distributed.tensor import DTensor

FIELDS = dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=12, freq_dim=16,
    ffn_dim=80, num_layers=2,
)  # fmt: skip


def model_of(image=False, **more):
    images = dict(in_channels=36, image_dim=24, added_kv_proj_dim=48) if image else {}
    return randomize(WanTransformer3DModel(**FIELDS | images | more))


def inputs_of(image=False, t=(900.0, 30.0)):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    clip = normal(2, 257, 24) if image else None
    return normal(2, 36 if image else 16, 2, 6, 8), torch.tensor(t), normal(2, 512, 12), clip


def whole(a):
    return a.full_tensor() if isinstance(a, DTensor) else a


def outcome(model, inputs, run=None):
    """Result, and gradients of every trained parameter and of the latents, by name."""
    model.zero_grad()
    x = inputs[0].clone().requires_grad_()
    made = (model if run is None else run)(x, *inputs[1:], return_dict=False)[0]
    made.backward(torch.randn(made.shape, generator=torch.Generator().manual_seed(5)).to(made.dtype))
    grads = {k: whole(p.grad) for k, p in model.named_parameters() if p.grad is not None}
    return made.detach(), grads | {"x": x.grad}


def assert_close(got, want, tolerance=1e-5):
    """Gradients below a hundredth of the largest have the rounding of larger ones: relative to that."""
    assert relative(got[0], want[0]) < tolerance
    assert got[1].keys() == want[1].keys()
    floor = 1e-2 * max(a.norm() for a in want[1].values())
    for name, a in want[1].items():
        assert (got[1][name] - a).norm() < tolerance * max(a.norm(), floor), name
