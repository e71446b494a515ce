"""The device of a run."""

import pytest
import torch

from prfl_engine.build import pick_device
from prfl_engine.config import Config, TrainConfig, UserError


def test_a_gpu_by_its_number_is_the_current_one(monkeypatch):
    """Where tensors are is not enough: Triton launches and graphs are recorded on the current device."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("prfl_kernels.tuning.tuned", lambda index=None: {})
    for name in ("cuda", "cuda:1"):
        assert pick_device(Config(train=TrainConfig(device=name))) == torch.device(name)
    assert current == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="train.device: got 'cuda:2', want one of the 2 GPUs"):
        pick_device(Config(train=TrainConfig(device="cuda:2")))
