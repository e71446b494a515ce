"""The stream of batches, which follows from the seed and the position alone, and held-out batches."""

import pickle

import numpy as np
import pytest
import torch
from helpers import SHAPE, move_data, tiny_config, write_data
from test_data import LARGE, SMALL, read, same

from prfl_engine.batch import collate
from prfl_engine.data import Reader, fixed_batches, read_lists, read_text
from prfl_engine.errors import UserError
from prfl_engine.micro_batches import MicroBatches

CPU = torch.device("cpu")


def take(stream, first, count, workers=0):
    loader = stream.loader(first, workers, CPU)
    return [next(loader).batch for _ in range(count)]


def streams(tmp_path, batch_size=2, count=7, dropout=0.4, **arguments):
    config = tiny_config()
    paths = read_lists([str(write_data(tmp_path, config, count, [SMALL, LARGE]))], "data.train")
    reader = Reader(config, None, str(tmp_path / "null.npy"), dropout, 0.5)
    return lambda seed=0: MicroBatches(reader, paths, batch_size, seed, **arguments)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_sample_once_an_epoch_in_batches_of_one_shape(batch_size, tmp_path):
    make = streams(tmp_path, batch_size)
    stream = make()
    known = {float(np.load(tmp_path / f"latent-{i}.npy").sum()): i for i in range(7)}
    orders = []
    for epoch in range(3):
        n = stream.batches_per_epoch
        batches = take(stream, epoch * n, n)
        assert all(len(b.latent) <= batch_size for b in batches)
        order = [known[float(x.numpy()[None].sum())] for b in batches for x in b.latent]
        assert sorted(order) == list(range(7))
        orders.append(order)
    assert len(set(map(tuple, orders))) > 1
    # Four samples of one shape and three of the other.
    assert stream.batches_per_epoch == -(-4 // batch_size) + -(-3 // batch_size)


def test_the_stream_follows_from_seed_and_position(tmp_path):
    make = streams(tmp_path)
    want = take(make(), 0, 12)
    assert same(take(make(), 0, 12), want)
    assert same(take(make(), 5, 7), want[5:])
    assert not all(same(a, b) for a, b in zip(take(make(seed=1), 0, 12), want, strict=True))


def test_the_stream_does_not_depend_on_the_workers(tmp_path):
    make = streams(tmp_path)
    assert same(take(make(), 3, 9, workers=2), take(make(), 3, 9))


def test_texts_of_a_batch_are_padded_to_the_longest_with_zeros(tmp_path):
    config = tiny_config()
    paths = read_lists([str(write_data(tmp_path, config, 2))], "data.train")
    readers = Reader(config, long_caption=1.0), Reader(config, None, str(tmp_path / "null.npy"), 1.0)
    long, null = (read(r, path) for r, path in zip(readers, paths, strict=True))
    assert len(long.text) == 5 and len(null.text) == 1
    batch = collate([null, long])
    assert batch.text.shape == (2, 5, config.text_dim)
    assert torch.equal(batch.text[1], long.text) and torch.equal(batch.text[0, :1], null.text)
    assert not batch.text[0, 1:].any()
    assert torch.equal(batch.latent, torch.stack([null.latent, long.latent])) and batch.clip is None


def test_texts_change_from_epoch_to_epoch(tmp_path):
    stream = streams(tmp_path, 1)()
    n = stream.batches_per_epoch
    texts = [{b.latent.sum().item(): b.text for b in take(stream, e * n, n)} for e in range(4)]
    changed = [not same(texts[0][k], texts[e][k]) for e in range(1, 4) for k in texts[0]]
    assert any(changed) and not all(changed)


def test_pairs_share_a_shape(tmp_path):
    config = tiny_config()
    win = read_lists([str(write_data(tmp_path / "win", config, 4))], "data.train")
    lose = read_lists([str(write_data(tmp_path / "lose", config, 3, seed=5))], "data.lose")
    stream = MicroBatches(Reader(config, "motion_quality"), win, 2, 0, lose)
    losers = [np.load(tmp_path / f"lose/latent-{i}.npy")[0] for i in range(3)]
    seen = set()
    for winner, loser in take(stream, 0, 12):
        assert winner.latent.shape == loser.latent.shape == (2, *SMALL)
        for x in loser.latent.numpy():
            (i,) = (i for i, want in enumerate(losers) if np.array_equal(x, want))
            seen.add(i)
    assert seen == {0, 1, 2}


def test_pairs_of_mixed_shapes(tmp_path):
    """Winners and losers of two sizes each: every pair is of one size."""
    config = tiny_config()
    win = read_lists([str(write_data(tmp_path / "win", config, 4, [SMALL, LARGE]))], "data.train")
    lose = read_lists([str(write_data(tmp_path / "lose", config, 4, [SMALL, LARGE]))], "data.lose")
    stream = MicroBatches(Reader(config, "motion_quality"), win, 2, 0, lose)
    for winner, loser in take(stream, 0, 8):
        assert winner.latent.shape == loser.latent.shape


def test_pairs_without_a_loser_of_their_shape_are_refused(tmp_path):
    config = tiny_config()
    win = read_lists([str(write_data(tmp_path / "win", config, 2))], "data.train")
    lose = read_lists([str(write_data(tmp_path / "lose", config, 2, [LARGE]))], "data.lose")
    with pytest.raises(UserError, match="lose"):
        take(MicroBatches(Reader(config, "motion_quality"), win, 1, 0, lose), 0, 1)


def pairs(tmp_path, skip=0, lose_shapes=(SMALL, LARGE), broken=()):
    """A stream of 6 pairs that belong together; what is broken cannot be read."""
    config = tiny_config()
    win = read_lists([str(write_data(tmp_path / "win", config, 6, [SMALL, LARGE]))], "data.train")
    lose = read_lists([str(write_data(tmp_path / "lose", config, 6, lose_shapes, seed=5))], "data.lose")
    for name in broken:
        (tmp_path / name).write_bytes(b"")
    reader = Reader(config, "motion_quality", str(tmp_path / "win/null.npy"), 0.5)
    return MicroBatches(reader, win, 2, 0, lose, skip, paired=True)


def met(stream, epochs=1):
    """(winner, loser) of every pair of the first epochs."""
    picked = [stream.read(p).picked for p in range(epochs * stream.batches_per_epoch)]
    return [(int(a.stem), int(b.stem)) for win, lose in picked for a, b in zip(win, lose, strict=True)]


def test_pairs_that_belong_together(tmp_path):
    found = met(pairs(tmp_path))
    assert found != sorted(found) == [(i, i) for i in range(6)]
    batch, other = pairs(tmp_path)[0]
    assert not torch.equal(batch.latent, other.latent)


def test_a_pair_loses_its_prompts_together(tmp_path):
    stream = pairs(tmp_path)
    one = MicroBatches(stream.reader, stream.paths, 1, 0, stream.lose, paired=True)
    lengths = [(win.text.shape[1], lose.text.shape[1]) for win, lose in map(one.__getitem__, range(12))]
    assert set(lengths) == {(1, 1), (2, 2)}  # of the null prompt, and of the prompts


@pytest.mark.parametrize("folder", ["win", "lose"])
def test_a_pair_of_which_one_is_broken_is_left_out(tmp_path, folder):
    """Another pair takes its place; where none is left, that ends the run."""
    stream = pairs(tmp_path, 1, broken=[f"{folder}/latent-2.npy"])
    found = met(stream, 4)
    assert {win for win, _ in found} == {0, 1, 3, 4, 5} and all(win == lose for win, lose in found)
    assert list(stream.broken) == [tmp_path / folder / "2.json"]
    with pytest.raises(UserError, match="no other sample can take its place"):
        pairs(tmp_path, 6, broken=[f"{'win' if i % 2 else 'lose'}/latent-{i}.npy" for i in range(6)])


def test_a_pair_that_another_rank_could_not_read_is_left_out_too(tmp_path):
    """And in a run that goes on, from the middle, where all can be read."""
    stream, told = pairs(tmp_path, 2, broken=["win/latent-4.npy"]), [{}] * 40
    stream.agree = lambda found: told.pop(0)
    first = next(p for p in range(9) if stream.picked(p)[0] == 1)
    told[0] = {stream.lose[1]: "broken"}
    (item,) = accepted(stream, first, 1)
    assert [[int(path.stem) for path in part] for part in item.picked] == [stream.picked(first)] * 2
    found = met(stream, 4)
    assert {win for win, _ in found} == {0, 2, 3, 5} and list(stream.left_out()) == [4, 7]
    (tmp_path / "win/latent-4.npy").write_bytes((tmp_path / "win/latent-0.npy").read_bytes())
    again = MicroBatches(stream.reader, stream.paths, 2, 0, stream.lose, 2, paired=True)
    again.go_on(stream.left_out(), stream.planned)
    assert met(again, 4) == found


def test_pairs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"lose/0.json: latent is .*, want .* as that of .*win/0.json"):
        pairs(tmp_path, lose_shapes=(LARGE, SMALL))
    stream = pairs(tmp_path / "other")
    with pytest.raises(UserError, match="data.lose: got 2 samples, want one for each of the 6 of data.train"):
        MicroBatches(stream.reader, stream.paths, 1, 0, stream.lose[:2], paired=True)


