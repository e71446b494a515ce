"""Exposed communication: seconds in which a rank waits for others, with nothing computed meanwhile.

A wait begins where the computation reaches it and ends where it goes on, both taken by the clock of
`phases`: on a GPU events in the stream that computes, so a gather that a block has covered counts as nothing.
FSDP2 has no hook at its waits, so its methods that contain them are wrapped while a clock runs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from prfl_engine.phases import Clock
from prfl_kernels.waits import told, waiting

# unshard: the gather itself where there are no streams. wait_for_unshard: until it is there, and its copy to
# the parameters. post_backward: packing of gradients, and the reduction before if it is not done; where there
# are no streams this one. The last one: until all reductions are done.
_METHODS = (
    (FSDPParamGroup, "unshard"),
    (FSDPParamGroup, "wait_for_unshard"),
    (FSDPParamGroup, "post_backward"),
    (FSDPState, "_root_post_backward_final_callback"),
)


@contextmanager
def measured(clock: Clock) -> Iterator[None]:
    """Inside, the clock has the waits of this rank."""
    with told(clock.waits), ExitStack() as stack:
        for owner, name in _METHODS:
            original = getattr(owner, name)
            setattr(owner, name, _timed(original))
            stack.callback(setattr, owner, name, original)
        yield


def _timed(method: Callable) -> Callable:
    @wraps(method)
    def timed(*arguments, **settings):
        with waiting():
            return method(*arguments, **settings)

    return timed
