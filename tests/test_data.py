"""Samples in the official data format: what is read, what is drawn, and what is refused by name."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import training_runs
from helpers import tiny_config, write_data, write_run

from prfl_engine import cli, data
from prfl_engine.data import Kept, Reader, label_of, read_lists, read_text
from prfl_engine.errors import UserError
from prfl_engine.micro_batches import MicroBatches
from prfl_engine.seeds import Purpose, seeded

SMALL, LARGE = (16, 1, 4, 4), (16, 2, 4, 6)


def read(reader, path, seed=0):
    return reader.read(path, seeded(Purpose.CAPTION, seed, 0))


def change(path, remove=(), **fields):
    meta = json.loads(path.read_text())
    for key in remove:
        del meta[key]
    path.write_text(json.dumps(meta | fields))


def put(folder, name, *shape, value=None):
    """A .npy file; its path."""
    array = np.random.default_rng(7).standard_normal(shape) if value is None else np.full(shape, value)
    np.save(folder / name, array.astype(np.float32))
    return str(folder / name)


def same(a, b):
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) if torch.is_tensor(a) else all(map(same, a, b))


@pytest.fixture
def t2v(tmp_path):
    """(configuration, paths of four samples, their folder)"""
    config, folder = tiny_config(), tmp_path / "d"
    return config, read_lists([str(write_data(folder, config))], "data.train"), folder


def test_a_sample(t2v):
    config, paths, folder = t2v
    sample = read(Reader(config, long_caption=1.0), paths[1])
    assert np.array_equal(sample.latent, np.load(folder / "latent-1.npy")[0])
    assert sample.latent.dtype == sample.text.dtype == torch.float32
    assert np.array_equal(sample.text, np.load(folder / "long-1.npy")[0])
    assert sample.clip is None and sample.condition is None and sample.label is None


def test_an_i2v_sample_has_its_mask_before_the_condition(tmp_path):
    config = tiny_config("i2v")
    write_data(tmp_path, config, 1, [LARGE])
    sample = read(Reader(config), tmp_path / "0.json")
    assert sample.condition.shape == (20, *LARGE[1:])
    assert (sample.condition[:4, 0] == 1).all()
    assert not sample.condition[:4, 1:].any()
    assert np.array_equal(sample.condition[4:], np.load(tmp_path / "first-0.npy")[0])
    assert np.array_equal(sample.clip, np.load(tmp_path / "clip-0.npy")[0])


def test_precedence_of_latents(t2v):
    config, paths, folder = t2v
    path = paths[0]
    change(
        path,
        video_vae_latent_path=put(folder, "first.npy", 1, *SMALL, value=1),
        vae_latent_path=put(folder, "second.npy", 1, *SMALL, value=2),
        latents_path=put(folder, "third.npy", 1, *SMALL, value=3),
    )
    found = []
    for key in ("video_vae_latent_path", "vae_latent_path", "latents_path"):
        found.append(read(Reader(config), path).latent.mean().item())
        change(path, remove=[key])
    assert found == [1, 2, 3]


def test_precedence_of_the_reward_text(t2v):
    config, paths, folder = t2v
    path, reader = paths[0], Reader(config, "text_alignment")
    shape = (1, config.text_len, config.text_dim)
    change(
        path,
        save_textshort_path=put(folder, "first.npy", *shape, value=1),
        textshort_path=put(folder, "second.npy", *shape, value=2),
        text_en_path=put(folder, "third.npy", *shape, value=3),
    )
    found = []
    for key in ("save_textshort_path", "textshort_path", "text_en_path"):
        found.append(read(reader, path).text.mean().item())
        change(path, remove=[key])
    assert found == [1, 2, 3]


@pytest.mark.parametrize("better, worse, get", [
    ("image_embeds", "imgclip_path", lambda s: s.clip),
    ("f1_black_path", "latents_condition_path", lambda s: s.condition[4:]),
])  # fmt: skip
def test_precedence_of_image_features(better, worse, get, tmp_path):
    config = tiny_config("i2v")
    write_data(tmp_path, config, 1)
    path = tmp_path / "0.json"
    shape = (1, 257, 1280) if better == "image_embeds" else (1, *SMALL)
    change(path, **{
        better: put(tmp_path, "better.npy", *shape, value=1),
        worse: put(tmp_path, "worse.npy", *shape, value=2),
    })  # fmt: skip
    assert get(read(Reader(config), path)).mean() == 1
    change(path, remove=[better])
    assert get(read(Reader(config), path)).mean() == 2


@pytest.mark.parametrize("value, want", [
    ("good", 1), ("poor", 0), (1, 1), (0, 0), (1.0, 1), (None, 0), ("missing", 0),
])  # fmt: skip
def test_labels(value, want, t2v):
    config, paths, _ = t2v
    if value != "missing":
        change(paths[0], blur_quality=value)
    label = read(Reader(config, "blur_quality"), paths[0]).label
    assert label == want
    assert label.dtype == torch.float32


@pytest.mark.parametrize("physics", ["good", "poor", None])
@pytest.mark.parametrize("human", [1, 0, None])
def test_motion_quality_is_both(physics, human):
    meta = {"physics_quality": physics, "human_quality": human}
    assert label_of(meta, "motion_quality") == (physics == "good" and human == 1)


@pytest.mark.parametrize("value", ["excellent", 0.5, 2, [1], {"a": 1}, ""])
def test_other_labels_are_refused(value, t2v):
    config, paths, _ = t2v
    change(paths[0], text_alignment=value)
    with pytest.raises(UserError) as caught:
        read(Reader(config, "text_alignment"), paths[0])
    assert str(paths[0]) in str(caught.value) and "text_alignment" in str(caught.value)


def test_probability_of_captions_and_of_the_null_prompt(t2v):
    config, paths, folder = t2v
    reader = Reader(config, None, str(folder / "null.npy"), text_dropout=0.25, long_caption=0.7)
    null = read_text(folder / "null.npy", config)
    long = read_text(folder / "long-0.npy", config)
    short = read_text(folder / "short-0.npy", config)
    kinds, n = Counter(), 1000
    for i in range(n):
        text = read(reader, paths[0], i).text
        kinds.update(
            k for k, v in {"null": null, "long": long, "short": short}.items() if same(text, v)
        )
    assert sum(kinds.values()) == n
    # Four deviations of a binomial of 1000 are at most 0.063.
    assert abs(kinds["null"] / n - 0.25) < 0.063
    assert abs(kinds["long"] / n - 0.75 * 0.7) < 0.063


def test_one_choice_does_not_move_the_other(t2v):
    """With dropout switched off, a sample that was not dropped keeps its caption."""
    config, paths, folder = t2v
    with_dropout = Reader(config, None, str(folder / "null.npy"), 0.5, 0.5)
    without = Reader(config, None, None, 0.0, 0.5)
    null = read_text(folder / "null.npy", config)
    kept = 0
    for i in range(50):
        a, b = read(with_dropout, paths[0], i).text, read(without, paths[0], i).text
        if not same(a, null):
            kept += 1
            assert same(a, b)
    assert 10 < kept < 40


def test_kept_samples_are_read_once_and_are_the_same(t2v):
    """... until they have so many bytes; both captions of a sample share the rest of it."""
    config, paths, folder = t2v
    null = str(folder / "null.npy")
    plain = [read(Reader(config, None, null, 0.3, 0.5), path, i) for i in range(9) for path in paths]
    latent = plain[0].latent.nbytes
    captions = [np.load(folder / f"{name}-{i}.npy").nbytes for i in (0, 1) for name in ("long", "short")]
    entries = 2 + 2 * len(captions)  # a sample's and, of each caption, the file's name and its content
    kept = Kept(2 * latent + sum(captions) + entries * Kept.ENTRY)
    reader = Reader(config, None, null, 0.3, 0.5, kept=kept)
    found = [read(reader, path, i) for i in range(9) for path in paths[:2]]
    for i in range(9):
        assert all(map(same, found[2 * i : 2 * i + 2], plain[4 * i : 4 * i + 2]))
    for file in folder.glob("*-[01].npy"):
        file.unlink()
    again = [read(reader, path, i) for i in range(9) for path in paths[:2]]
    assert all(map(same, again, found))
    assert same(read(reader, paths[2]), plain[2])
    for file in folder.glob("*-2.npy"):
        file.unlink()
    with pytest.raises(UserError, match=r"latent-2\.npy"):  # it came too late to be kept
        read(reader, paths[2])


def test_a_text_that_samples_share_is_read_and_kept_once(t2v, monkeypatch):
    config, paths, folder = t2v
    for path in paths[1:]:
        meta = json.loads(path.read_text()) | {"textshort_path": str(folder / "short-0.npy")}
        path.write_text(json.dumps(meta))
    opened, take = Counter(), data._read_tensor

    def counted(path, *rest):
        opened[path.name] += 1
        return take(path, *rest)

    monkeypatch.setattr(data, "_read_tensor", counted)
    reader = Reader(config, kept=Kept(1e9))
    texts = [reader.read(path, None).text for _ in range(2) for path in paths]
    assert all(text is texts[0] for text in texts)
    assert opened == dict.fromkeys(["short-0.npy", *(f"latent-{i}.npy" for i in range(4))], 1)


def test_training_keeps_as_much_as_it_is_told(tmp_path, monkeypatch):
    opened = Counter()
    take = data._read_tensor

    def counted(path, *rest):
        opened[str(path)] += 1
        return take(path, *rest)

    monkeypatch.setattr(data, "_read_tensor", counted)
    config = write_run(tmp_path, samples=2, train={"steps": 6}, loss={"weight": 0.0})
    latents = {}
    for gb in 0, 1:
        opened.clear()
        folder = tmp_path / f"keep-{gb}"
        assert cli.main(["train", str(config), f"data.keep_gb={gb}", f"train.out={folder}"]) == 0
        latents[gb] = [n for path, n in opened.items() if "latent" in path]
    assert min(latents[0]) >= 3 and latents[1] == [1, 1]
    one, other = (training_runs.values(tmp_path / f"keep-{gb}") for gb in (0, 1))
    assert one == other and one


# By the file that has to be named.
META = ["meta", "no meta", "no object", "no latent", "long text", "odd rows"]
ARRAY = ["lost latent", "corrupt latent", "empty latent", "channels", "dimensions", "text width"]


def broken(name, t2v):
    """(the meta file of a sample that is broken, the file that has to be named)"""
    config, (path, *_), folder = t2v
    file, latent, text = folder / "broken.npy", "vae_latent_path", "textshort_path"
    shapes = {
        "channels": (latent, 1, 15, 1, 4, 4),
        "dimensions": (latent, *SMALL),
        "odd rows": (latent, 1, 16, 1, 3, 4),
        "text width": (text, 1, 3, config.text_dim + 1),
        "long text": (text, 1, config.text_len + 1, config.text_dim),
    }
    contents = {"corrupt latent": b"no array", "empty latent": b""}
    if name in shapes:
        field, *shape = shapes[name]
        change(path, **{field: put(folder, file.name, *shape)})
    elif name in ARRAY:
        change(path, **{latent: str(file)})
        if name in contents:
            file.write_bytes(contents[name])
    elif name == "no latent":
        change(path, remove=[latent])
    elif name == "no meta":
        path.unlink()
    else:
        path.write_text({"meta": "{", "no object": "[]"}[name])
    return path, path if name in META else file


@pytest.mark.parametrize("name", META + ARRAY)
def test_a_broken_sample_is_named_in_one_line(name, t2v):
    path, named = broken(name, t2v)
    with pytest.raises(UserError) as caught:
        read(Reader(t2v[0]), path)
    assert str(named) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["lost latent", "meta", "long text"])
def test_an_error_of_a_worker_is_one_line(name, workers, t2v):
    config, paths, _ = t2v
    _, named = broken(name, t2v)
    stream = MicroBatches(Reader(config), paths[:1], 1, 0)
    with pytest.raises(UserError) as caught:
        next(stream.loader(0, workers, torch.device("cpu")))
    message = str(caught.value)
    assert str(named) in message
    assert "\n" not in message and "Traceback" not in message


def test_a_condition_may_hold_its_mask(tmp_path):
    """20 channels are taken as they are; 16 and the mask are the same."""
    config = tiny_config("i2v")
    paths = read_lists([str(write_data(tmp_path, config, 2))], "data.train")
    read = Reader(config).read
    want, rng = read(paths[0], np.random.default_rng(0)).condition, np.random.default_rng(0)
    np.save(tmp_path / "first-0.npy", want[None].numpy())
    assert torch.equal(read(paths[0], rng).condition, want)
    np.save(tmp_path / "first-0.npy", want[None, :18].numpy())
    with pytest.raises(UserError, match=r"condition is \[1, 18, ...\], want 16 channels, or 20 with"):
        read(paths[0], rng)


def test_i2v_needs_condition_and_clip(tmp_path):
    config = tiny_config("i2v")
    write_data(tmp_path, config, 1)
    path = tmp_path / "0.json"
    change(path, f1_black_path=put(tmp_path, "wrong.npy", 1, *LARGE))
    with pytest.raises(UserError, match=r"wrong.npy: condition is \[1, 16, 2, 4, 6\]"):
        read(Reader(config), path)
    for key, what in (("imgclip_path", "CLIP features"), ("f1_black_path", "condition")):
        write_data(tmp_path, config, 1)
        change(path, remove=[key])
        with pytest.raises(UserError, match=f"{path}: got no {what}"):
            read(Reader(config), path)


def test_lists(t2v, tmp_path, monkeypatch):
    _, paths, folder = t2v
    relative = folder / "relative.list"
    relative.write_text("\n0.json\n\n  1.json  \n")
    monkeypatch.chdir(tmp_path)
    assert [p.resolve() for p in read_lists([str(relative)], "data.val")] == paths[:2]
    both = [str(folder / "all.list"), str(relative)]
    assert len(read_lists(both, "data.val")) == 6
    (tmp_path / "empty.list").write_text("\n")
    for lists in ([], ["no.list"], ["empty.list"]):
        with pytest.raises(UserError, match="data.val: .*want"):
            read_lists(lists, "data.val")


def test_arrays_beside_their_meta(t2v):
    config, paths, folder = t2v
    change(paths[0], vae_latent_path="latent-0.npy")
    assert np.array_equal(
        read(Reader(config), paths[0]).latent, np.load(folder / "latent-0.npy")[0]
    )
