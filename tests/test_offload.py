"""The way of saved tensors to the host and back, on a stream that runs as late or as early as it may."""

import pytest
import torch
from test_host_blocks import Copies, Stream
from test_recompute import POLICIES, assert_same, gradients

from prfl_engine.memory import host as offload

AWAY = [name for name, policy in POLICIES.items() if policy.offload]


@pytest.fixture
def streams(monkeypatch):
    """streams(eager): the stream that computes and, from now on, a store with a stream of its own."""

    def make(eager):
        now, store = Stream(eager=True), offload.HostStore(torch.device("cpu"))
        store.stream = Stream(eager)
        monkeypatch.setattr(torch.cuda, "stream", Copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
        monkeypatch.setattr("prfl_engine.memory.recompute.store_of", lambda device: store)
        return now, store

    empty = torch.empty  # there is no pinned memory without a GPU, and new memory holds anything
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, pin_memory=False, **how: empty(*sizes, **how).fill_(float("nan"))
    )
    return make


@pytest.mark.parametrize("n", [1 << 20, 8190 * 5120, 2**40 - 1])
def test_pinned_memory_is_hardly_larger_than_what_it_holds(n):
    sizes = offload.pieces(n)
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)  # as torch rounds
    assert sum(sizes) == n and len(sizes) <= 7 and pinned <= n + n // 64


@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 7, 11), (1, 2**20), (2**10 + 1, 2**10 + 3)])
def test_a_tensor_comes_back_as_it_was(shape):
    a = torch.randn(shape).transpose(0, -1)
    (away,) = offload.HostStore(torch.device("cpu")).put([a])
    want = a.clone()
    a.zero_()
    torch.testing.assert_close(away.get(), want, rtol=0, atol=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", AWAY)
def test_backward_waits_for_what_comes_back(name, eager, streams):
    want = gradients("none")
    _, store = streams(eager)
    assert_same(gradients(POLICIES[name]), want)
    assert not store._leaving and store.stream.done == len(store.stream.work)


def test_a_backward_that_does_not_wait_is_noticed(streams, monkeypatch):
    streams(False)
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    assert not gradients(POLICIES["all away"])["x"].isfinite().all()


def test_device_memory_is_let_go_of_when_it_has_been_copied(streams):
    now, store = streams(False)
    lots = [[torch.full((3,), float(i))] for i in range(3)]
    for i, lot in enumerate(lots):
        store.put(lot)
        assert store.stream.done == (0 if i < 2 else 2)  # its wait for what computes, and the copy
    store.settle()
    assert store.stream.done == len(store.stream.work)


def test_memory_that_nobody_asked_for_is_free_behind_its_copy(streams):
    """The allocator gives it to the stream that computes, which must not be there before the copy."""
    _, store = streams(False)
    (away,) = store.put([torch.ones(3)])
    store.settle()
    away.fetch()
    back = away.back
    assert not back.isfinite().any()  # not there yet
    del away
    assert torch.equal(back, torch.ones(3))