def test_held_out_batches_are_in_order_whole_and_without_dropout(tmp_path):
    config = tiny_config()
    paths = read_lists([str(write_data(tmp_path, config, 5, [SMALL, SMALL, LARGE]))], "data.val")
    reader = Reader(config, None, str(tmp_path / "null.npy"), 1.0, 1.0)
    batches = list(fixed_batches(reader, paths, 2, CPU))
    assert [len(b.latent) for b in batches] == [2, 1, 2]
    latents = [x for b in batches for x in b.latent]
    texts = [x for b in batches for x in b.text]
    for i in range(5):
        assert np.array_equal(latents[i], np.load(tmp_path / f"latent-{i}.npy")[0])
        assert same(texts[i], read_text(tmp_path / f"short-{i}.npy", config))


def skipping(tmp_path, batch_size=2, skip=2, count=7, **arguments):
    """A stream of 7 samples of which numbers 2 and 5 cannot be read, and the stream before that."""
    make = streams(tmp_path, batch_size, count)
    whole = make()
    (tmp_path / "latent-2.npy").write_bytes(b"")
    np.save(tmp_path / "latent-5.npy", np.full((1, *LARGE), np.nan, np.float32))
    return whole, MicroBatches(whole.reader, whole.paths, batch_size, 0, skip=skip, **arguments)


