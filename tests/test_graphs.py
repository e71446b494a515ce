"""Recording and replaying: on a CPU with a recorder that plays a CUDA graph, on a GPU with the real one."""

from contextlib import contextmanager, nullcontext
from itertools import count

import pytest
import torch
from helpers import model_and_batch, random_batch, relative, tiny_config, tiny_model, write_adapter

from prfl_engine import chain, flow
from prfl_engine.config import RolloutConfig
from prfl_engine.model import lora
from prfl_engine.objectives import bind
from prfl_engine.rollout.accelerated import Rollout, make_rollout
from prfl_engine.rollout.cuda_graphs import Captured, CudaRecorder


class FakeRecorder:
    """A replay computes from what the recorded inputs hold by then, into the memory of the recording."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, call):
        self.recorded += 1
        output = torch.full_like(call(), float("nan"))  # a recording computes nothing

        def replay():
            self.replayed += 1
            output.copy_(call())

        return output, replay


def captured(fn, addresses=lambda: 0):
    record = FakeRecorder()
    return Captured(fn, addresses, record), record


def test_inputs_are_copied_to_where_the_graph_reads_them():
    graph, record = captured(lambda a, b, key: a * 2 + b)
    for _ in range(3):
        a, b = torch.randn(2, 3), torch.randn(3)
        kept = a.clone(), b.clone()
        assert torch.equal(graph(a, b, key=None), a * 2 + b)
        assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])
    assert (record.recorded, record.replayed) == (1, 3)


def test_every_shape_dtype_and_key_is_recorded_once():
    graph, record = captured(lambda a, key: a * key)
    shapes = [((2, 3), torch.float32, 2), ((4, 3), torch.float32, 2), ((2, 3), torch.bfloat16, 2),
              ((2, 3), torch.float32, 5)]  # fmt: skip
    for _ in range(2):
        for shape, dtype, key in shapes:
            a = torch.randn(shape).to(dtype)
            assert torch.equal(graph(a, key=key), a * key)
    assert (record.recorded, record.replayed) == (4, 8)


def test_strided_inputs_share_a_recording():
    graph, record = captured(lambda a, key: a + 1)
    for a in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(3, 9)[:, ::2][:, :4]):
        assert torch.equal(graph(a, key=0), a + 1)
    assert record.recorded == 1


def test_memory_that_moved_is_recorded_again():
    weight = [torch.ones(3)]
    graph, record = captured(lambda a, key: a * weight[0], lambda: weight[0].data_ptr())
    a = torch.randn(2, 3)
    assert torch.equal(graph(a, key=0), a)
    weight[0].mul_(3)  # in place: the same memory
    assert torch.equal(graph(a, key=0), a * 3) and record.recorded == 1
    held = weight[0]
    weight[0] = torch.full((3,), 5.0)
    assert torch.equal(graph(a, key=0), a * 5) and record.recorded == 2
    assert held is not weight[0]


class FakeCuda:
    """What CudaRecorder uses of torch.cuda, with torch's rules for pools and a loader that pins memory."""

    def __init__(self):
        self.graphs: dict[int, int] = {}  # pool: graphs that live in it
        self.pools, self.log = count(), []

    def install(self, monkeypatch):
        cuda = self

        class Graph:
            def __del__(self):
                cuda.graphs[self.pool] -= 1

            def replay(self):
                cuda.log.append("replay")

        class Stream:
            def wait_stream(self, other):
                cuda.log.append("wait")

        @contextmanager
        def graph(made, pool, capture_error_mode="global"):
            before, made.pool = cuda.graphs.get(pool), pool
            cuda.graphs[pool] = (before or 0) + 1
            assert before != 0, "a pool that has lost its graphs"
            assert capture_error_mode != "global", "the loader's thread cannot pin memory"
            yield
            cuda.log.append("recorded")

        fakes = dict(graph_pool_handle=lambda: next(cuda.pools), CUDAGraph=Graph, Stream=Stream, graph=graph)
        fakes |= dict(current_stream=Stream, stream=lambda stream: nullcontext())
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return self


def test_recordings_share_a_pool_and_never_one_that_is_dead(monkeypatch):
    cuda, weight, calls = FakeCuda().install(monkeypatch), [torch.ones(3)], []

    def fn(a, key):
        calls.append(key)
        return a * weight[0]

    graph = Captured(fn, lambda: weight[0].data_ptr(), CudaRecorder())
    for key in (1, 2, 2):
        graph(torch.ones(2, 3), key=key)
    assert calls == [1, 1, 1, 2, 2, 2]  # two warm-ups and the recording
    assert cuda.log == ["wait", "wait", "recorded", "replay"] * 2 + ["replay"]
    assert cuda.graphs == {0: 2}
    held, weight[0] = weight[0], torch.ones(3)
    graph(torch.ones(2, 3), key=1)
    assert cuda.graphs == {0: 0, 1: 1} and held is not weight[0]


@pytest.mark.parametrize(
    "fields", [
        {}, {"cache": 0.3}, {"precision": "fp8"}, {"precision": "fp8", "cache": 0.3}, {"lora": "adapter"},
        {"lora": "adapter", "precision": "fp8"},
    ],
)  # fmt: skip
def test_a_rollout_by_replays_is_the_rollout(fields, tmp_path):
    """Samples leave the batch on the way: two shapes. With a cache part of a batch may be computed."""
    model, batch = model_and_batch("t2v", 2, dim=128, num_heads=2)
    if "lora" in fields:
        lora.lend(model, write_adapter(tmp_path, model.config))
    schedule, index = flow.make_schedule("unipc", 8, 5.0), torch.tensor([6, 3])
    noise = torch.randn_like(batch.latent)
    record, found = FakeRecorder(), []
    for one in (None, record):
        rollout = Rollout(model, RolloutConfig(steps=8, **fields), schedule, one)
        with torch.no_grad():
            context = model.embed_context(batch.text)
        stretch = rollout.stretches(batch, context)
        way = chain.Chain(bind(model, batch, context), schedule, noise, stretch)
        way.advance_to(index, index)
        found.append(way.at(index, torch.arange(2)).x)
    assert torch.equal(*found)
    assert record.recorded == 2 and record.replayed >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["same", "fp8"])
def test_on_a_gpu(precision):
    config = tiny_config(dim=128, num_heads=2)
    model = tiny_model(config).cuda().set_precision(torch.bfloat16)
    batch = random_batch(config, 2)
    batch = batch._replace(latent=batch.latent.cuda(), text=batch.text.cuda())
    schedule, index = flow.make_schedule("unipc", 8, 5.0), torch.tensor([6, 3])
    noise = torch.randn_like(batch.latent)
    found = []
    for graph in (False, True):
        settings = RolloutConfig(steps=8, precision=precision, cache=1e-6, cuda_graph=graph)
        rollout = make_rollout(model, settings, schedule, torch.device("cuda"))
        with torch.no_grad():
            context = model.embed_context(batch.text)
        for _ in range(2):  # the second time every shape has its graph
            stretch = rollout.stretches(batch, context)
            way = chain.Chain(bind(model, batch, context), schedule, noise, stretch)
            way.advance_to(index, index)
        found.append(way.at(index, torch.arange(2)).x)
    assert relative(found[1], found[0]) < 1e-5
