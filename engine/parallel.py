"""Several processes at work on one model: sharded weights (FSDP2), and a sequence cut over ranks.

Every rank computes the whole loss of its samples, every collective has its true adjoint, and FSDP averages
gradients over all ranks. So nothing is divided by the size of a group anywhere.
"""

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from prfl_engine.errors import UserError
from prfl_engine.model.layers import Block
from prfl_engine.model.reward import QueryPool, RewardModel
from prfl_engine.model.wan import WanTransformer
from prfl_kernels.exchange import SequenceGroup


def shard(model: WanTransformer | RewardModel, mesh: DeviceMesh, reshard: bool = True) -> nn.Module:
    """Shard the parameters of a generator or reward model over a mesh [shard], or [replicate, shard] (HSDP).

    A block is a unit, the rest of the transformer another, pooling and head of a reward model too. reshard:
    drop the gathered weights of a block after its forward. Dtypes stay as they are: FSDP.s mixed precision
    would cast norms and modulation, which compute in float32. Of a reward model whose transformer was sharded
    as it was loaded, pooling and head are left to shard. Returns the model.
    """
    transformer = model.transformer if isinstance(model, RewardModel) else model
    if not isinstance(transformer, FSDPModule):
        for block in transformer.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(transformer, mesh=mesh, reshard_after_forward=reshard)
        # Called in addition to forward. None calls another: FSDP would end the outer with the inner one.
        for name in ("embed_context", "features"):
            register_fsdp_forward_method(transformer, name)
    if isinstance(model, RewardModel):
        for part in (model.pool, model.mlp):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    return model


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
