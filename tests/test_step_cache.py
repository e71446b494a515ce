"""Step caching: when a step is computed, what it gets otherwise, and that samples do not meet."""

import pytest
import torch

from prfl_engine.rollout.step_cache import StepCache

LAST = 10.0


class Blocks:
    """What the blocks of a step add: `step` everywhere, so that a result names the step it came from."""

    def __init__(self):
        self.step, self.calls = 0, []

    def __call__(self, tokens, rows):
        self.calls.append((self.step, list(rows)))
        assert len(tokens) == len(rows)
        return tokens + self.step


def drive(cache, inputs, samples=((0,),) * 99, times=None):
    """Steps with modulated inputs inputs[step][row] (numbers): the step that each row's residual is from."""
    blocks, found = Blocks(), []
    for step, (values, at) in enumerate(zip(inputs, samples, strict=False), 1):
        blocks.step = step
        tokens = torch.randn(len(at), 3, 4)
        modulated = torch.tensor(values).view(-1, 1, 1).expand(len(at), 3, 4)
        t = torch.full((len(at),), 100.0 if times is None else times[step - 1])
        out = cache(blocks, tokens, modulated, t, torch.tensor(at))
        added = out - tokens
        torch.testing.assert_close(added, added[:, :1, :1].expand_as(added), rtol=0, atol=1e-5)
        found.append([round(a) for a in added[:, 0, 0].tolist()])
    return found, blocks.calls


def test_changes_add_up_until_the_threshold():
    """1.0, then 5 % more every step: the changes add up to 0.05, 0.10, ... since the last computed step."""
    inputs = [[1.05**i] for i in range(9)]
    cache = StepCache(0.14, LAST)
    found, calls = drive(cache, inputs)
    assert found == [[1], [1], [1], [4], [4], [4], [7], [7], [7]]
    assert calls == [(1, [0]), (4, [0]), (7, [0])]
    assert (cache.computed, cache.reused) == (3, 6)


def test_the_change_is_relative_and_to_the_step_before():
    """Away and back adds up, though the input is at last what it was; larger inputs change as much."""
    for scale in (1.0, 1e3):
        cache = StepCache(0.25, LAST)
        found, _ = drive(cache, [[scale * a] for a in (1.0, 1.1, 1.0, 1.1, 1.0)])
        assert found == [[1], [1], [1], [4], [4]]


def test_a_threshold_below_every_change_computes_every_step():
    found, _ = drive(StepCache(1e-6, LAST), [[1.0], [1.1], [1.2], [1.3]])
    assert found == [[1], [2], [3], [4]]


def test_first_and_last_steps_are_computed():
    found, _ = drive(StepCache(100.0, LAST), [[1.0]] * 5, times=[999.0, 500.0, 100.0, 10.1, LAST])
    assert found == [[1], [1], [1], [1], [5]]


def test_what_is_not_a_number_is_computed():
    found, _ = drive(StepCache(0.5, LAST), [[1.0], [float("nan")], [1.0]])
    assert found == [[1], [2], [3]]


def test_samples_have_their_own_sums_and_residuals():
    """Sample 0 stands still, 1 moves every step, 2 joins later; those to be computed go together."""
    samples = [(0, 1), (0, 1), (0, 1, 2), (2, 0), (1, 2)]
    inputs = [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0, 5.0], [6.0, 1.0], [3.1, 6.0]]
    cache = StepCache(0.15, LAST)
    found, calls = drive(cache, inputs, samples)
    assert found == [[1, 1], [1, 2], [1, 3, 3], [4, 1], [3, 4]]
    assert calls == [(1, [0, 1]), (2, [1]), (3, [1, 2]), (4, [0])]


def test_no_flag_is_read_where_nothing_is_to_be_decided(monkeypatch):
    """A host read waits for the device: one a step, none for samples without a residual."""
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda a: (reads.append(a.dtype), plain(a))[1]
    )
    cache, blocks = StepCache(0.5, LAST), Blocks()
    for step in range(3):
        modulated = torch.ones(2, 3, 4)
        cache(blocks, torch.zeros(2, 3, 4), modulated, torch.full((2,), 99.0), torch.tensor([0, 1]))
        assert reads.count(torch.bool) == step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_keep_their_dtype(dtype):
    cache, x = StepCache(0.5, LAST), torch.randn(1, 3, 4).to(dtype)
    for _ in range(2):
        out = cache(lambda a, rows: a + 1, x, x, torch.tensor([99.0]), torch.tensor([0]))
        assert out.dtype == dtype
        torch.testing.assert_close(out, x + 1)
    assert cache.reused == 1
