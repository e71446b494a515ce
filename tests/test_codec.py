"""The DCT latent codec: an exact projection, with the strides and the refusals of a video VAE."""

import json

import pytest
import torch

from prfl_engine.media.codec import CHANNELS, DCTCodec

# fit() on uniform noise gives mean / std up to about 30, so a float32 rounding weighs 30 * 1.2e-7; a
# few of them meet in every coefficient.
ATOL = 1e-4
SHAPES = [(1, 1, 8, 8), (2, 5, 8, 24), (1, 17, 64, 96), (3, 9, 40, 16)]  # B, F, H, W


def latent(b, f, h, w, dtype=torch.float32):
    return torch.randn(b, CHANNELS, 1 + f // 4, h // 8, w // 8, dtype=dtype)


@pytest.fixture
def codec():
    return DCTCodec.fit(torch.rand(4, 3, 9, 32, 32))


@pytest.mark.parametrize("b, f, h, w", SHAPES)
def test_strides(codec, b, f, h, w):
    z = codec.encode(torch.rand(b, 3, f, h, w))
    assert z.shape == (b, 16, 1 + (f - 1) // 4, h // 8, w // 8)
    assert codec.decode(z).shape == (b, 3, f, h, w)


@pytest.mark.parametrize("b, f, h, w", SHAPES)
def test_every_latent_comes_back(codec, b, f, h, w):
    z = latent(b, f, h, w)
    torch.testing.assert_close(codec.encode(codec.decode(z, clamp=False)), z, rtol=0, atol=ATOL)


def test_decode_of_encode_is_a_projection(codec):
    once = codec.decode(codec.encode(torch.rand(2, 3, 9, 16, 24)), clamp=False)
    twice = codec.decode(codec.encode(once), clamp=False)
    torch.testing.assert_close(twice, once, rtol=0, atol=ATOL)


def test_a_plain_gray_survives_and_a_still_scene_has_equal_shared_channels():
    codec = DCTCodec()
    gray = torch.full((1, 3, 5, 16, 16), 0.3)
    torch.testing.assert_close(codec.decode(codec.encode(gray)), gray, rtol=0, atol=1e-5)
    z = codec.encode(torch.rand(1, 3, 1, 16, 16).expand(-1, -1, 5, -1, -1))
    torch.testing.assert_close(z[:, :12, 0], z[:, :12, 1], rtol=0, atol=ATOL)
    assert z[:, 12:, 1].abs().max() < ATOL  # no motion


def test_the_first_latent_frame_sees_the_first_frame_alone(codec):
    video = torch.rand(1, 3, 9, 16, 16)
    other = video.clone()
    other[:, :, 1:] = torch.rand(1, 3, 8, 16, 16)
    z, changed = codec.encode(video), codec.encode(other)
    assert torch.equal(z[:, :, 0], changed[:, :, 0])
    assert not torch.equal(z[:, :, 1:], changed[:, :, 1:])


def test_motion_inside_a_block_is_kept():
    forward = torch.linspace(0, 1, 8)[None, :].expand(8, 8)
    frames = torch.stack([forward.roll(2 * t, 1) for t in range(5)])
    video = frames.expand(1, 3, 5, 8, 8)
    backward = video.clone()
    backward[:, :, 1:] = video[:, :, 1:].flip(2)
    codec = DCTCodec()
    gap = (codec.encode(video) - codec.encode(backward))[:, :, 1].flatten(1).abs().amax(1)
    assert gap > 0.1


def test_fit_normalises_and_constant_channels_stay_finite():
    z = DCTCodec.fit(x := torch.rand(8, 3, 9, 32, 32)).encode(x)
    for part in (z[:, :, :1], z[:, :, 1:]):
        torch.testing.assert_close(part.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-4)
        torch.testing.assert_close(part.std((0, 2, 3, 4), correction=0), torch.ones(16), rtol=0, atol=1e-3)
    assert DCTCodec.fit(torch.ones(1, 3, 5, 8, 8)).encode(torch.rand(1, 3, 5, 8, 8)).isfinite().all()


def test_both_maps_have_gradients():
    codec = DCTCodec().double()
    video = torch.rand(1, 3, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    z = latent(1, 5, 8, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(codec.encode, video, fast_mode=True)
    assert torch.autograd.gradcheck(lambda z: codec.decode(z, clamp=False), z, fast_mode=True)


def test_clamp():
    z = 10 * latent(1, 5, 8, 8)
    codec = DCTCodec()
    assert codec.decode(z).min() >= 0 and codec.decode(z).max() <= 1
    assert codec.decode(z, clamp=False).max() > 1


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "codec.json")
    loaded = DCTCodec.load(tmp_path / "codec.json")
    video = torch.rand(1, 3, 5, 16, 16)
    assert torch.equal(loaded.encode(video), codec.encode(video))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 8, 8), (1, 3, 5, 12, 8), (1, 3, 5, 8, 9), (1, 4, 5, 8, 8), (3, 5, 8, 8), (1, 3, 0, 8, 8),
     (1, 3, 5, 0, 8)],
)  # fmt: skip
def test_bad_videos_are_refused(shape):
    with pytest.raises(ValueError, match=r"^video: got \[.*\], want \[B, 3, 1\+4k, H, W\]") as caught:
        DCTCodec().encode(torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_integers_and_bad_latents_are_refused():
    with pytest.raises(ValueError, match="^video: got torch.uint8, want a floating-point"):
        DCTCodec().encode(torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^latent: got \[1, 4, 2, 8, 8\], want \[B, 16, T, h, w\]"):
        DCTCodec().decode(torch.zeros(1, 4, 2, 8, 8))


@pytest.mark.parametrize("content", ["nonsense", "[]", "{}", json.dumps({"mean": [1], "std": [1]})])
def test_a_bad_file_is_named(tmp_path, content):
    path = tmp_path / "codec.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"codec\.json: .* a codec's JSON"):
        DCTCodec.load(path)
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        DCTCodec.load(tmp_path / "none.json")
