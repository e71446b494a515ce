"""FlashAttention-3 from Hugging Face's kernel hub: a build that lies in the local cache already.

Its package `kernels` picks the build of this torch, CUDA and processor and imports it. Nothing is ever
downloaded here: GET is what the user runs once. A checkout of this project has a folder kernels/, which
Python takes for the package where that is not installed; it has no file, so the two are told apart.
"""

import inspect
import os
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

REPOSITORY = "kernels-community/flash-attn3"
GET = f"pip install kernels, then kernels.get_kernel({REPOSITORY!r}, version=1) once"


@cache
def flash_attention_3() -> ModuleType:
    """The module with flash_attn_func and _flash_attn_backward.

    Raises ImportError without a fit `kernels`, FileNotFoundError without a cached build for this machine.
    """
    kernels = import_module("kernels")
    if vars(kernels).get("__file__", "") is None:
        raise ImportError(f"not installed: {GET}")
    if "package_name" in inspect.signature(kernels.get_local_kernel).parameters:
        raise ImportError("the package kernels is too old, want 0.14 or newer")
    loaded = kernels.get_local_kernel(_snapshot())
    return sys.modules[loaded.flash_attn_func.__module__]


def _snapshot() -> Path:
    """The newest revision in the cache that holds a build."""
    cached = os.environ.get("KERNELS_CACHE") or import_module("huggingface_hub.constants").HF_HUB_CACHE
    name = REPOSITORY.replace("/", "--")
    found = [
        revision
        for kind in ("kernels", "models")  # of new and of older huggingface_hub
        for revision in Path(cached).glob(f"{kind}--{name}/snapshots/*")
        if any(revision.glob("build/*/*"))
    ]
    if not found:
        raise FileNotFoundError(f"no build of {REPOSITORY} in {cached}: {GET}")
    return max(found, key=lambda revision: revision.stat().st_mtime)
