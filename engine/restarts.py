"""Whether torchrun has started the processes anew, so that a run goes on by itself.

`train.resume=false` refuses a folder that holds a run. After a failure torchrun starts the same command once
more, and then the run in the folder may be its own. The store of torchrun's agent says so: it outlives the
processes, and no other call of torchrun has the same one.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def _store() -> dist.Store | None:
    """The store of torchrun's agent; None where there is none that outlives the processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))


def _key(out: Path) -> str:
    return f"prfl/run/{out.absolute()}"


def note_run(out: Path) -> None:
    """The run of this call of torchrun has taken the folder `out`."""
    if (store := _store()) is not None:
        store.set(_key(out), "1")


def restarted(out: Path) -> bool:
    """Whether an earlier start by this call of torchrun has taken the folder `out`."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    store = _store()
    return store is not None and store.check([_key(out)])
