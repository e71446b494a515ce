"""The tensors of some samples, and how samples become a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Batch(NamedTuple):
    """Samples of one shape. Tensors on one device."""

    latent: Tensor  # [B, 16, T, H, W], 48 channels in TI2V-5B
    text: Tensor  # [B, n, text_dim]
    clip: Tensor | None = None  # [B, 257, 1280], I2V
    # I2V: [B, 20, T, H, W], mask 4 and first frame 16; ti2v: the first frame of the latent [B, C, 1, H, W]
    condition: Tensor | None = None
    label: Tensor | None = None  # [B], 0 or 1


def collate(samples: list[Batch]) -> Batch:
    """Stack samples of one shape; shorter texts are zero-padded to the longest."""

    def joined(name: str, values: Sequence[Tensor | None]) -> Tensor | None:
        if values[0] is None:
            return None
        return pad_sequence(list(values), batch_first=True) if name == "text" else torch.stack(values)

    return Batch(*map(joined, Batch._fields, zip(*samples, strict=True)))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on device; a copy from pinned memory does not block the host."""
    return Batch(*(None if a is None else a.to(device, non_blocking=True) for a in batch))
