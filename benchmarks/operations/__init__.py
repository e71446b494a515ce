"""The one list of operations: the benchmark, the kernel ledger, `prfl tune` and the self-test read it.

A record in its family's file is all that a new operation needs. It makes inputs for a shape, calls the
operation through its public function, and gives a plain torch formula of the same: the peer in eager and
under torch.compile, and in float64 the truth. Where Triton has kernels for it, `launch` and `backward` call
their launchers, which the ledger and `prfl tune` do on meta tensors too.
"""

from collections.abc import Sequence

from prfl_bench import shapes
from prfl_bench.operations import attention, ffn, norm, qk_norm_rope, reward_pool, sublayers
from prfl_bench.operations.record import Launch, Operation
from prfl_bench.shapes import Shape

__all__ = ["LAUNCHES", "OPERATIONS", "Launch", "Operation", "cases"]

OPERATIONS: tuple[Operation, ...] = (
    *norm.OPERATIONS, *qk_norm_rope.OPERATIONS, *attention.OPERATIONS, *reward_pool.OPERATIONS,
    *ffn.OPERATIONS, *sublayers.OPERATIONS,
    # On e4m3 values, gated by what they stand for.
    *norm.FP8, *ffn.FP8, *qk_norm_rope.FP8, *attention.FP8,
)  # fmt: skip
LAUNCHES = tuple(launch for operation in OPERATIONS for launch in operation.launches())


def cases(quick: bool, launches: Sequence[Launch] = LAUNCHES) -> list[tuple[Launch, Shape]]:
    """Every launch at every shape of the models, on meta tensors; quick: at 32,760 tokens alone."""
    return [
        (launch, shapes.wan(model, tokens, stream))
        for tokens in shapes.DEFAULT[: 1 if quick else None]
        for model in shapes.MODELS
        for launch in launches
        for stream in launch.streams
    ]
