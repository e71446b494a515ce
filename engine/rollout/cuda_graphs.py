"""A function of tensors recorded once for every shape as a CUDA graph, and replayed.

A replay costs one launch instead of one per kernel. A graph reads fixed addresses: inputs are copied into
tensors that belong to the recording, and all recordings are dropped when other memory that the function reads
(weights) has moved, or when the inputs come on another device. The working memory of a graph stays reserved;
all graphs of one function share it, because they never run at the same time. The result of a graph is
overwritten by the next replay, of any shape.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from prfl_kernels.jit import on

WARMUPS = 2  # runs before a recording: autotuning, workspaces and tables must be there


class Recording(NamedTuple):
    """A recorded call: its inputs, what it returns, and how to run it again."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], None]


class CudaRecorder:
    """Records a call on the current CUDA device; all recordings share one pool of memory."""

    def __init__(self):
        self.alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """(what call() returned, how to run it again into the same memory)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        if not self.alive:  # torch refuses to record into a pool that has lost all of its graphs
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not "global", in which what the loader's thread pins meanwhile would end the recording and the run.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = call()
        self.alive.add(graph)
        return output, graph.replay


class Captured:
    """fn(*inputs, key) as recordings, one for every key and shapes and dtypes of inputs.

    addresses() identifies the memory that fn reads in addition to its inputs. record(call) runs call() and
    returns its result and how to run it again; CudaRecorder on a GPU.
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        addresses: Callable[[], Hashable],
        record: Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]],
    ):
        self.fn, self.addresses, self.record = fn, addresses, record
        self.recordings: dict[Hashable, Recording] = {}
        self._at: Hashable = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, key: Hashable) -> Tensor:
        """fn(*inputs, key), in memory that the next call overwrites, recorded and replayed on the device of
        the inputs. Raises ValueError for inputs of several devices."""
        devices = list(dict.fromkeys(a.device for a in inputs))
        if len(devices) != 1:
            raise ValueError(f"cuda graph: got inputs on {' and '.join(map(str, devices))}, want one device")
        with on(devices[0]):
            return self._replayed(inputs, key, (devices[0], self.addresses()))

    def _replayed(self, inputs: tuple[Tensor, ...], key: Hashable, at: Hashable) -> Tensor:
        """The result on inputs of the current device; `at` is where everything else is."""
        if at != self._at:
            self.recordings.clear()
            self._at = at
        signature = key, *((a.shape, a.dtype) for a in inputs)
        found = self.recordings.get(signature)
        if found is None:
            held = [a.clone(memory_format=torch.contiguous_format) for a in inputs]
            found = Recording(held, *self.record(lambda: self.fn(*held, key)))
            self.recordings[signature] = found
        for static, a in zip(found.inputs, inputs, strict=True):
            static.copy_(a)
        found.replay()
        return found.output
