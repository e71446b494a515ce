"""The CUDA C++ kernels of csrc/cuda in the ledger: what nvcc makes of them for sm_90a and what they move.

Needs nvcc and no GPU. The Python launchers of cuda_kernels and attention_hopper run on meta tensors with
a library that writes down what they would launch; nvcc.py has the facts of the code. Bytes are a
count for every argument: whole arrays once, and what is read for every token or by every cluster
again (tests/test_ledger_cuda.py compares with what the kernels access in simulation).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prfl_bench.ledger import sass
from prfl_bench.ledger import table as ledger_rows
from prfl_bench.ledger.nvcc import absence, compiled
from prfl_bench.operations import LAUNCHES as TRITON_LAUNCHES
from prfl_bench.operations import OPERATIONS as ALL_OPERATIONS
from prfl_bench.operations import Launch as Pass
from prfl_bench.operations import cases
from prfl_bench.shapes import Shape
from prfl_kernels import cuda_kernels, solver_step
from prfl_kernels.attention import (
    cuda as attention_hopper,
)
from prfl_kernels.attention import (
    fp8 as attention_fp8,
)
from prfl_kernels.attention import (
    triton_kernels as attention_triton,
)
from prfl_kernels.norm import cuda as norm_cuda
from prfl_kernels.norm import triton_kernels as norm_triton
from prfl_kernels.qk_norm_rope import cuda as norm_rope_cuda
from prfl_kernels.qk_norm_rope import triton_kernels as norm_rope
from prfl_kernels.reward_pool import cuda as pool_cuda
from prfl_kernels.reward_pool import triton_kernels as pool_triton

__all__ = ["absence", "collect"]

# Operations of the Triton kernels that these kernels do.
OPERATIONS = (
    "modulate", "layer_norm", "gated_add", "qk_norm_rope", "rms_norm", "reward_pool", "attention",
)  # fmt: skip


class Argument(NamedTuple):
    name: str
    tensor: Tensor
    read: int = 0  # bytes, every access of them
    written: int = 0


class Launch(NamedTuple):
    source: str
    kernel: str  # with its template arguments, as c++filt writes it
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int
    arguments: list[Argument]
    tensor_flops: int = 0
    steps: int = 0  # blocks of keys of a tile of queries, where a block has many tiles


def _arguments(given: Mapping[str, object], written: str, **times: float) -> list[Argument]:
    """Of the tensors of a launch: written ones once, the others read as often as `times` says, or once."""
    return [
        Argument(name, a, 0, a.nbytes) if name in written.split()
        else Argument(name, a, round(times.get(name, 1) * a.nbytes))
        for name, a in given.items()
        if isinstance(a, Tensor)
    ]  # fmt: skip


def _footprint(a: Tensor) -> int:
    """Bytes of a tensor, those that a stride of 0 repeats once."""
    return a.element_size() * math.prod(n for n, s in zip(a.shape, a.stride(), strict=True) if s or not n)


_TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16"}
_TYPE = list(_TYPES.values())


class Recorder:
    """Stands for the compiled library: launches nothing, and keeps what would have been launched."""

    reward_pool_queries, reward_pool_width, row_width = 8, 5120, 5120
    multiprocessors = 132

    def __init__(self):
        self.launches: list[Launch] = []

    @staticmethod
    def pool_geometry(batch: int, length: int, width: int, bf16: bool) -> tuple[int, int, int]:
        """(blocks of a cluster, runs, bytes of shared memory), as reward_pool.cu and pool_tiles.h say."""
        tokens, ranks = 32 if bf16 else 16, 8 if width > 1536 else 4
        tiles, most = -(-length // tokens), max(1, 128 // ranks // batch)
        run = -(-tiles // most) * tokens
        columns, pairs = -(-width // (16 * ranks)) * 16, tokens * 8
        ring = 4 * tokens * (columns * (2 if bf16 else 4) + 16)
        return ranks, -(-length // run), ring + 4 * pairs * (8 + 2 * 8 + 2) + 4 * 8

    def reward_pool_runs(self, batch: int, length: int, width: int, bf16: bool) -> int:
        return self.pool_geometry(batch, length, width, bf16)[1]

    def _run(self, batch: int, length: int, width: int, boundary: int) -> int:
        blocks = 132 if width > 3072 else 264 if width > 2560 else 396
        return -(-length // max(1, blocks // batch - (boundary > 0)))

    def runs_before(self, batch: int, length: int, width: int, boundary: int) -> int:
        return -(-boundary // self._run(batch, length, width, boundary))

    def row_runs(self, batch: int, length: int, width: int, boundary: int = 0) -> int:
        run = self._run(batch, length, width, boundary)
        return -(-boundary // run) - ((boundary - length) // run)

    def _pool(self, kernel: str, arguments: list[Argument], products: int, given: dict) -> None:
        bf16, sizes = given["bf16"], (given["batch"], given["length"], given["width"])
        ranks, runs, shared = self.pool_geometry(*sizes, bf16)
        name = f"{kernel}<{_TYPES[given['x'].dtype]}, {5 if ranks == 8 else 3}>"
        flops = 2 * math.prod(sizes) * 8 * products
        grid = (ranks * runs, given["batch"], 1)
        self.launches.append(Launch("reward_pool", name, grid, 256, shared, ranks, arguments, flops))

    def reward_pool_forward(self, **given) -> None:
        batch, width, bf16 = given["batch"], given["width"], given["bf16"]
        runs = self.reward_pool_runs(batch, given["length"], width, bf16)
        kept = [a for a in _arguments(given, "scores top total acc", u=batch * runs)
                if a.name not in ("pooled", "lse")]  # fmt: skip
        self._pool("pool_forward", kept, 2 * (3 if bf16 else 6), given)
        blocks = -(-width // 1024)
        # Every thread reads the maxima and sums of the runs, the maxima twice.
        times = {"top": 2 * blocks * 256, "total": blocks * 256}
        merged = {name: given[name] for name in ("pooled", "lse", "top", "total", "acc")}
        arguments, grid = _arguments(merged, "pooled lse", **times), (blocks, given["queries"], batch)
        self.launches.append(Launch("reward_pool", "pool_merge", grid, 256, 0, 1, arguments))

    def reward_pool_backward(self, **given) -> None:
        batch, bf16 = given["batch"], given["bf16"]
        ranks, runs, _ = self.pool_geometry(batch, given["length"], given["width"], bf16)
        # Two layouts of dpooled; every block of a cluster wants all scores of its tokens.
        times = {"u": batch * runs, "dpooled": 2 * runs, "scores": ranks, "lse": ranks * runs * 256 // 8}
        times["delta"] = times["lse"] = times["lse"] if bf16 else times["lse"] // 2
        arguments = _arguments(given, "dx part", **times)
        made = {a.name for a in arguments}
        products = (3 if bf16 else 6) * (1 + ("part" in made) + ("dx" in made)) + (3 if "dx" in made else 0)
        products += 3 if "dx" in made and not bf16 else 0
        self._pool("pool_backward", arguments, products, given)

    def _rows(self, source: str, kernel: str, arguments: list[Argument], blocks: int, given: dict) -> None:
        grid, threads = (blocks, given["batch"], 1), -(-given["width"] // 256) * 32
        self.launches.append(Launch(source, kernel, grid, threads, 4 * 20 * 4, 1, arguments))

    def _norm(self, way: str, kinds: str, written: str, blocks: int, given: dict, **times: float) -> None:
        """Every token reads the vectors of its sample."""
        values = given["batch"] * given["length"] * given["width"]
        times |= {name: values * 4 / given[name].nbytes
                  for name in ("gate", "scale", "shift") if given.get(name) is not None}  # fmt: skip
        types = ", ".join(_TYPE[given[kind]] for kind in kinds.split())
        kernel = f"norm_{way}_kernel<{types}, {_special(given['width'], given['aligned'])}>"
        self._rows("norm", kernel, _arguments(given, written, **times), blocks, given)

    def norm_forward(self, **given) -> None:
        self._norm("forward", "x_kind y_kind", "total n quant mean rstd", given["length"], given)

    def norm_backward(self, **given) -> None:
        runs = self.row_runs(given["batch"], given["length"], given["width"], given["boundary"])
        threads = -(-given["width"] // 256) * 32
        kinds, times = "x_kind y_kind dn_kind", {"mean": threads, "rstd": threads}
        self._norm("backward", kinds, "dx dy part", runs, given, **times)

    def _qk(self, way: str, written: str, blocks: int, given: dict, **times: float) -> None:
        """Every token reads the weights, and of the tables a value for every pair."""
        tokens, cos = given["batch"] * given["length"], given["cos"]
        times |= {"weight_q": tokens, "weight_k": tokens}
        if cos is not None:
            times |= dict.fromkeys(("cos", "sin"), tokens * given["width"] * 2 / cos.nbytes)
        fits = given["aligned"] and (cos is None or given["head_dim"] == 128)
        kernel = f"qk_{way}_kernel<{_TYPES[given['q'].dtype]}, {_special(given['width'], fits)}>"
        self._rows("qk_norm_rope", kernel, _arguments(given, written, **times), blocks, given)

    def qk_norm_rope_forward(self, **given) -> None:
        self._qk("forward", "out_q out_k quant_q quant_k rstd_q rstd_k", given["length"], given)

    def qk_norm_rope_backward(self, **given) -> None:
        runs = self.row_runs(given["batch"], given["length"], given["width"])
        threads = -(-given["width"] // 256) * 32
        self._qk("backward", "dq dk part", runs, given, rstd_q=threads, rstd_k=threads)

    def solver_step(self, **given) -> None:
        size, aligned = given["size"], given["aligned"]
        blocks = -(-size // 2048)
        threads = -(-size // 8) if aligned else blocks * 256
        arguments = _arguments(given, "x_next x_c m_t", columns=threads)
        kernel = f"solver_step_kernel<{_TYPES[given['velocity'].dtype]}, {str(aligned).lower()}>"
        grid = (blocks, given["batch"], 1)
        self.launches.append(Launch("solver_step", kernel, grid, 256, 0, 1, arguments))

    def attention_hopper_forward(self, **given) -> None:
        self._attention(f"Bf16<{attention_tile(given['keys'])}>", given)

    def attention_hopper_fp8_forward(self, **given) -> None:
        self._attention("E4m3", given)

    def _attention(self, kind: str, given: dict) -> None:
        """As attention_hopper.cu: a block has 128 queries at a time; the two of a cluster read keys and
        values together, which stay with them for all queries of a head where they fit."""
        batch, queries, keys, heads = (given[size] for size in ("batch", "queries", "keys", "heads"))
        tiles, (block, slots, shared, persistent) = -(-queries // 128), ATTENTION_TILES[kind]
        ranks = 2 if tiles % 2 == 0 or tiles > 32 else 1
        columns, blocks = -(-tiles // ranks), -(-keys // block)
        items = batch * heads * columns
        clusters = min(items, max(1, self.multiprocessors // ranks)) if persistent else items
        loads = items
        if persistent and 2 * blocks <= slots:  # once for every head of a cluster
            each, more = divmod(items, clusters)
            firsts = [i * each + min(i, more) for i in range(clusters)] + [items]
            loads = sum((b - 1) // columns - a // columns + 1 for a, b in pairwise(firsts))
        times = {"k": loads / (batch * heads), "k_scale": ranks * loads / (batch * heads)}
        # Four threads share a row; every consuming thread reads a quarter of v's scales.
        times |= {"v": times["k"], "q_scale": 4, "v_scale": columns * ranks * 2 * 128 // 4}
        arguments = _arguments(given, "out lse", **times)
        flops = 4 * items * ranks * 128 * blocks * block * attention_hopper.HEAD_DIM
        kernel, grid = f"attention_hopper_kernel<{kind}>", (clusters * ranks, 1, 1)
        steps = blocks if persistent else 0
        self.launches.append(
            Launch("attention_hopper", kernel, grid, 384, shared, ranks, arguments, flops, steps)
        )


def attention_tile(keys: int) -> int:
    """Keys of a tile in bfloat16, as attention_hopper_tile says."""
    return 176 if keys > 1024 else min((128, 144), key=lambda tile: -(-keys // tile) * tile)


# (keys of a tile, tiles of the ring, bytes of shared memory, whether a block has many tiles of queries).
ATTENTION_TILES = {
    "Bf16<128>": (128, 5, 229528, True),
    "Bf16<144>": (144, 4, 213128, True),
    "Bf16<176>": (176, 4, 213096, False),
    "E4m3": (128, 8, 168096, False),
}


def _special(width: int, aligned: bool) -> int:
    return width if aligned and width in (1536, 3072, 5120) else 0


@contextmanager
def recording() -> Iterator[Recorder]:
    """The launchers of the Triton kernels are those of the CUDA kernels, on a recorder."""
    recorder = Recorder()
    replaced = [
        (cuda_kernels, "library", lambda: recorder),
        (cuda_kernels, "_view", lambda a: a),
        (norm_triton, "forward", norm_cuda.forward),
        (norm_triton, "backward", norm_cuda.backward),
        (norm_rope, "forward", norm_rope_cuda.forward),
        (norm_rope, "backward", norm_rope_cuda.backward),
        (pool_triton, "forward", pool_cuda.forward),
        (pool_triton, "backward", pool_cuda.backward),
        (attention_triton, "forward", attention_hopper.forward),
        (attention_fp8, "launch_forward", attention_hopper.launch_forward_fp8),
    ]  # fmt: skip
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield recorder
    finally:
        for owner, name, value in plain:
            setattr(owner, name, value)


IMAGE = 257  # keys of the first frame where a video is made from an image

# The backward of attention is Triton's, which has no solver step.
ENTRIES = (
    *(one for one in TRITON_LAUNCHES
      if one.op.startswith(OPERATIONS) and not (one.kind == "attention" and "backward" in one.op)),
    *(Pass(o.name, o.kind, (torch.float32,), o.inputs,
           lambda s, *a: solver_step.forward(solver_step.cuda, *a))
      for o in ALL_OPERATIONS if o.name == "solver_step"),
    Pass("attention, cross 257", "attention", (torch.bfloat16,),
         lambda s: [s.per_head(), s.per_head(IMAGE), s.per_head(IMAGE)],
         lambda s, *a: attention_triton.forward(*a, s.head_dim**-0.5)),
)  # fmt: skip


# What the copy engine moves, and no instruction of a thread.
COPIED = {"reward_pool": ("x", "dx"), "attention_hopper": ("q", "k", "v", "k_scale", "out")}


def _kernel(launch: Launch) -> dict:
    """One launch as the ledger's other rows have it."""
    code = compiled(launch.source)[launch.kernel]
    blocks, limits = sass.occupancy(code["registers"], launch.threads, launch.shared)
    arguments = [
        {"name": a.name, "footprint": _footprint(a.tensor), "read": a.read, "written": a.written}
        for a in launch.arguments
    ]
    if "cycles" in code:
        flops = launch.tensor_flops
        products = ledger_rows.product_seconds(code, launch.grid, blocks, flops, launch.steps)
    else:
        products = launch.tensor_flops / ledger_rows.DOT_RATES["16-bit"]
    seconds = {"products": products}
    copied = COPIED.get(launch.source, ())
    return ledger_rows.kernel(code, arguments, copied, launch.tensor_flops, seconds) | {
        "kernel": launch.kernel.split("<")[0].removesuffix("_kernel"), "grid": list(launch.grid),
        "threads": launch.threads, "cluster": launch.cluster, "shared": launch.shared, "blocks": blocks,
        "limited_by": limits,
    }  # fmt: skip


