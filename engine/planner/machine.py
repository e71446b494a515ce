"""GPUs as the planner knows them: memory, rates and links, with the basis of each."""

from typing import NamedTuple

from prfl_engine.errors import UserError
from prfl_engine.planner.seconds import Rates

GIB = 2**30
CONTEXT = 600_000_000  # CUDA's context, loaded kernels and cuBLAS's work space
COMMUNICATOR = 2 * 32 * 2**22  # NCCL's buffers for a group of ranks: 32 channels, 4 MiB each way
PROCESS = 4_000_000_000  # of the host: Python, torch and CUDA's libraries
WORKER = 400_000_000  # a loader process: 0.38 GB measured on a CPU, memory of libraries shared not deducted
NOT_COUNTED = (
    "fragments of the allocator, partial sums of Triton kernels, the page cache of files on the host"
)


class Machine(NamedTuple):
    """A GPU and how it is connected."""

    name: str
    memory: int  # bytes that CUDA reports, of which the CUDA context takes its part
    peak: float  # dense bfloat16 FLOP/s of the data sheet: what MFU is a fraction of
    rates: Rates
    fast: float  # bytes/s that a GPU sends, and receives, inside a node
    slow: float  # and between nodes
    per_node: int  # GPUs of a node
    basis: str


_BETWEEN = "one 400 Gb/s adapter a GPU between nodes"
MACHINES = {
    m.name: m
    for m in (
        Machine(
            "h100-80", int(79.1 * GIB), 989e12, Rates(), 360e9, 40e9, 8,
            "H100 SXM: products and copies measured once, attention as published for FlashAttention-3;"
            f" assumed: e4m3 rates, 50 GB/s to the host, 0.8 of 450 GB/s NVLink and of {_BETWEEN}",
        ),
        Machine(
            "h200", int(139.8 * GIB), 989e12, Rates(785e12, 673e12, 561e12, 4.3e12, 50e9), 360e9, 40e9, 8,
            "H200: products and copies measured once, attention forward as published for FlashAttention-3,"
            " backward that of an H100; assumed: e4m3 rates, 50 GB/s to the host, 0.8 of 450 GB/s NVLink"
            f" and of {_BETWEEN}",
        ),
        Machine(
            "a100-80", int(79.1 * GIB), 312e12,
            Rates(260e12, 190e12, 165e12, 1.6e12, 22e9, None, processors=108), 240e9, 20e9, 8,
            "A100 SXM: all rates assumed, 0.8 of the data sheet's or less; FlashAttention-2; no fp8",
        ),
        Machine(
            "b200", int(178.3 * GIB), 2250e12,
            Rates(1600e12, 1300e12, 1000e12, 6.4e12, 50e9, 2800e12, processors=148), 720e9, 40e9, 8,
            "B200: all rates assumed, 0.7 to 0.8 of the data sheet's",
        ),
        Machine(
            "l40s-48", int(44.4 * GIB), 362e12, Rates(270e12, 200e12, 150e12, 0.69e12, 22e9, 540e12, 400e12),
            22e9, 20e9, 8, "L40S: all rates assumed, 0.55 to 0.8 of the data sheet's; GPUs by PCIe",
        ),
        Machine(
            "rtx4090-24", int(23.6 * GIB), 165e12, Rates(130e12, 110e12, 90e12, 0.8e12, 22e9, 250e12, 200e12),
            11e9, 5e9, 8, "RTX 4090: all rates assumed, 0.55 to 0.8 of the data sheet's; GPUs by PCIe",
        ),
    )
}  # fmt: skip


def machine(name: str) -> Machine:
    """The machine of a name; UserError for an unknown one."""
    if name not in MACHINES:
        raise UserError(f"--gpu: got {name!r}, want one of {', '.join(MACHINES)}")
    return MACHINES[name]
