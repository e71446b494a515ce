"""Wan's encoders in the layouts of diffusers and of Wan's own repositories."""

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import encoder_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from prfl_engine.encode import encoders, text
from prfl_engine.encode.encoders import IMAGE, TEXT, VAE, ImageEncoder, TextEncoder, VideoVAE
from prfl_engine.errors import UserError

for package in ("diffusers", "transformers"):
    pytest.importorskip(package)


GOLDEN = Path(__file__).parent / "golden/wan22/vae"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return cases.write_diffusers(folder / "diffusers"), cases.write_native(folder / "native")


def test_both_layouts_are_the_same_encoders(folders):
    video, prompts = torch.rand(1, 3, 9, 32, 48), ["a cat", "a red boat in a storm", ""]
    one, other = (VideoVAE(folder) for folder in folders)
    latent = one.encode(video)
    assert latent.shape == (1, 16, 3, 4, 6) and torch.equal(latent, other.encode(video))
    decoded = one.decode(latent)
    assert decoded.shape == video.shape and torch.equal(decoded, other.decode(latent))
    assert decoded.min() >= 0 and decoded.max() <= 1
    one, other = (TextEncoder(folder, dtype=torch.float32) for folder in folders)
    for a, b, tokens in zip(one(prompts), other(prompts), (3, 7, 1), strict=True):
        assert a.shape == (tokens, cases.TEXT_DIM) and torch.equal(a, b)
    assert TextEncoder(folders[1])(["a cat"])[0].dtype == torch.bfloat16
    one, other = (ImageEncoder(folder) for folder in folders)
    assert torch.equal(one(video[:, :, 0]), other(video[:, :, 0]))


@pytest.fixture(scope="module")
def wan22():
    return VideoVAE(GOLDEN)


def test_the_vae_of_wan22_is_the_official_one(wan22):
    """Values of the official module (scripts/check_encoders.py --golden); measured: 3e-6 at most."""
    want = load_file(GOLDEN / "expected.safetensors")
    latent, decoded = want["encoded"], want["decoded"] / 2 + 0.5
    assert latent.shape == (1, 48, 3, 2, 2) and decoded.shape == (1, 3, 9, 32, 32)
    got = wan22.encode(want["video"] / 255)
    assert (got - latent).abs().max() < 1e-5 * latent.abs().max()
    assert (wan22.decode(latent) - decoded).abs().max() < 1e-5


def test_the_vae_of_wan22_in_both_layouts(wan22, tmp_path):
    wan22.model.save_pretrained(tmp_path / "vae")
    other, video = VideoVAE(tmp_path), torch.rand(1, 3, 1, 32, 32)
    assert torch.equal(other.encode(video), wan22.encode(video))
    for path, want in ((tmp_path, wan22.latents), (GOLDEN, wan22.latents), (tmp_path / "vae", other.latents)):
        assert encoders.latents_of(path) == want == (48, 16)


def test_a_vae_works_on_one_latent_frame_at_a_time(wan22):
    """Whatever the length of a video."""
    seen = []
    hooks = [
        m.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[2]))
        for m in (wan22.model.encoder, wan22.model.decoder)
    ]
    latent = wan22.encode(torch.rand(1, 3, 13, 16, 16))
    assert seen == [1, 4, 4, 4]
    wan22.decode(latent)
    assert seen[4:] == [1, 1, 1, 1]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("read, given, needle", [
    (encoders.latents_of, {"z_dim": 32}, "z_dim: got 32, want 16 of Wan2.1's VAE, or 48 of Wan2.2's"),
    (VideoVAE, {"z_dim": 32}, "z_dim: got 32, want 16 of Wan2.1's VAE, or 48 of Wan2.2's"),
    (VideoVAE, {"patch_size": 2, "in_channels": 12, "out_channels": 12},
     "pixels a side of a latent: got 16, want 8 with 16 channels"),
])  # fmt: skip
def test_another_vae_is_refused(read, given, needle, tmp_path):
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(base_dim=2, dim_mult=[1, 1, 1, 1], **given).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=needle):
        read(tmp_path)


