"""Rows of folders and tables, and the sizes that videos are cropped to."""

import json

import pytest

from prfl_engine.encode.buckets import PRESETS, nearest, parse_sizes, whole_frames
from prfl_engine.encode.sources import read_rows
from prfl_engine.errors import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_a_folder_with_sidecars(tmp_path):
    touch(tmp_path, "b/two.MP4", "b/two.png", "one.mp4", "still.jpg", "none.mov", "notes.pdf")
    for name, text in ("one", "a cat\n"), ("b/two", "a\nboat"), ("still", "a storm"):
        (tmp_path / f"{name}.txt").write_text(text)
    rows, skipped = read_rows(tmp_path)
    found = {row.prompt: (row.video and row.video.name, row.image and row.image.name) for row in rows}
    assert {k.strip(): v for k, v in found.items()} == {
        "a cat": ("one.mp4", None), "a boat": ("two.MP4", "two.png"), "a storm": (None, "still.jpg"),
    }  # fmt: skip
    assert [(s.where, s.reason) for s in skipped] == [
        (str(tmp_path / "none.mov"), "no prompt, want one in none.txt")
    ]


def test_tables_say_the_same(tmp_path, monkeypatch):
    touch(tmp_path, "in/a.mp4", "in/b.mp4")
    rows = [
        {"video": "a.mp4", "prompt": "a cat, red", "label": 1, "id": "x"},
        {"video": "b.mp4", "prompt": "a boat", "label": None, "id": "y"},
    ]
    table = '\ufeffvideo,prompt,label,id\r\na.mp4,"a cat, red",1,x\r\nb.mp4,a boat,,y\r\n'
    (tmp_path / "in/t.csv").write_text(table, encoding="utf-8")
    (tmp_path / "in/t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    official = [{"video_path": r["video"], "short_caption": r["prompt"], **r} for r in rows]
    for row in official:
        del row["video"], row["prompt"]
    (tmp_path / "in/t.json").write_text(json.dumps(official))
    monkeypatch.chdir(tmp_path)
    for end in ("csv", "jsonl", "json"):
        found, skipped = read_rows(f"in/t.{end}")
        assert [(r.video.name, r.prompt, r.fields.get("label"), r.fields["id"]) for r in found] == [
            ("a.mp4", "a cat, red", 1, "x"), ("b.mp4", "a boat", None, "y"),
        ] and not skipped  # fmt: skip


def test_a_named_file_comes_without_its_namesakes(tmp_path):
    touch(tmp_path, "a.mp4", "a.mkv", "a.png", "b.mp4")
    found = {}
    for name in ("a.mp4", "a.mkv", "a.png"):
        (row,), skipped = read_rows(tmp_path / name, "a cat")
        found[name] = row.video and row.video.name, row.image and row.image.name
        assert not skipped
    assert found == {"a.mp4": ("a.mp4", "a.png"), "a.mkv": ("a.mkv", "a.png"), "a.png": (None, "a.png")}


@pytest.mark.parametrize("name, text", [
    ("t.csv", "video\na.mp4\nb.mp4\n"), ("u.csv", "video,prompt\na.mp4,\nb.mp4,own\n"),
    ("t.jsonl", '{"video": "a.mp4"}\n{"video": "b.mp4", "prompt": "own"}\n'),
    ("t.json", '[{"video": "a.mp4"}, {"video": "b.mp4", "prompt": "own"}]'),
])  # fmt: skip
def test_the_prompt_of_rows_without_one(name, text, tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / name).write_text(text)
    rows, skipped = read_rows(tmp_path / name, "a cat")
    assert [row.prompt for row in rows] == ["a cat", "own" if "own" in text else "a cat"] and not skipped


def test_rows_that_cannot_be_one(tmp_path):
    touch(tmp_path, "a.mp4")
    good = {"video": "a.mp4", "prompt": "a"}
    rows = [good, [1], {**good, "prompt": 3}, {**good, "physics_quality": 0.5}, {**good, "imgclip_path": "x"}]
    text = "".join(f"{json.dumps(row)}\n" for row in rows) + "{nonsense\n"
    (tmp_path / "t.jsonl").write_text(text)
    found, skipped = read_rows(tmp_path / "t.jsonl")
    assert len(found) == 1
    wanted = (
        "row: got [1], want a JSON object", "prompt: got 3", "physics_quality: got 0.5", "encoded already",
        "not JSON",
    )  # fmt: skip
    assert len(skipped) == len(wanted)
    for row, (needle, left) in enumerate(zip(wanted, skipped, strict=True), 2):
        assert left.where == f"{tmp_path / 't.jsonl'}, line {row}" and needle in left.reason
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match="want a JSON list of rows"):
        read_rows(tmp_path / "t.json")
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(UserError, match="want a folder, or a table"):
        read_rows(tmp_path / "t.txt")


def test_buckets():
    for token, sizes in PRESETS.items():
        for name, area in ("480p", 480 * 832), ("720p", 720 * 1280):
            for h, w in sizes[name]:
                assert h % token == w % token == 0 and 0.95 < h * w / area < 1.03, (h, w)
    assert parse_sizes("720p", 32)[0] == (704, 1280)
    with pytest.raises(UserError, match="multiples of 32"):
        parse_sizes("720x1280", 32)
    sizes = parse_sizes("480p")
    shapes = {(1080, 1920): (480, 832), (1920, 1080): (832, 480), (768, 1024): (544, 720), (9, 9): (624, 624)}
    for (h, w), want in shapes.items():
        assert nearest(h, w, sizes) == want
    assert parse_sizes("704x1280, 1280x704") == ((704, 1280), (1280, 704))
    for text in ("480P", "704", "0x16", "16x24", "16x16,"):
        with pytest.raises(UserError, match="--size: got"):
            parse_sizes(text)
    assert [whole_frames(n) for n in (1, 4, 5, 8, 9, 81, 84)] == [1, 1, 5, 5, 9, 81, 81]
