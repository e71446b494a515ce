"""The kernel ledger: what every Triton kernel of this package compiles to and moves, without a GPU.

One row a kernel launch at the shapes of Wan2.1: registers, spills, occupancy and instructions of the
sm_90a code, bytes and operations counted in Triton's interpreter, and a predicted time. A row of
ENTRIES is all that a new kernel needs. Compiling and interpreting take processes of their own,
since TRITON_INTERPRET has to be set before Triton is imported. docs/kernels.md says how to read it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prfl_kernels import (
    add_norm,
    attention_fp8,
    attention_triton,
    bias_gelu,
    norm_rope,
    quantize_fp8,
    reward_pool,
    sass,
)

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
WIDTHS = {"14B": (5120, 40), "1.3B": (1536, 12)}  # width and heads
FFN = {"14B": 13824, "1.3B": 8960}
GRIDS = {32760: (21, 30, 52), 75600: (21, 45, 80)}  # 81 frames at 480 x 832 and at 720 x 1280
HEAD_DIM, TEXT = 128, 512
# Assumed for predictions: measured copy bandwidth of an H100 SXM; FLOP/s of tensor-core products as
# FlashAttention 3 reaches them (float32 in tf32 at half of bfloat16's rate, a third of that when
# split in three, and on the CUDA cores in full precision); one lane an operation of 132 SMs with 128
# lanes at 1.755 GHz for everything elementwise.
BANDWIDTH = 3.0e12
DOT_RATES = {"fp8": 1000e12, "16-bit": 660e12, "TF32": 330e12, "TF32x3": 110e12, "IEEE": 59e12}
LANES = 29.6e12
ASSUMPTIONS = (
    f"Predicted for an H100 SXM, not measured: the longest of bytes / {BANDWIDTH / 1e12:.1f} TB/s, "
    f"FLOP / {DOT_RATES['16-bit'] / 1e12:.0f} TFLOP/s (fp8: {DOT_RATES['fp8'] / 1e12:.0f}, tf32: "
    f"{DOT_RATES['TF32'] / 1e12:.0f}, tf32x3: {DOT_RATES['TF32x3'] / 1e12:.0f}), and elementwise "
    f"operations / {LANES / 1e12:.1f} T/s, summed over an operation's kernels; no launch cost, no latency."
)


class Case(NamedTuple):
    """A shape: the model, its tokens, the dtype of the residual stream, and over how many GPUs the
    heads are divided."""

    model: str
    length: int
    stream: torch.dtype
    shards: int = 1

    @property
    def width(self) -> int:
        return WIDTHS[self.model][0]

    @property
    def heads(self) -> int:
        return max(1, WIDTHS[self.model][1] // self.shards)

    @property
    def grid(self) -> tuple[int, int, int]:
        return GRIDS.get(self.length, (1, 1, self.length))

    def rows(self, dtype: torch.dtype = BF16) -> Tensor:
        return empty(1, self.length, self.width, dtype=dtype)

    def residual(self) -> Tensor:
        return self.rows(self.stream)

    def modulation(self) -> Tensor:
        """One of the six vectors of a block, a slice of [B, 6, C]."""
        return empty(1, 6, self.width)[:, 1]

    def vector(self) -> Tensor:
        return empty(self.width)

    def stats(self) -> Tensor:
        return empty(2, 1, self.length)

    def projected(self) -> tuple[Tensor, ...]:
        """q, k and v before the norm, slices of the buffer of all three."""
        return empty(1, self.length, 3 * self.width, dtype=BF16).chunk(3, dim=-1)

    def per_head(self, dtype: torch.dtype = BF16) -> Tensor:
        return empty(1, self.length, self.heads, HEAD_DIM, dtype=dtype)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_make = [_meta]


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return _make[-1](shape, dtype)


@contextmanager
def tensors(make: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Iterator[None]:
    """Let the entries call their launchers with tensors of make(shape, dtype), not with meta tensors."""
    _make.append(make)
    try:
        yield
    finally:
        _make.pop()


def _norm(s: Case, vector: Callable, out_dtype: torch.dtype, base: float = 1.0) -> Iterable:
    x, scale, shift = s.residual(), vector(), vector()
    return x, scale, shift, *add_norm.forward(x, None, None, scale, shift, base, 1e-6, out_dtype)


def _norm_backward(s: Case, vector: Callable, base: float = 1.0) -> Iterable:
    dn, x, scale, stats = s.rows(), s.residual(), vector(), s.stats()
    made = add_norm.backward(dn, None, x, None, None, scale, stats, base, True, None)
    return dn, x, scale, stats, *made


def _gated_add(s: Case) -> Iterable:
    x, y, gate = s.residual(), s.rows(), s.modulation()
    return x, y, gate, *add_norm.forward(x, y, gate, None, None, 0.0, 0.0, None)


def _gated_add_backward(s: Case) -> Iterable:
    dsum, y, gate = s.residual(), s.rows(), s.modulation()
    made = add_norm.backward(None, dsum, None, y, gate, None, None, 0.0, False, BF16)
    return dsum, y, gate, *made


def _gated_norm(s: Case, vector: Callable, base: float, out_dtype: torch.dtype = BF16) -> Iterable:
    x, y, gate, scale, shift = s.residual(), s.rows(), s.modulation(), vector(), vector()
    made = add_norm.forward(x, y, gate, scale, shift, base, 1e-6, out_dtype)
    return x, y, gate, scale, shift, *made


def _gated_norm_backward(s: Case, vector: Callable, base: float) -> Iterable:
    dn, dsum, x, y = s.rows(), s.residual(), s.residual(), s.rows()
    gate, scale, stats = s.modulation(), vector(), s.stats()
    made = add_norm.backward(dn, dsum, x, y, gate, scale, stats, base, True, BF16)
    return dn, dsum, x, y, gate, scale, stats, *made


def _qk(s: Case, fp8: bool = False) -> Iterable:
    q, k, _ = s.projected()
    weights = s.vector(), s.vector()
    made = norm_rope.launch_forward(q, k, *weights, s.grid, s.heads, 1e-6, 0, fp8)
    return q, k, *weights, *made[0], *made[1], made[2]


def _qk_backward(s: Case) -> Iterable:
    q, k, _ = s.projected()
    held = s.per_head(), s.per_head(), q, k, s.vector(), s.vector(), s.stats()
    return *held, *norm_rope.launch_backward(*held, s.grid, s.heads, 0, True)


def _rms(s: Case) -> Iterable:
    x, weight = s.rows(), s.vector()
    made = norm_rope.launch_forward(x, None, weight, None, None, 1, 1e-6, 0)
    return x, weight, made[0][0], made[2]


def _rms_backward(s: Case) -> Iterable:
    dn, x, weight, rstd = s.rows(), s.rows(), s.vector(), s.stats()[:1]
    made = norm_rope.launch_backward(dn, None, x, None, weight, None, rstd, None, 1, 0, True)
    return dn, x, weight, rstd, made[0], made[2][0]


def _gelu(s: Case) -> Iterable:
    h, bias = empty(1, s.length, FFN[s.model], dtype=BF16), empty(FFN[s.model])
    return h, bias, bias_gelu.launch_forward(h, bias)


def _gelu_backward(s: Case) -> Iterable:
    dg, h = (empty(1, s.length, FFN[s.model], dtype=BF16) for _ in range(2))
    bias = empty(FFN[s.model])
    return dg, h, bias, *bias_gelu.launch_backward(dg, h, bias, True)


def _gelu_fp8(s: Case) -> Iterable:
    h = empty(1, s.length, FFN[s.model], dtype=BF16)
    return h, *quantize_fp8.launch(h, True)


def _rows_fp8(s: Case) -> Iterable:
    x = s.rows()
    return x, *quantize_fp8.launch(x, False)


POOL_QUERIES = 8  # one learned query with the 8 heads of the official reward model


def _pool(s: Case) -> Iterable:
    x, u = s.residual(), empty(POOL_QUERIES, s.width)
    return x, u, *reward_pool.launch_forward(x, u)


def _pool_backward(s: Case) -> Iterable:
    x, u, scores = s.residual(), empty(POOL_QUERIES, s.width), empty(1, s.length, POOL_QUERIES)
    dpooled, lse, delta = empty(1, POOL_QUERIES, s.width), empty(1, POOL_QUERIES), empty(1, POOL_QUERIES)
    made = reward_pool.launch_backward(dpooled, delta, x, u, scores, lse, True, True)
    return x, u, scores, dpooled, lse, delta, *made


def _qkv(s: Case, keys: int | None) -> list[Tensor]:
    k, v = (empty(1, keys or s.length, s.heads, HEAD_DIM, dtype=BF16) for _ in range(2))
    return [s.per_head(BF16), k, v]


def _attention(s: Case, keys: int | None = None) -> Iterable:
    q, k, v = _qkv(s, keys)
    return q, k, v, *attention_triton.forward(q, k, v, HEAD_DIM**-0.5)


def _attention_backward(s: Case, keys: int | None = None) -> Iterable:
    q, k, v = _qkv(s, keys)
    held = s.per_head(BF16), None, q, k, v, s.per_head(BF16), empty(1, s.heads, s.length)
    return *held, *attention_triton.backward(*held, HEAD_DIM**-0.5)


def _attention_fp8(s: Case, keys: int | None = None) -> Iterable:
    keys = keys or s.length
    q, q_scale = s.per_head(FP8), empty(1, s.length, s.heads)
    k, k_scale = empty(1, keys, s.heads, HEAD_DIM, dtype=FP8), empty(1, keys, s.heads)
    padded = attention_fp8.padded_length(keys)
    v, v_scale = empty(1, s.heads, HEAD_DIM, padded, dtype=FP8), empty(1, s.heads, HEAD_DIM)
    held = q, q_scale, k, k_scale, v, v_scale
    return *held, *attention_fp8.launch_forward(*held, HEAD_DIM**-0.5)


def _quantize_values(s: Case) -> Iterable:
    v = s.projected()[2].unflatten(2, (s.heads, HEAD_DIM))
    inverse = empty(1, s.heads, HEAD_DIM)
    return v, inverse, attention_fp8.launch_quantize(v, inverse, attention_fp8.padded_length(s.length))


class Entry(NamedTuple):
    """An operation: call(case) makes its launches and returns its inputs and outputs, None allowed."""

    op: str
    call: Callable[[Case], Iterable[Tensor | None]]
    kind: str = "memory"  # bound by memory, or "matrix", or "attention": matrix with tiles to check
    streams: tuple[torch.dtype, ...] = (F32, BF16)  # the one dtype, where the stream does not matter


ENTRIES = (
    Entry("modulate", lambda s: _norm(s, s.modulation, BF16)),
    Entry("modulate backward", lambda s: _norm_backward(s, s.modulation)),
    Entry("modulate_fp8", lambda s: _norm(s, s.modulation, FP8)),
    Entry("layer_norm", lambda s: _norm(s, s.vector, BF16, 0.0)),
    Entry("layer_norm backward", lambda s: _norm_backward(s, s.vector, 0.0)),
    Entry("gated_add", _gated_add),
    Entry("gated_add backward", _gated_add_backward),
    Entry("gated_add_modulate", lambda s: _gated_norm(s, s.modulation, 1.0)),
    Entry("gated_add_modulate backward", lambda s: _gated_norm_backward(s, s.modulation, 1.0)),
    Entry("gated_add_modulate_fp8", lambda s: _gated_norm(s, s.modulation, 1.0, FP8)),
    Entry("gated_add_norm", lambda s: _gated_norm(s, s.vector, 0.0)),
    Entry("gated_add_norm backward", lambda s: _gated_norm_backward(s, s.vector, 0.0)),
    Entry("gated_add_norm_fp8", lambda s: _gated_norm(s, s.vector, 0.0, FP8)),
    Entry("qk_norm_rope", _qk, streams=(BF16,)),
    Entry("qk_norm_rope_fp8", lambda s: _qk(s, True), streams=(BF16,)),
    Entry("qk_norm_rope backward", _qk_backward, streams=(BF16,)),
    Entry("rms_norm", _rms, streams=(BF16,)),
    Entry("rms_norm backward", _rms_backward, streams=(BF16,)),
    Entry("bias_gelu", _gelu, streams=(BF16,)),
    Entry("bias_gelu backward", _gelu_backward, streams=(BF16,)),
    Entry("quantize_fp8", _rows_fp8, streams=(BF16,)),
    Entry("quantize_fp8, gelu", _gelu_fp8, streams=(BF16,)),
    Entry("reward_pool", _pool),
    Entry("reward_pool backward", _pool_backward),
    Entry("quantize_values", _quantize_values, streams=(BF16,)),
    Entry("attention, self", _attention, "attention", (BF16,)),
    Entry("attention, self backward", _attention_backward, "attention", (BF16,)),
    Entry("attention, cross", lambda s: _attention(s, TEXT), "attention", (BF16,)),
    Entry("attention, cross backward", lambda s: _attention_backward(s, TEXT), "attention", (BF16,)),
    Entry("attention_fp8, self", _attention_fp8, "attention", (BF16,)),
    Entry("attention_fp8, cross", lambda s: _attention_fp8(s, TEXT), "attention", (BF16,)),
)


def cases(quick: bool) -> list[tuple[int, Case]]:
    """(index of the entry, case) of every operation and shape; quick: at 32,760 tokens alone."""
    return [
        (index, Case(model, length, stream))
        for length in GRIDS
        if not (quick and length != min(GRIDS))
        for model in WIDTHS
        for index, entry in enumerate(ENTRIES)
        for stream in entry.streams
    ]


def collect(
    quick: bool = False,
    peers: str | None = None,
    workers: int | None = None,
    only: Callable[[Entry, Case], bool] | None = None,
) -> dict:
    """Everything `prfl kernels --json` prints. peers: the tutorial's file for ledger_peers, "" for the
    installed peers alone, None for none; only: the operations and shapes to take, None for all."""
    if find_spec("triton") is None:
        raise ValueError("ledger: got no Triton, want it installed")
    if peers is not None:
        from prfl_kernels.ledger_peers import check

        check(peers)
    jobs = cases(quick)
    taken = [i for i, (index, case) in enumerate(jobs) if only is None or only(ENTRIES[index], case)]
    workers = min(workers or min(2, os.cpu_count() or 1), max(1, len(taken)))
    shares = [taken[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        tasks = ("compile", "count")
        made = pool.map(lambda share: [_spawn(task, [quick, share]) for task in tasks], shares)
        rows: dict[int, dict] = {}
        for share, results in zip(shares, made, strict=True):
            for i, compiled, counted in zip(share, *results, strict=True):
                rows[i] = _row(*jobs[i], compiled, counted)
    from prfl_kernels import ledger_cuda

    absent = ledger_cuda.absence()
    found = {"assumptions": ASSUMPTIONS, "operations": [rows[i] for i in taken], "cuda_absent": absent}
    found["cuda"] = [] if absent else ledger_cuda.collect(quick)
    return found if peers is None else found | {"peers": _spawn("peers", peers)}


def _spawn(task: str, what: Any) -> Any:
    """The results of `task`, from a process with Triton in the right mode: "compile" and "count" the
    cases numbered in what = [quick, share], or compile the "peers"."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PRFL_KERNELS")}
    environment["PRFL_TUNING"] = ""  # the module constants, also on a GPU that has tuned choices
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what launches without the option had so far
    if task == "count":
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        code = "import sys; from prfl_kernels import ledger; ledger.work(*sys.argv[1:])"
        arguments = [task, json.dumps(what), str(file)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment)
        if done.returncode:
            raise RuntimeError(f"ledger: the process that was to {task} ended with {done.returncode}")
        result = json.loads(file.read_text())
    if "error" in result:
        raise ValueError(result["error"])
    return result["rows"]


