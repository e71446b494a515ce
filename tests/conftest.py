"""Shared set-up: GPU tests are skipped where there is no GPU, threads and seeds are fixed."""

import gc
import os
import random
import tempfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch

gc.set_threshold(100_000, 10, 10)  # until all is collected; imports leave little to free

# Without a GPU the Triton kernels run in its interpreter; it has to be told before they are imported.
if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

# torch keeps a record of gloo's collectives, with the Python frames of each, that all threads of all groups
# write to. Once in some thousand runs of several processes a thread of gloo crashed in malloc (torch 2.13).
# So it is off. With it off a rank has found its heap corrupt once, too: it was not the cause, or not alone.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")

# One thread, or as many as asked for. Models this small gain nothing from threads, and lose minutes where
# another process has the cores (one training test: 0.8 s on free cores, 146 s beside a busy process).
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_collection_finish():
    """The garbage collector passes over what imports and collection made, which is a fifth of the time of
    tests that compile."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True, scope="session")
def own_cache():
    """Plans are cached in a folder of this session."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def fresh_memory_is_nan():
    """NaN in all memory that is not yet written."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


def choose(implementation):
    from prfl_kernels import dispatch

    dispatch.configure(implementation)
    yield
    dispatch.configure("")


@pytest.fixture
def triton(fresh_memory_is_nan):
    """All operations on the Triton kernels."""
    yield from choose("triton")


@pytest.fixture
def reference():
    """All operations on plain torch."""
    yield from choose("reference")


@pytest.fixture(params=["by token", "by sample"])
def gates_both_ways(request, monkeypatch):
    """The gates of short samples once as they come, and once as those of long ones."""
    from prfl_kernels.sublayers import products

    if request.param == "by sample":
        monkeypatch.setattr(products, "SHORT", 0)