def record(call: Callable[[], Iterable[Tensor | None]]) -> tuple[list[Tensor], list[Launch]]:
    """(the inputs and outputs that call() returns, what it launches) on meta tensors."""
    with recording() as recorder:
        held = [a for a in call() if a is not None]
    return list({id(a): a for a in held}.values()), recorder.launches


def _row(entry: Pass, s: Shape) -> dict:
    held, launches = record(entry.bind(s))
    # torch adds the partial sums of the runs.
    parts = [a.tensor for launch in launches for a in launch.arguments if a.name == "part"]
    sums = sum(a.nbytes + a.nbytes // a.shape[1] for a in parts)
    # It turns the scales of keys: filled, read and written.
    turned = [a.tensor for launch in launches for a in launch.arguments if a.name == "k_scale"]
    around = {"sum": sums, "copy": 3 * sum(a.nbytes for a in turned)}
    kernels = [_kernel(launch) for launch in launches]
    return ledger_rows.operation(entry, s, sum(a.nbytes for a in held), kernels, around)


def collect(quick: bool) -> list[dict]:
    """Rows like those of ledger.collect, of every operation and shape; quick: at 32,760 tokens alone."""
    sources = ("attention_hopper", "norm", "qk_norm_rope", "reward_pool", "solver_step")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, sources))
    return [_row(entry, s) for entry, s in cases(quick, ENTRIES)]
