"""Bytes and seconds of frozen matrices that are stored apart from where they are used (memory.frozen)."""

from functools import cache

import torch

from prfl_engine.config_models import Storage
from prfl_engine.memory.frozen import layout
from prfl_engine.memory.host import power_of_two_sizes
from prfl_engine.model.layers import Block, Linear
from prfl_engine.model.wan import WanConfig

Part = tuple[int, torch.dtype]  # values of a tensor, and their dtype


@cache
def _block(config: WanConfig) -> tuple[int, int]:
    """(values of the matrices of a block, as they lie in memory, and their rows)."""
    with torch.device("meta"):
        block = Block(config.dim, config.ffn_dim, config.num_heads, config.eps, config.clip)
    shapes = [m.weight.shape for m in block.modules() if isinstance(m, Linear)]
    return layout(shapes)[1], sum(rows for rows, _ in shapes)


def used(config: WanConfig, dtype: torch.dtype) -> Part:
    """The matrices of a block in use."""
    return _block(config)[0], dtype


def stored(config: WanConfig, dtype: torch.dtype, storage: Storage) -> list[Part]:
    """The matrices of a block as they are stored."""
    values, rows = _block(config)
    return [(values, torch.float8_e4m3fn), (rows, torch.float32)] if storage.e4m3 else [(values, dtype)]


def coming(config: WanConfig, dtype: torch.dtype, storage: Storage) -> int:
    """Bytes that are copied from the host for a forward of a block, and for a backward."""
    if not storage.host:
        return 0
    return sum(values * own.itemsize for values, own in stored(config, dtype, storage))


def pieces(part: Part) -> list[int]:
    """Bytes of the buffers of a tensor on the host."""
    return [n * part[1].itemsize for n in power_of_two_sizes(part[0])]


def unpacked(config: WanConfig, dtype: torch.dtype, storage: Storage) -> int:
    """Bytes that are read and written to make the values of a block of e4m3: converted, then scaled."""
    return _block(config)[0] * (1 + 3 * dtype.itemsize) if storage.e4m3 else 0
