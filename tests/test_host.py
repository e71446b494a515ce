"""The order of copies between host and device, on streams that run as late or as early as they may, and the
device that streams, events and copies belong to."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_recompute import POLICIES, assert_same, gradients
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_engine.config import OptimConfig
from prfl_engine.memory import host
from prfl_engine.memory.host import HostBlocks, HostStore
from prfl_engine.optim import block_adamw
from prfl_engine.optim.optimizer import make_optimizer, update


class Event:
    def __init__(self, stream, place):
        self.stream, self.place = stream, place


class Stream:
    """Work that is done when somebody waits for it, or (eager) as soon as what it waits for is done. A deaf
    one waits for nothing."""

    def __init__(self, eager, deaf=False):
        self.eager, self.deaf, self.work, self.done = eager, deaf, [], 0

    def put(self, work):
        self.work.append(work)
        if self.eager:
            self.run(len(self.work))

    def run(self, place):
        while self.done < place:
            self.done += 1
            self.work[self.done - 1]()

    def wait_event(self, event):
        if not self.deaf:
            self.put(lambda: event.stream.run(event.place))

    def record_event(self):
        return Event(self, len(self.work))

    def synchronize(self):
        self.run(len(self.work))


class Copies(TorchDispatchMode):
    """Inside, copies are put on a stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self.stream.put(lambda: args[0].copy_(args[1]))
        return args[0]


def trained(sizes, offload, streams, monkeypatch, **how):
    """Weights and states after steps of two backwards each, with the given streams up and down."""
    monkeypatch.setattr(block_adamw, "BLOCK", 64)
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(n).bfloat16()) for n in sizes])
    optimizer = make_optimizer([(model, 1e-2)], OptimConfig(offload=offload, clip=None, **how))
    if streams:
        optimizer.host.up.stream, optimizer.host.down.stream = streams
        monkeypatch.setattr(torch.cuda, "stream", Copies)
        now = Stream(eager=True)  # what computes
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    for step in range(3):
        for micro in range(1 if how.get("in_backward") else 2):
            g = torch.Generator().manual_seed(10 * step + micro)
            sum((p.float() * torch.randn(p.shape, generator=g)).sum() for p in model).backward()
        update(optimizer, None)
    blocks = [a for s in optimizer.state_dict()["state"].values() for b in s["blocks"] for a in b.values()]
    return [p.detach().clone() for p in model] + [a.clone() for a in blocks]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("up, down", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(40,), (64, 100), (200, 3, 130)], ids=str)
@pytest.mark.parametrize("how", [
    {"offload": "states"}, {"offload": "all"}, {"offload": "states", "in_backward": True},
], ids=str)  # fmt: skip
def test_copies_wait_for_each_other(how, sizes, up, down, monkeypatch):
    how = dict(how)
    offload = how.pop("offload")
    want = trained(sizes, offload, None, monkeypatch, **how)
    assert same(trained(sizes, offload, (Stream(up), Stream(down)), monkeypatch, **how), want)


@pytest.mark.parametrize("sizes", [(40,), (200, 3, 130)], ids=str)
def test_copies_that_do_not_wait_are_noticed(sizes, monkeypatch):
    want = trained(sizes, "all", None, monkeypatch)
    streams = Stream(False, deaf=True), Stream(False)
    assert not same(trained(sizes, "all", streams, monkeypatch), want)


def test_slots_may_lie_where_queued_work_still_reads(monkeypatch):
    """The allocator gives out memory whose last reader has only been queued, which is in order for work that
    is queued after it, and not for a copy on another stream."""
    now, memory, read = Stream(eager=False), torch.full((4,), 7.0), []
    now.put(lambda: read.append(memory.clone()))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(eager=True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "stream", Copies)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: memory)
    blocks = [{"a": torch.ones(4)}]
    slots = HostBlocks(SimpleNamespace(type="cuda"), blocks)
    for _, here in slots.stream([(None, block) for block in blocks], "both"):
        now.synchronize()
        assert torch.equal(here["a"], torch.ones(4))
    assert torch.equal(read[0], torch.full((4,), 7.0))


OFFLOADED = [name for name, policy in POLICIES.items() if policy.offload]


@pytest.fixture
def streams(monkeypatch):
    """streams(eager): the stream that computes and, from now on, a store with a stream of its own."""

    def make(eager):
        now, store = Stream(eager=True), HostStore(torch.device("cpu"))
        store.copies.stream = Stream(eager)
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
    sizes = host.power_of_two_sizes(n)
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)  # as torch rounds
    assert sum(sizes) == n and len(sizes) <= 7 and pinned <= n + n // 64


