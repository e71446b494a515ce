"""Exposed communication: seconds in which a rank waits for others, with nothing computed meanwhile.

A wait begins where the computation reaches it and ends where it goes on, both taken by the clock of
`phases`: on a GPU events in the stream that computes, so a gather that a block has covered counts as nothing.
FSDP2 has no hook at its waits, so its methods that contain them are wrapped while a clock runs. They are no
public names of torch: where one is missing, nothing is measured.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module

import torch

from prfl_engine.metrics import note
from prfl_engine.phases import Clock
from prfl_kernels.waits import told, waiting

_PLACE = "torch.distributed.fsdp._fully_shard"
# unshard: the gather itself where there are no streams. wait_for_unshard: until it is there, and its copy to
# the parameters. post_backward: packing of gradients, and the reduction before if it is not done; where there
# are no streams this one. The last one: until all reductions are done.
_METHODS = (
    ("_fsdp_param_group", "FSDPParamGroup", "unshard"),
    ("_fsdp_param_group", "FSDPParamGroup", "wait_for_unshard"),
    ("_fsdp_param_group", "FSDPParamGroup", "post_backward"),
    ("_fsdp_state", "FSDPState", "_root_post_backward_final_callback"),
)


@contextmanager
def measured(clock: Clock, leads: bool = True) -> Iterator[None]:
    """Inside, the clock has the waits of this rank: all, or none where torch lacks a method of FSDP2 that is
    wrapped, which the rank that leads notes."""
    try:
        found = [(*_owned(*method), method[-1]) for method in _METHODS]
    except (ImportError, AttributeError) as error:
        if leads:
            note(f"torch {torch.__version__}: {error}; exposed communication (perf/exposed_s) is left out")
        yield
        return
    with told(clock.waits), ExitStack() as stack:
        for owner, original, name in found:
            setattr(owner, name, _timed(original))
            stack.callback(setattr, owner, name, original)
        yield


def _owned(module: str, owner: str, name: str) -> tuple[type, Callable]:
    """A class and its method."""
    found = getattr(import_module(f"{_PLACE}.{module}"), owner)
    return found, getattr(found, name)


def _timed(method: Callable) -> Callable:
    @wraps(method)
    def timed(*arguments, **settings):
        with waiting():
            return method(*arguments, **settings)

    return timed