def work(task: str, what: str, file: str) -> None:
    """The inside of a worker process: results, or the message of a ValueError, as JSON in `file`."""
    torch.set_num_threads(1)
    asked = json.loads(what)
    try:
        if task == "peers":
            from prfl_kernels.ledger_peers import compile_peers

            result = {"rows": compile_peers(min(GRIDS), WIDTHS, asked)}
        else:
            jobs, one = cases(asked[0]), _compile if task == "compile" else _count
            result = {"rows": [one(partial(ENTRIES[jobs[i][0]].call, jobs[i][1])) for i in asked[1]]}
    except ValueError as error:
        result = {"error": str(error)}
    Path(file).write_text(json.dumps(result))


def _compile(call: Callable) -> list[dict]:
    return [sass.facts(launch) for launch in sass.compile_calls(call)]


def _count(call: Callable) -> dict:
    from prfl_kernels.ledger_traffic import count

    held, launches, torch_traffic = count(call)
    minimum = sum(size(a) for a in {id(a): a for a in held if a is not None}.values())
    return {"minimum": minimum, "launches": launches, "torch": torch_traffic}


def size(a: Tensor) -> int:
    return a.numel() * a.element_size()


def _dot_rate(dtype: str, precision: str) -> float:
    if dtype.startswith("fp8"):
        return DOT_RATES["fp8"]
    return DOT_RATES["16-bit"] if dtype in ("bf16", "fp16") else DOT_RATES[precision]


