"""Peers of our kernels, compiled for the ledger as ours are: the code-generation columns alone.

Liger-Kernel's LayerNorm and RMSNorm where liger-kernel is installed, and the attention of Triton's
tutorial 06-fused-attention.py from a file that the user names. Neither is part of this package.
Their launchers ask for a CUDA device, so they get fake tensors that say they are on one, and the
properties of an H100; of the tutorial's configurations all with tiles of 128 x 64 or more compile.
"""

import importlib
import math
from collections import Counter
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_bench.ledger import sass
from prfl_bench.shapes import DEFAULT, MODELS

SMS, CAPABILITY = 132, (9, 0)
LEAST_TILE = 128 * 64


def check(file: str) -> None:
    """Raise ValueError where there is no peer to compile; file as in compile_peers."""
    if file and not Path(file).is_file():
        raise ValueError(f"--peers: got {file}, want the file of Triton's tutorial 06-fused-attention.py")
    if not file and find_spec("liger_kernel") is None:
        raise ValueError("--peers: got no file and no liger-kernel installed, want one of them")


def compile_peers(file: str) -> dict[str, list[dict]]:
    """{title: facts of each launch} at 32,760 tokens; file is the tutorial, or "" for none."""
    found, length = {}, DEFAULT[0]
    if find_spec("liger_kernel"):
        for model, width, _, _ in MODELS.values():
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                title = f"Liger-Kernel at Wan {model}, {length} tokens, {name}"
                found[title] = _compile(lambda width=width, dtype=dtype: _liger(length, width, dtype))
    if file:
        model, width, heads, _ = MODELS["14B"]  # heads are all alike
        title = f"Triton's tutorial at Wan {model}, {length} tokens rounded up to blocks, float16"
        found[title] = _compile(lambda: _tutorial(file, length, heads, width // heads))
    return found


def _compile(call) -> list[dict]:
    with ExitStack() as stack:
        properties = SimpleNamespace(multi_processor_count=SMS, major=CAPABILITY[0], minor=CAPABILITY[1])
        replaced = {
            "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: CAPABILITY,
            "device": lambda *_: nullcontext(),
        }
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(FakeTensorMode())
        launches = sass.compile_calls(call)
    return [facts | {"wide_share": _wide(facts)} for facts in map(sass.facts, launches)]


def _wide(facts: dict) -> float | None:
    """Share of the bytes of all load and store instructions that move 16 a thread; None where TMA, which
    is none of them, moves the rest."""
    if facts["descriptors"]:
        return None
    counts: Counter = Counter()
    for sides in facts["widths"].values():
        for found in sides.values():
            counts.update(found)
    return sass.wide_share(counts)


def _liger(length: int, width: int, dtype: torch.dtype) -> None:
    layer = importlib.import_module("liger_kernel.ops.layer_norm")
    rms = importlib.import_module("liger_kernel.ops.rms_norm")

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda:0")

    x, weight, bias = empty(length, width), empty(width), empty(width)
    _, _, mean, rstd, _, _ = layer.layer_norm_forward(x, weight, bias, 1e-6)
    layer.layer_norm_backward(empty(length, width), x, weight, bias, mean, rstd)
    _, _, rstd, block, warps, casting = rms.rms_norm_forward(x, weight, 1e-6, 0.0, "llama", None)
    rms.rms_norm_backward(
        empty(length, width), x, weight, rstd, 0.0, casting, block, warps, False, None
    )


def _load(file: str) -> ModuleType:
    spec = spec_from_file_location("triton_tutorial_attention", file)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError) as error:
        raise ValueError(f"--peers: got {file}, want Triton's 06-fused-attention.py ({error})") from None
    if not hasattr(module, "_attention"):
        raise ValueError(f"--peers: got {file} without `_attention`, want Triton's 06-fused-attention.py")
    return module


def _tutorial(file: str, length: int, heads: int, head_dim: int) -> None:
    """Forward and backward; the tutorial wants whole blocks of 128 tokens."""
    from triton.runtime.autotuner import Autotuner

    def every_configuration(self, *arguments, **keywords):
        for config in self.configs:
            sizes = [v for k, v in config.kwargs.items() if k.startswith("BLOCK")]
            if math.prod(sizes) < LEAST_TILE:
                continue
            chosen = config.all_kwargs()
            if config.pre_hook:
                config.pre_hook(dict(zip(self.arg_names, arguments, strict=False)) | keywords | chosen)
            self.fn.run(*arguments, **keywords, **chosen)

    attention = _load(file)._attention
    shape = (1, heads, -(-length // 128) * 128, head_dim)
    q, k, v, grad = (torch.empty(shape, dtype=torch.float16, device="cuda:0") for _ in range(4))
    context = SimpleNamespace()
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    count = attention.forward.__code__.co_argcount
    extra = (False,) * (count - 6)  # newer versions ask about warp specialisation too
    with patch.object(Autotuner, "run", every_configuration):
        attention.forward(context, q, k, v, False, head_dim**-0.5, *extra)
        attention.backward(context, grad)
