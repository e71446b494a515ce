"""accelerate where every token has a modulation of its own: which ones are two vectors, in Wan2.2's TI2V."""

import pytest
import torch
from helpers import relative
from test_patch_official import GRID, TOKENS, assert_close, exact_attention, inputs_of, model_of, outcome

from prfl_engine.patch import accelerate, fp8, memo, step_cache
from prfl_engine.patch.memo import Memo

__all__ = ["exact_attention"]


def at_two_times(arguments, frame=12):
    """As Wan2.2 runs TI2V in image mode: tokens of the first frame at 0, the others at their sample's t."""
    t = arguments["t"][:, None].repeat(1, TOKENS)
    t[:, :frame] = 0
    return arguments | {"t": t}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_first_frame_at_another_timestep_is_two_vectors(recompute):
    model, arguments = model_of("wan22").double(), at_two_times(inputs_of("wan22"))
    arguments |= {name: [a.double() for a in arguments[name]] for name in ("x", "context")}
    want = outcome(model, arguments)
    report = accelerate(model, recompute)
    assert_close(outcome(model, arguments), want, 1e-11)
    assert report.calls == 2 and not report.fallbacks


def test_two_vectors_run_in_fp8_and_from_a_cache():
    model = model_of("wan22", dim=128, heads=2, ffn_dim=128)
    arguments = at_two_times(inputs_of("wan22"))
    report = accelerate(model)

    def result():
        return torch.cat([a.flatten() for a in model(**arguments)])

    with torch.no_grad():
        plain = result()
        with fp8(model):
            assert 1e-3 < relative(result(), plain) < 0.1
        with step_cache(model, 10.0, 3) as cache:
            assert all(relative(result(), plain) < 1e-6 for _ in range(3))
    assert (cache.computed, cache.reused) == (2, 1) and not report.fallbacks


def test_modulation_is_compared_exactly_and_once(monkeypatch):
    """Another boundary than the first frame's, and one value that differs anywhere; pieces of 5 tokens."""
    monkeypatch.setattr(memo, "PIECE", 5)
    e = torch.randn(2, 2, 6, 4).repeat_interleave(12, 1)
    held = Memo()
    found = memo.few_vectors(e, GRID, held)
    assert torch.equal(found, e[:, ::12])
    monkeypatch.setattr(memo, "runs", None)  # would be called for another tensor
    assert torch.equal(memo.few_vectors(e, GRID, held), found)
    monkeypatch.undo()
    assert torch.equal(memo.few_vectors(e[:, :12], (1, 3, 4), Memo()), e[:, 0])
    assert torch.equal(memo.few_vectors(e[:, :12], GRID, Memo()), e[:, 0])
    assert memo.few_vectors(e, (2, 4, 4), Memo()) is None
    for token in (0, 1, 11, 12, 13, 23):
        other = e.clone()
        other[1, token, 3, 2] += 1e-6
        assert memo.few_vectors(other, GRID, Memo()) is None, token