def test_a_number_of_channels_is_one(folders, tmp_path):
    shutil.copytree(folders[0] / "vae", tmp_path / "vae")
    config = tmp_path / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"z_dim": [16]}))
    with pytest.raises(UserError, match=r"z_dim: got \[16\], want 16 of"):
        encoders.latents_of(tmp_path)


def test_of_two_vaes_a_path_names_one(folders, tmp_path):
    shutil.copy(folders[1] / "Wan2.1_VAE.pth", tmp_path / "Wan2.1_VAE.pth")
    shutil.copy(folders[1] / "Wan2.1_VAE.pth", tmp_path / "Wan2.2_VAE.pth")
    with pytest.raises(UserError, match=r"got \['Wan2.1_VAE.pth', 'Wan2.2_VAE.pth'\], want the path of one"):
        encoders.find(VAE, tmp_path)


def test_a_text_does_not_depend_on_its_batch_and_is_cut_at_512_tokens(folders):
    encoder = TextEncoder(folders[0], dtype=torch.float32)
    alone, (batched, long) = encoder(["a cat"])[0], encoder(["a cat", "boat " * 600])
    assert (alone - batched).abs().max() < 1e-5
    assert len(long) == encoders.TEXT_LEN


def test_a_path_may_name_one_encoder(folders, tmp_path):
    diffusers, native = folders
    assert encoders.find(VAE, diffusers / "vae") == diffusers / "vae"
    assert encoders.find(TEXT, diffusers) == diffusers / "text_encoder"
    assert encoders.find(IMAGE, native).parent == native
    assert encoders.find_tokenizer(diffusers / "text_encoder") == diffusers / "tokenizer"
    assert encoders.find_tokenizer(native) == native / "google/umt5-xxl"
    state = torch.load(native / "Wan2.1_VAE.pth", weights_only=True)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "Wan2.1_VAE.safetensors")
    video = torch.rand(1, 3, 1, 16, 16)
    assert torch.equal(VideoVAE(tmp_path).encode(video), VideoVAE(native / "Wan2.1_VAE.pth").encode(video))


def test_without_the_libraries_a_line_says_so(folders, monkeypatch):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None if name == "diffusers" else True)
    with pytest.raises(UserError, match="diffusers: not installed, .*: pip install diffusers"):
        encoders.find(VAE, folders[0])


def test_digests_are_of_what_files_hold(folders, tmp_path):
    first = encoders.digest(folders[0] / "vae")
    assert first == encoders.digest(folders[0] / "vae") != encoders.digest(folders[0] / "text_encoder")
    (tmp_path / "a.bin").write_bytes(b"1234")
    (tmp_path / "b.bin").write_bytes(b"1234")
    assert encoders.digest(tmp_path / "a.bin") == encoders.digest(tmp_path / "b.bin")
    (tmp_path / "b.bin").write_bytes(b"1235")
    assert encoders.digest(tmp_path / "a.bin") != encoders.digest(tmp_path / "b.bin")


def test_embeddings_that_transformers_lost_are_refused(folders, monkeypatch):
    model = cases.text_encoder()
    model.encoder.embed_tokens = torch.nn.Embedding(24, cases.TEXT_DIM)
    report = {"missing_keys": set(), "mismatched_keys": set()}
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: (model, report))
    with pytest.raises(UserError, match="transformers did not load its embeddings"):
        TextEncoder(folders[0])


def changed(source: Path, out: Path, change) -> Path:
    state = dict(torch.load(source, weights_only=True))
    change(state)
    torch.save(state, out / source.name)
    return out / source.name