def accepted(stream, first, count, workers=0):
    loader = stream.loader(first, workers, CPU)
    return [stream.accept(next(loader), p, CPU) for p in range(first, first + count)]


def numbers(items):
    return [[int(path.stem) for part in item.picked for path in part] for item in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_sample_takes_the_place_of_a_broken_one(workers, tmp_path):
    """Of batches of one sample, where headers are not read before: all others stay where they were."""
    whole, stream = skipping(tmp_path, batch_size=1)
    items = accepted(stream, 0, 21, workers)
    planned = [whole.picked(p) for p in range(21)]
    for want, got in zip(planned, numbers(items), strict=True):
        assert got == want if want[0] not in (2, 5) else got[0] not in (2, 5)
    assert [stream.picked(p) for p in range(21)] == numbers(items)
    assert {path.stem for path in stream.broken} == {"2", "5"}
    assert all("latent-" in why for why in stream.broken.values())
    # From the middle, where it is known what is broken.
    again = MicroBatches(whole.reader, whole.paths, 1, 0, skip=2)
    again.go_on(stream.left_out(), stream.planned)
    assert same([item.batch for item in accepted(again, 9, 12)], [item.batch for item in items[9:]])


def test_loader_processes_can_get_a_pickled_stream(tmp_path):
    whole, stream = skipping(tmp_path, agree=lambda found: found)
    sent = pickle.loads(pickle.dumps(stream))
    assert sent.agree is None and sent.broken == stream.broken
    assert same([sent[3]], [stream[3]])


def test_broken_headers_are_left_out_of_batches_of_one_shape(tmp_path):
    _, stream = skipping(tmp_path)
    assert [path.stem for path in stream.broken] == ["2"]  # the header of number 5 is whole
    assert stream.batches_per_epoch == 4
    items = accepted(stream, 0, 8)
    assert {n for item in numbers(items) for n in item} == {0, 1, 3, 4, 6}
    assert all(len({one.shape for one in item.batch.latent}) == 1 for item in items)


@pytest.mark.parametrize("change", ["repaired", "header lost", "moved", "other shape"])
def test_a_stream_that_goes_on_is_the_one_that_began(change, tmp_path):
    """Number 2 had no header when it began and 5 was found broken later. What has changed since moves no
    sample: 2 stays out of the plan, and another one takes the place of 5."""
    whole, stream = skipping(tmp_path)
    want = numbers(accepted(stream, 0, 12))
    left_out, folder = stream.left_out(), tmp_path
    assert list(left_out) == [2, 5] and stream.planned[2] is None
    if change == "repaired":
        for i in (2, 5):
            np.save(tmp_path / f"latent-{i}.npy", np.load(tmp_path / "latent-0.npy"))
    elif change == "header lost":
        (tmp_path / "latent-5.npy").write_bytes(b"")
    elif change == "other shape":
        np.save(tmp_path / "latent-5.npy", np.zeros((1, *SMALL), np.float32))
    else:
        folder = move_data(tmp_path, tmp_path.with_name("moved"))
    paths = [folder / path.name for path in whole.paths]
    again = MicroBatches(whole.reader, paths, 2, 0, skip=2)
    again.go_on(left_out, stream.planned)
    assert numbers(accepted(again, 5, 7)) == want[5:]
    assert again.left_out() == left_out | ({5: again.broken[paths[5]]} if change == "header lost" else {})
    with pytest.raises(UserError, match="data.train: got 6 samples, want those that the checkpoint was made"):
        MicroBatches(whole.reader, [paths[i] for i in (0, 1, 3, 4, 5, 6)], 2, 0, skip=2).go_on({}, [()] * 7)


def test_a_latent_of_another_shape_than_its_header_had_is_broken(tmp_path):
    stream = streams(tmp_path, 2, 4)()
    np.save(stream.paths[1].parent / "latent-1.npy", np.zeros((1, *SMALL), np.float32))
    with pytest.raises(UserError, match=r"1.json: latent is \[1, 16, .*\], want .* as when the run began"):
        accepted(stream, 0, 2)


def test_one_broken_sample_more_than_allowed_is_named(tmp_path):
    _, stream = skipping(tmp_path, batch_size=1, skip=1)
    with pytest.raises(UserError, match=r"latent-[25].npy.*data.skip_broken: got 1, want more"):
        accepted(stream, 0, 7)
    with pytest.raises(UserError, match=r"latent-2.npy"):
        skipping(tmp_path, skip=0)
    for i in (1, 3):  # all of one shape
        (tmp_path / f"latent-{i}.npy").write_bytes(b"")
    with pytest.raises(UserError, match="no other sample can take its place"):
        MicroBatches(stream.reader, stream.paths[1:6:2], 1, 0, skip=9)[0]


def test_what_another_rank_could_not_read_is_left_out_too(tmp_path):
    """Number 2 can be read here, but was broken for another rank of the run."""
    whole = streams(tmp_path, 1)()
    lost = {whole.paths[2]: "broken"}
    told = [lost, {}, *[{}] * 20]
    stream = MicroBatches(whole.reader, whole.paths, 1, 0, skip=1, agree=lambda found: told.pop(0))
    first = next(p for p in range(7) if whole.picked(p) == [2])
    (item,) = accepted(stream, first, 1)
    assert numbers([item]) == [stream.picked(first)] != [[2]]
    assert stream.broken == lost


def test_a_broken_loser_is_left_out(tmp_path):
    config = tiny_config()
    win, lose = (
        read_lists([str(write_data(tmp_path / name, config, 4, seed=n))], name)
        for n, name in enumerate(("win", "lose"))
    )
    np.save(tmp_path / "lose/latent-1.npy", np.full((1, *SHAPE), np.nan, np.float32))
    stream = MicroBatches(Reader(config), win, 2, 0, lose, skip=1)
    items = accepted(stream, 0, 24)
    assert list(stream.broken) == [lose[1]]
    assert {path for item in items for path in item.picked[1]} == {lose[0], lose[2], lose[3]}
