"""The stream of batches, which follows from the seed and the position alone, and held-out batches."""

import numpy as np
import pytest
import torch
from helpers import tiny_config, write_data
from test_data import LARGE, SMALL, read, same

from prfl_engine.batch import collate
from prfl_engine.data import MicroBatches, Reader, fixed_batches, read_lists, read_text
from prfl_engine.errors import UserError

CPU = torch.device("cpu")


def take(stream, first, count, workers=0):
    loader = stream.loader(first, workers, CPU)
    return [next(loader) for _ in range(count)]


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
