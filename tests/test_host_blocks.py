"""The order of copies between host and device, on streams that run as late or as early as they may."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_engine.config import OptimConfig
from prfl_engine.memory.host_blocks import HostBlocks
from prfl_engine.optim import block_adamw
from prfl_engine.optim.optimizer import make_optimizer, update


class Event:
    def __init__(self, stream, place):
        self.stream, self.place = stream, place


class Stream:
    """Work that is done when somebody waits for it, or (eager) as soon as what it waits for is done."""

    def __init__(self, eager, deaf=()):
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
        if "event" not in self.deaf:
            self.put(lambda: event.stream.run(event.place))

    def wait_stream(self, other):
        if "stream" not in self.deaf:
            self.wait_event(other.record_event())

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
        optimizer.host.up, optimizer.host.down = streams
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


@pytest.mark.parametrize("sizes, deaf", [((40,), "stream"), ((200, 3, 130), "event")])
def test_copies_that_do_not_wait_are_noticed(sizes, deaf, monkeypatch):
    want = trained(sizes, "all", None, monkeypatch)
    streams = Stream(False, deaf), Stream(False)
    assert not same(trained(sizes, "all", streams, monkeypatch), want)


def test_slots_may_lie_where_queued_work_still_reads(monkeypatch):
    """The allocator gives out memory whose last reader has only been queued, which is in order for work that
    is queued behind it, and not for a copy on another stream."""
    now, memory, read = Stream(eager=False), torch.full((4,), 7.0), []
    now.put(lambda: read.append(memory.clone()))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(eager=True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "stream", Copies)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: memory)
    blocks = [{"a": torch.ones(4)}]
    host = HostBlocks(SimpleNamespace(type="cuda"), blocks)
    for _, here in host.through([(None, block) for block in blocks], "both"):
        now.synchronize()
        assert torch.equal(here["a"], torch.ones(4))
    assert torch.equal(read[0], torch.full((4,), 7.0))