def _row(index: int, case: Case, compiled: list[dict], counted: dict) -> dict:
    """Join what was compiled and what was counted for one operation at one shape."""
    entry = ENTRIES[index]
    kernels = []
    for code, traffic in zip(compiled, counted["launches"], strict=True):
        if code["kernel"] != traffic["kernel"]:
            raise ValueError(f"ledger: got {traffic['kernel']} interpreted, want {code['kernel']}")
        kernels.append(_kernel(code, traffic, case.length * case.width))
    torch_bytes = sum(counted["torch"]["memory"].values())
    torch_reread = sum(counted["torch"]["cached"].values())
    moved = torch_bytes + sum(k["bytes"] for k in kernels)
    torch_seconds = torch_bytes / BANDWIDTH
    return {
        "op": entry.op,
        "kind": entry.kind,
        "model": case.model,
        "length": case.length,
        "stream": str(case.stream).removeprefix("torch.") if len(entry.streams) > 1 else None,
        "minimum_bytes": counted["minimum"],
        "bytes": moved,
        "ratio": moved / counted["minimum"],
        "reread_bytes": torch_reread + sum(k["reread_bytes"] for k in kernels),
        "torch_bytes": counted["torch"]["memory"],
        "flops": sum(k["flops"] for k in kernels),
        "elementwise": sum(k["elementwise"] for k in kernels),
        "predicted_seconds": torch_seconds + sum(max(k["seconds"].values()) for k in kernels),
        "kernels": kernels,
    }


