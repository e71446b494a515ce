"""Several processes at work on one model."""

import torch.distributed as dist
from torch import nn

from prfl_engine.errors import UserError
from prfl_engine.model.layers import Block
from prfl_engine.model.reward import QueryPool
from prfl_engine.model.wan import WanTransformer
from prfl_kernels.exchange import SequenceGroup


def cut_sequence(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Let a transformer or a reward model hold the tokens of this rank alone; all ranks of the group must get
    the same latents, and call it together. Returns the model. UserError for heads that the ranks do not
    divide, and for dropout in the pooling, whose random numbers would differ."""
    sequence = SequenceGroup(group)
    for module in model.modules():
        if isinstance(module, Block) and module.self_attn.num_heads % sequence.size:
            heads = module.self_attn.num_heads
            raise UserError(f"parallel.sequence: got {sequence.size}, want a divisor of the {heads} heads")
        if isinstance(module, QueryPool) and module.training and module.multihead_attn.dropout > 0:
            dropout = module.multihead_attn.dropout
            raise UserError(f"reward.dropout: got {dropout:g} with parallel.sequence > 1, want 0")
        if isinstance(module, (Block, QueryPool, WanTransformer)):
            module.sequence = sequence
    return model
