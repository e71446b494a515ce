"""The reward model's pooling, alone and as the module around it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch.func import functional_call

from prfl_bench import formulas
from prfl_bench.operations.record import Operation
from prfl_engine.model.reward import QueryPool
from prfl_kernels.reward_pool import op as reward_pool
from prfl_kernels.reward_pool import triton_kernels

HEADS = 8  # of the official reward model, with one learned query


def _reward_pool() -> Operation:
    def flops(s):
        product = 2 * s.batch * s.length * s.model.width * HEADS
        return 2 * product, 4 * product

    def inputs(s):
        return [s.residual_rows(), s.normal(HEADS, s.model.width) * s.model.width**-0.5]

    def backward_inputs(s):
        sums = [s.statistics(s.batch, HEADS) for _ in range(2)]
        scores = s.normal(s.batch, s.length, HEADS)
        return [s.normal(s.batch, HEADS, s.model.width), sums[0], *inputs(s), scores, sums[1]]

    return Operation(
        "reward_pool", "reward_pool", inputs,
        lambda s, *inputs: reward_pool.reward_pool(*inputs),
        lambda s, *inputs: formulas.reward_pool(*inputs),
        wanted=(0, 1),
        flops=flops,
        launch=lambda s, *inputs: reward_pool.forward(triton_kernels.forward, *inputs),
        backward=(
            backward_inputs,
            lambda s, *inputs: reward_pool.backward(triton_kernels.backward, *inputs, True, True),
        ),
    )  # fmt: skip


@cache
def _pool(width: int) -> QueryPool:
    with torch.device("meta"):  # the parameters come as inputs
        return QueryPool(width, 1, HEADS)


def _query_pool() -> Operation:
    """The reward model's pooling as a module, its projections folded, beside what
    torch.nn.MultiheadAttention calls; weights frozen as in a PRFL step."""

    def inputs(s):
        sizes = [p.shape for p in _pool(s.model.width).parameters()]
        weights = [s.normal(*size, dtype=s.dtype) * s.model.width**-0.5 for size in sizes]
        return [s.residual_rows(), *weights]

    def call(s, x, *weights):
        pool = _pool(s.model.width)
        names = [name for name, _ in pool.named_parameters()]
        return functional_call(pool, dict(zip(names, weights, strict=True)), (x,))

    def plain(s, x, queries, w_in, b_in, w_out, b_out):
        x = x.to(s.dtype).transpose(0, 1)  # [L, B, C]
        asked = queries[:, None].expand(-1, x.shape[1], -1)
        pooled, _ = F.multi_head_attention_forward(
            asked, x, x, s.model.width, HEADS, w_in, b_in, None, None, False, 0.0, w_out, b_out,
            need_weights=False,
        )  # fmt: skip
        return pooled.mean(0) + queries.mean(0)

    def flops(s):  # of the pooling; the rest does not grow with the tokens
        product = 2 * s.batch * s.length * s.model.width * HEADS
        return 2 * product, 3 * product

    return Operation("query_pool", "reward_pool", inputs, call, plain, wanted=(0,), flops=flops)


OPERATIONS = _reward_pool(), _query_pool()