def _kernel(code: dict, traffic: dict, row_values: int) -> dict:
    """One launch: bytes up to an argument's size are memory traffic, beyond it re-reads; so are all
    reads of an argument that the kernel wrote first, or an earlier step of the operation if it is small."""
    moved = reread = 0
    for a in traffic["arguments"]:
        memory = min(a["written"], a["footprint"])
        memory += 0 if a["cached"] else min(a["read"], a["footprint"])
        moved += memory
        reread += a["read"] + a["written"] - memory
        widths = code["widths"].get(a["name"], {})
        if a["name"] in code["descriptors"]:
            a["wide"] = {side: 1.0 for side in ("read", "written") if a[side]}
        else:
            a["wide"] = {side: _wide_share(counts) for side, counts in widths.items()}
        a["rows"] = a["footprint"] >= row_values  # whole rows of C values, of a byte at least
    sides = ("read", "written")
    accessed = [(a[side], a["wide"].get(side, 0.0)) for a in traffic["arguments"] for side in sides]
    flops = sum(2 * m * n * k * number for m, n, k, _, _, number in traffic["dots"])
    dot_seconds = sum(
        2 * m * n * k * number / _dot_rate(dtype, precision)
        for m, n, k, dtype, precision, number in traffic["dots"]
    )
    return code | {
        "bytes": moved,
        "reread_bytes": reread,
        "wide_share": sum(b * w for b, w in accessed) / max(1, sum(b for b, _ in accessed)),
        "scalars": [a["name"] for a in traffic["arguments"] if a["scalar"] and (a["read"] or a["written"])],
        "flops": flops,
        "elementwise": traffic["elementwise"],
        "seconds": {
            "memory": moved / BANDWIDTH, "tensor cores": dot_seconds, "lanes": traffic["elementwise"] / LANES,
        },
        "dots": traffic["dots"],
        "arguments": traffic["arguments"],
    }  # fmt: skip


def _wide_share(counts: dict[str, int]) -> float:
    """Share of the bytes that are accessed with 16 bytes a thread, of {bytes a thread: instructions}."""
    sizes = {int(width): int(width) * number for width, number in counts.items()}
    return sum(b for width, b in sizes.items() if width >= sass.WIDE) / sum(sizes.values())