@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 7, 11), (1, 2**20), (2**10 + 1, 2**10 + 3)])
def test_a_tensor_comes_back_as_it_was(shape):
    a = torch.randn(shape).transpose(0, -1)
    (stored,) = HostStore(torch.device("cpu")).put([a])
    want = a.clone()
    a.zero_()
    torch.testing.assert_close(stored.get(), want, rtol=0, atol=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", OFFLOADED)
def test_backward_waits_for_what_comes_back(name, eager, streams):
    want = gradients("none")
    _, store = streams(eager)
    assert_same(gradients(POLICIES[name]), want)
    assert not store._leaving and store.copies.stream.done == len(store.copies.stream.work)


def test_a_backward_that_does_not_wait_is_noticed(streams, monkeypatch):
    streams(False)
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    assert not gradients(POLICIES["all offloaded"])["x"].isfinite().all()


def test_device_memory_is_let_go_of_when_it_has_been_copied(streams):
    now, store = streams(False)
    batches = [[torch.full((3,), float(i))] for i in range(3)]
    for i, batch in enumerate(batches):
        store.put(batch)
        assert store.copies.stream.done == (0 if i < 2 else 2)  # its wait for what computes, and the copy
    store.release()
    assert store.copies.stream.done == len(store.copies.stream.work)


def test_memory_that_nobody_asked_for_is_free_after_its_copy(streams):
    """The allocator gives it to the stream that computes, which must not be there before the copy."""
    _, store = streams(False)
    (stored,) = store.put([torch.ones(3)])
    store.release()
    stored.fetch()
    back = stored.back
    assert not back.isfinite().any()  # not there yet
    del stored
    assert torch.equal(back, torch.ones(3))


class Gpus:
    """The part of torch.cuda that the copies use, for fake tensors on two devices, of which 0 is current.

    `seen` has the devices of all streams made and asked for, of all events recorded and waited for, and of
    all copies, which run on the current stream of their device.
    """

    def __init__(self):
        self.device, self.seen = 0, []
        self.compute = [self.new_stream(torch.device("cuda", i)) for i in range(2)]
        self.running = list(self.compute)

    def index(self, device):
        return self.device if device is None else device.index

    def new_stream(self, device=None):
        made = SimpleNamespace(device=self.index(device))
        made.record_event = lambda: self.seen.append(made.device) or made
        made.wait_event = lambda event: self.seen.extend([made.device, event.device])
        made.synchronize = lambda: self.seen.append(made.device)
        return made

    def current_stream(self, device=None):
        return self.running[self.index(device)]

    @contextmanager
    def stream(self, stream):
        before = self.device, self.running[stream.device]
        self.device, self.running[stream.device] = stream.device, stream
        yield
        self.device, self.running[stream.device] = before

    def copy(self, target, source, non_blocking=False):
        (on,) = {a.device.index for a in (target, source)} - {None}
        assert self.running[on] is not self.compute[on], "a copy on the compute stream"
        assert self.device == on and non_blocking
        self.seen.append(on)


@pytest.fixture
def gpus(monkeypatch):
    made, empty = Gpus(), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", made.new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **how: made.copy(*a, **how))
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **how: empty(*sizes, **how))
    with FakeTensorMode():
        yield made


def test_offloaded_tensors_stay_with_their_device(gpus):
    device = torch.device("cuda", 1)
    store = HostStore(device)
    for _ in range(3):
        (stored,) = store.put([torch.empty(2, 3, device=device)])
    back = stored.get()
    store.release()
    assert back.device == device and stored.host[0].device.type == "cpu"
    assert set(gpus.seen) == {1} and gpus.device == 0
    with pytest.raises(ValueError, match="got a tensor on cuda:0, want one on cuda:1"):
        store.put([torch.empty(3, device="cuda:0")])


def test_host_blocks_stay_with_their_device(gpus, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda a: id(a))  # fake tensors have none
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda a, _: a)  # without CUDA nothing slices them
    device = torch.device("cuda", 1)
    blocks = [{"a": torch.empty(4)} for _ in range(3)]
    slots = HostBlocks(device, blocks)
    for how in ("both", "write"):
        for _, here in slots.stream([(None, block) for block in blocks], how):
            assert here["a"].device == device
    slots.wait()
    assert set(gpus.seen) == {1} and gpus.device == 0
