"""Kernels and CUDA graphs run on the device of their tensors, played without a GPU."""

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_engine.rollout.cuda_graphs import Captured
from prfl_kernels.jit import launch

KERNELS = Path(__file__).parent.parent / "kernels"


@pytest.fixture
def current(monkeypatch):
    """A process that uses the first of two GPUs, which hold fake tensors: [the current device]."""
    now = [0]

    @contextmanager
    def device(to):
        before, now[0] = now[0], torch.device(to).index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        yield now


class Kernel:
    """Notes the current device of every launch."""

    __name__ = "kernel"

    def __init__(self, current):
        self.current, self.launches = current, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options, *self.current))


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_the_device_of_its_tensors(current, index):
    kernel, a = Kernel(current), torch.empty(3, device=f"cuda:{index}")
    arguments = (a, None, SimpleNamespace(base=a), 5)
    launch(kernel, (2, 1), *arguments, num_warps=4)
    assert kernel.launches == [((2, 1), arguments, {"num_warps": 4}, index)] and current == [0]


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: SimpleNamespace(base=a)])
def test_tensors_of_several_devices_are_refused(current, wrap):
    kernel, a, b = Kernel(current), torch.empty(3, device="cuda:0"), torch.empty(3, device="cuda:1")
    with pytest.raises(ValueError, match="^kernels: kernel got tensors on cuda:0 and cuda:1, want one"):
        launch(kernel, (1,), a, wrap(b))
    with pytest.raises(ValueError, match="got tensors on cuda:0 and cpu"):
        launch(kernel, (1,), wrap(a), torch.empty(3))
    with pytest.raises(ValueError, match="^kernels: kernel got no tensor, want at least one$"):
        launch(kernel, (1,), 5, None)
    assert not kernel.launches


def launched_by_name(path):
    """The kernels of a file that it calls as kernel[grid](...)."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    kernels = {f.name for f in functions if any(ast.unparse(d) == "jit" for d in f.decorator_list)}
    assert kernels or "triton_kernels" not in path.name
    subscripts = [node.func.value for node in nodes if isinstance(getattr(node, "func", None), ast.Subscript)]
    return [ast.unparse(name) for name in subscripts if ast.unparse(name) in kernels]


def test_there_is_no_other_way_to_launch():
    assert not {path.name: found for path in KERNELS.rglob("*.py") if (found := launched_by_name(path))}


def test_a_graph_is_recorded_and_replayed_on_the_device_of_its_inputs(current, monkeypatch):
    events = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: a)  # a torch without CUDA copies nothing there

    def record(call):
        events.append(("recorded", *current))
        return call(), lambda: events.append(("replayed", *current))

    graph = Captured(lambda a, key: a * 2, lambda: 0, record)
    for index in (1, 1, 0):
        assert graph(torch.empty(3, device=f"cuda:{index}"), key=None).device.index == index
        assert current == [0]
    names = ["recorded", "replayed", "replayed", "recorded", "replayed"]
    assert events == list(zip(names, (1, 1, 1, 0, 0), strict=True)) and len(graph.recordings) == 1
    with pytest.raises(ValueError, match="^cuda graph: got inputs on cuda:0 and cuda:1, want one device$"):
        graph(torch.empty(3, device="cuda:0"), torch.empty(3, device="cuda:1"), key=None)
