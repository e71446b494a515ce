"""The latent codec of whole frames: an exact projection, and its refusals."""

import pytest
import torch
from safetensors.torch import save_file

from prfl_engine.media.codec import FLOOR, NAMES, FrameCodec

SIZE = 8, 12
ATOL = 1e-4


def videos(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def codec():
    return FrameCodec.fit(videos(60, 3, 5, *SIZE), channels=16)


@pytest.mark.parametrize("b, f", [(1, 1), (2, 5), (3, 13)])
def test_a_latent_frame_is_a_frame(codec, b, f):
    z = codec.encode(torch.rand(b, 3, f, *SIZE))
    assert z.shape == (b, 16, f, 1, 1) and codec.size == SIZE
    assert codec.decode(z).shape == (b, 3, f, *SIZE)


def test_every_latent_comes_back(codec):
    z = torch.randn(2, 16, 7, 1, 1)
    torch.testing.assert_close(codec.encode(codec.decode(z, clamp=False)), z, rtol=0, atol=ATOL)


def test_decode_of_encode_is_a_projection(codec):
    once = codec.decode(codec.encode(videos(2, 3, 9, *SIZE, seed=1)), clamp=False)
    torch.testing.assert_close(codec.decode(codec.encode(once), clamp=False), once, rtol=0, atol=ATOL)


def test_what_it_was_fitted_to_comes_back():
    flat = torch.rand(40, 3, 5, 1, 1).expand(-1, -1, -1, *SIZE)  # three components
    codec = FrameCodec.fit(flat, channels=8)
    torch.testing.assert_close(codec.decode(codec.encode(flat)), flat, rtol=0, atol=ATOL)


def test_the_first_latent_frame_sees_the_first_frame_alone(codec):
    video = videos(1, 3, 9, *SIZE, seed=2)
    other = video.clone()
    other[:, :, 1:] = 0.5
    z, changed = codec.encode(video), codec.encode(other)
    assert torch.equal(z[:, :, 0], changed[:, :, 0]) and not torch.equal(z[:, :, 1:], changed[:, :, 1:])


def test_of_what_stands_still_nothing_is_said_twice(codec):
    still = codec.decode(codec.encode(videos(1, 3, 1, *SIZE)), clamp=False).expand(-1, -1, 6, -1, -1)
    assert codec.encode(still)[:, :, 1:].abs().max() < ATOL


def test_fit_orders_by_variance():
    x = videos(200, 3, 5, *SIZE) * torch.linspace(0.1, 1, SIZE[1])
    z = FrameCodec.fit(x, channels=16).encode(x).flatten(3).squeeze(-1)
    std = z[:, :, 0].std(0, correction=0)
    torch.testing.assert_close(z[:, :, 0].mean(0), torch.zeros(16), rtol=0, atol=1e-3)
    assert std[0].item() == pytest.approx(1, abs=1e-3) and (std < 1.001).all()
    power = z[:, :, 1:].square().mean((0, 2)).sqrt()  # about the first frame, not about a mean
    assert power[0].item() == pytest.approx(1, abs=1e-3) and (power < 1.001).all()


def test_weak_components_have_less_than_unit_variance_and_none_is_divided_by_zero():
    x = torch.rand(64, 3, 1, 1, 1) + 1e-3 * torch.rand(64, 3, 5, *SIZE)
    codec = FrameCodec.fit(x, channels=8)
    assert (codec.scale >= 0.999 * FLOOR * codec.scale[0]).all()
    assert codec.encode(x)[:, :, 0].std(0)[3:].max() < 0.1
    assert FrameCodec.fit(torch.ones(1, 3, 5, *SIZE), 4).encode(torch.rand(1, 3, 5, *SIZE)).isfinite().all()


def test_both_maps_have_gradients(codec):
    video = videos(1, 3, 3, *SIZE).double().requires_grad_()
    z = torch.randn(1, 16, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(codec.encode, video, fast_mode=True)
    assert torch.autograd.gradcheck(lambda z: codec.decode(z, clamp=False), z, fast_mode=True)


def test_clamp(codec):
    z = 10 * torch.randn(1, 16, 5, 1, 1)
    assert codec.decode(z).min() >= 0 and codec.decode(z).max() <= 1
    assert codec.decode(z, clamp=False).max() > 1


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    loaded = FrameCodec.load(tmp_path / "codec.safetensors")
    video = videos(1, 3, 5, *SIZE)
    assert torch.equal(loaded.encode(video), codec.encode(video))


BAD = (1, 3, 5, 8, 11), (1, 3, 5, 7, 12), (1, 4, 5, 8, 12), (3, 5, 8, 12), (1, 3, 0, 8, 12)


@pytest.mark.parametrize("shape", BAD)
def test_bad_videos_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"^video: got \[.*\], want \[B, 3, F, 8, 12\]$"):
        codec.encode(torch.zeros(shape))


def test_integers_and_bad_latents_are_refused(codec):
    with pytest.raises(ValueError, match="^video: got torch.uint8, want a floating-point"):
        codec.encode(torch.zeros(1, 3, 5, *SIZE, dtype=torch.uint8))
    for shape in (1, 4, 2, 1, 1), (1, 16, 2, 2, 1), (1, 16, 0, 1, 1):
        with pytest.raises(ValueError, match=r"^latent: got \[.*\], want \[B, 16, F, 1, 1\]$"):
            codec.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="^channels: got 289, want 1 to 288"):
        FrameCodec.fit(torch.rand(1, 3, 2, *SIZE), 289)


def bad_tensors(codec):
    good = {name: getattr(codec, name).clone() for name in NAMES}
    yield good | {"basis": good["basis"][:, :, :4].contiguous()}, "basis: got .*, want shape"
    yield good | {"scale": good["scale"][0]}, "scale: got .*, want shape"
    yield good | {name: good[name][:0] for name in NAMES if name != "mean"}, "scale: got .*, want shape"
    yield good | {"change_scale": -good["change_scale"]}, "change_scale: got .*, want positive"
    yield good | {"mean": good["mean"] * float("nan")}, "mean"
    yield {"mean": good["mean"]}, "not a codec: got tensors"


def test_a_bad_file_is_named(codec, tmp_path):
    path = tmp_path / "codec.safetensors"
    for content, message in bad_tensors(codec):
        save_file(content, path)
        with pytest.raises(ValueError, match=rf"codec\.safetensors: .*{message}"):
            FrameCodec.load(path)
    path.write_text("nonsense")
    with pytest.raises(ValueError, match=r"codec\.safetensors"):
        FrameCodec.load(path)
    with pytest.raises(ValueError, match=r"none\.safetensors: no such file"):
        FrameCodec.load(tmp_path / "none.safetensors")
