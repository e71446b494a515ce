"""The latent codec: an exact projection, with the strides and the refusals of a video VAE."""

import json

import pytest
import torch

from prfl_engine.media.codec import CHANNELS, BlockCodec

ATOL = 1e-4
SHAPES = [(1, 1, 8, 8), (2, 5, 8, 12), (1, 13, 64, 96), (3, 7, 40, 16)]  # B, F, H, W


def latent(b, f, h, w, dtype=torch.float32):
    return torch.randn(b, CHANNELS, 1 + f // 2, h // 4, w // 4, dtype=dtype)


@pytest.fixture
def codec():
    return BlockCodec.fit(torch.rand(4, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("b, f, h, w", SHAPES)
def test_strides(codec, b, f, h, w):
    z = codec.encode(torch.rand(b, 3, f, h, w))
    assert z.shape == (b, 16, 1 + (f - 1) // 2, h // 4, w // 4)
    assert codec.decode(z).shape == (b, 3, f, h, w)


@pytest.mark.parametrize("b, f, h, w", SHAPES)
def test_every_latent_comes_back(codec, b, f, h, w):
    z = latent(b, f, h, w)
    torch.testing.assert_close(codec.encode(codec.decode(z, clamp=False)), z, rtol=0, atol=ATOL)


def test_decode_of_encode_is_a_projection(codec):
    once = codec.decode(codec.encode(torch.rand(2, 3, 9, 16, 24)), clamp=False)
    twice = codec.decode(codec.encode(once), clamp=False)
    torch.testing.assert_close(twice, once, rtol=0, atol=ATOL)


def test_what_it_was_fitted_to_comes_back():
    gray = torch.rand(20, 3, 1, 1, 1).expand(-1, -1, 5, 16, 16)  # three components of sixteen
    codec = BlockCodec.fit(gray)
    torch.testing.assert_close(codec.decode(codec.encode(gray)), gray, rtol=0, atol=1e-5)


def test_the_first_latent_frame_sees_the_first_frame_alone(codec):
    video = torch.rand(1, 3, 9, 16, 16)
    other = video.clone()
    other[:, :, 1:] = torch.rand(1, 3, 8, 16, 16)
    z, changed = codec.encode(video), codec.encode(other)
    assert torch.equal(z[:, :, 0], changed[:, :, 0])
    assert not torch.equal(z[:, :, 1:], changed[:, :, 1:])


def test_fit_centres_and_orders_by_variance():
    x = torch.rand(64, 3, 9, 16, 16) * torch.linspace(0.1, 1, 16)
    z = BlockCodec.fit(x).encode(x)
    for part in (z[:, :, :1], z[:, :, 1:]):
        torch.testing.assert_close(part.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-3)
        std = part.std((0, 2, 3, 4), correction=0)
        assert std[0].item() == pytest.approx(1, abs=1e-3) and (std < 1.01).all()


def test_weak_components_have_less_than_unit_variance_and_none_is_divided_by_zero():
    x = torch.rand(64, 3, 1, 1, 1) + 1e-3 * torch.rand(64, 3, 5, 8, 8)
    std = BlockCodec.fit(x).encode(x).std((0, 2, 3, 4))
    assert std[3:].max() < 0.1
    assert BlockCodec.fit(torch.ones(1, 3, 5, 8, 8)).encode(torch.rand(1, 3, 5, 8, 8)).isfinite().all()


def test_both_maps_have_gradients(codec):
    codec = codec.double()
    video = torch.rand(1, 3, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    z = latent(1, 5, 8, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(codec.encode, video, fast_mode=True)
    assert torch.autograd.gradcheck(lambda z: codec.decode(z, clamp=False), z, fast_mode=True)


def test_clamp(codec):
    z = 10 * latent(1, 5, 8, 8)
    assert codec.decode(z).min() >= 0 and codec.decode(z).max() <= 1
    assert codec.decode(z, clamp=False).max() > 1


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "codec.json")
    loaded = BlockCodec.load(tmp_path / "codec.json")
    video = torch.rand(1, 3, 5, 16, 16)
    assert torch.equal(loaded.encode(video), codec.encode(video))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 8, 8), (1, 3, 5, 10, 8), (1, 3, 5, 8, 9), (1, 4, 5, 8, 8), (3, 5, 8, 8), (1, 3, 0, 8, 8),
     (1, 3, 5, 0, 8)],
)  # fmt: skip
def test_bad_videos_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"^video: got \[.*\], want \[B, 3, 1\+2k, H, W\]") as caught:
        codec.encode(torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_integers_and_bad_latents_are_refused(codec):
    with pytest.raises(ValueError, match="^video: got torch.uint8, want a floating-point"):
        codec.encode(torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^latent: got \[1, 4, 2, 8, 8\], want \[B, 16, T, h, w\]"):
        codec.decode(torch.zeros(1, 4, 2, 8, 8))


@pytest.mark.parametrize("content", ["nonsense", "[]", "{}", json.dumps({"mean": [1], "std": [1]})])
def test_a_bad_file_is_named(tmp_path, content):
    path = tmp_path / "codec.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"codec\.json: .* a codec's JSON"):
        BlockCodec.load(path)
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        BlockCodec.load(tmp_path / "none.json")