def test_weights_that_are_not_whole_are_refused(folders, tmp_path):
    """Where the libraries would leave random numbers."""
    diffusers, native = folders
    vae = native / "Wan2.1_VAE.pth"
    path = changed(vae, tmp_path, lambda s: s.pop("decoder.head.2.bias"))
    with pytest.raises(UserError, match="decoder.conv_out.bias: got 'nothing', want"):
        VideoVAE(path)
    path = changed(vae, tmp_path, lambda s: s.update({"conv1.bias": torch.zeros(3)}))
    with pytest.raises(UserError, match="quant_conv.bias"):
        VideoVAE(path)
    path = changed(vae, tmp_path, lambda s: s.update({"conv2.weight": torch.zeros(48, 48, 1, 1, 1)}))
    with pytest.raises(UserError):
        VideoVAE(path)
    t5 = native / f"{TEXT.native[0]}.pth"
    path = changed(t5, tmp_path, lambda s: s.pop("blocks.1.ffn.fc2.weight"))
    shutil.copytree(native / "google", tmp_path / "google")
    with pytest.raises(UserError, match=r"lacks encoder.block.1.layer.1.DenseReluDense.wo.weight"):
        TextEncoder(path)
    path = changed(t5, tmp_path, lambda s: s.update({"head.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="holds head.weight, want UMT5's encoder alone"):
        TextEncoder(path)
    clip = native / f"{IMAGE.native[0]}.pth"
    path = changed(clip, tmp_path, lambda s: s.pop("visual.transformer.1.mlp.0.bias"))
    with pytest.raises(UserError, match=r"lacks (vision_model\.)?encoder.layers.1.mlp.fc1.bias"):
        ImageEncoder(path)
    with pytest.raises(UserError, match="has no embeddings.patch_embedding.weight of 4 dimensions"):
        ImageEncoder(vae)
    broken = shutil.copytree(diffusers / "vae", tmp_path / "vae")
    name = "diffusion_pytorch_model.safetensors"
    state = load_file(broken / name)
    del state["quant_conv.bias"]
    save_file(state, broken / name)
    with pytest.raises(UserError, match="lacks quant_conv.bias, want whole weights"):
        VideoVAE(broken)
    (broken / name).write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        VideoVAE(broken)


def test_the_negative_prompt_is_that_of_wan():
    plain, image = text.negative_prompt(False), text.negative_prompt(True)
    assert image.endswith(plain) and len(image) == len(plain) + 5
    assert plain.startswith("色调艳丽，过曝，静态，") and plain.count("，") == 27


def test_prompts_are_cleaned_as_wan_does(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda _: None)
    assert text.clean("  a\t cat \n runs ") == "a cat runs"
    for prompt in ("\u201ca cat\u201d", "a &amp;amp; b"):
        with pytest.raises(UserError, match="wants ftfy"):
            text.clean(prompt)
    ftfy = types.ModuleType("ftfy")
    ftfy.__spec__ = importlib.machinery.ModuleSpec("ftfy", None)
    ftfy.fix_text = lambda given: given.replace("\u201c", '"')
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    monkeypatch.setattr(text, "find_spec", lambda _: ftfy.__spec__)
    assert text.clean("\u201ca  cat\u201c &amp;lt;3") == '"a cat" <3'


@pytest.mark.gpu
def test_on_a_gpu(folders):
    """Products are in TF32 there."""
    video, folder = torch.rand(1, 3, 5, 32, 48), folders[0]
    latent = VideoVAE(folder).encode(video)
    gpu = VideoVAE(folder, "cuda")
    assert (gpu.encode(video).cpu() - latent).abs().max() < 0.02 * latent.abs().max()
    assert gpu.decode(latent).shape == video.shape
    (text,), (want,) = (TextEncoder(folder, device)(["a red boat"]) for device in ("cuda", "cpu"))
    assert text.device.type == "cpu" and (text - want).abs().max() < 0.1
    features, want = (ImageEncoder(folder, device)(video[:, :, 0]) for device in ("cuda", "cpu"))
    assert (features.cpu() - want).abs().max() < 0.02 * want.abs().max()
