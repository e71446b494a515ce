"""The C++ kernels for the CPU, each with the signature and results of the Triton launcher it stands
beside; formulas and shapes are documented there. float32 and bfloat16 in and out, float32 inside.

Sums over tokens are made over a number of runs that depends on the shapes alone and then added in
order, so results are the same bits for any number of threads.
"""

import torch
from torch import Tensor

from prfl_kernels.add_norm import unit_last
from prfl_kernels.compiled import extension, supported, view

# Runs of tokens of a sample: enough for the threads of a large machine, few enough that their
# partial sums stay small beside the tokens.
RUNS, TOKENS_OF_A_RUN = 64, 16


def _runs(length: int) -> int:
    return max(1, min(RUNS, length // TOKENS_OF_A_RUN))


def bias_gelu_forward(h: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(h + bias) in its tanh form, in h.dtype. h [..., F], bias [F] or None."""
    supported(h, bias)
    rows, bias = unit_last(h.flatten(0, -2)), unit_last(bias)
    g = torch.empty(h.shape, dtype=h.dtype)
    if h.numel():
        out = g.view(rows.shape)
        extension().bias_gelu_forward(
            view(rows), view(bias), view(out), *rows.shape, torch.get_num_threads()
        )
    return g


def bias_gelu_backward(
    dg: Tensor, h: Tensor, bias: Tensor | None, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dh, g, d bias) of `bias_gelu_forward`, g made again; d bias [F] float32, None if not wanted."""
    supported(dg, h, bias)
    dg, rows = unit_last(dg.to(h.dtype).flatten(0, -2)), unit_last(h.flatten(0, -2))
    dh, g = (torch.empty(h.shape, dtype=h.dtype) for _ in range(2))
    dbias = torch.zeros(h.shape[-1], dtype=torch.float32) if wants_bias else None
    if h.numel():
        runs = _runs(len(rows))
        part = torch.empty(runs, h.shape[-1], dtype=torch.float32) if wants_bias else None
        extension().bias_gelu_backward(
            view(dg), view(rows), view(unit_last(bias)), view(dh.view(rows.shape)),
            view(g.view(rows.shape)), view(part), view(dbias), *rows.shape, runs,
            torch.get_num_threads(),
        )  # fmt: skip
    return dh, g, dbias
