"""benchmarks/stored_weights.py on tiny models."""

import pytest
import torch
from helpers import relative, write_run

from prfl_bench import stored_weights
from prfl_engine import chain
from prfl_engine.config import load_config
from prfl_engine.data import Reader, fixed_batches, read_lists
from prfl_engine.memory import frozen
from prfl_engine.objectives import bind, whole_schedule
from prfl_engine.seeds import Purpose, noise_like


@pytest.fixture
def path(tmp_path):
    return write_run(tmp_path, rollout={"steps": 8})


def test_distances_are_those_of_plain_code(path, capsys):
    stored_weights.main([str(path), "--count", "3", "--batch", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("within 0.0e+00") and lines[-1].startswith("gradient, e4m3: 0.0")
    config = load_config(path)
    paths = read_lists(config.data.val, "data.val")
    made = []
    for rounding in (stored_weights.on_paper, None):
        generator, _ = stored_weights.models(config, rounding=rounding)
        (batch,) = fixed_batches(Reader(generator.config), paths, 3, torch.device("cpu"))
        noise = noise_like(batch.latent, Purpose.VALIDATION_SCORE, config.eval.seed, 0)
        with torch.no_grad():
            made.append(chain.sample(bind(generator, batch), whole_schedule(config.rollout), noise))
    far = [relative(*pair) for pair in zip(*made, strict=True)]
    (line,) = (line for line in lines if line.startswith("rollout, end"))
    *_, mean, largest = map(float, line.split()[2:])
    assert mean == pytest.approx(sum(far) / 3, abs=2e-5) and largest == pytest.approx(max(far), abs=2e-5)
    assert 1e-3 < mean < 0.1


def test_other_values_than_those_on_paper_fail_the_gate(path, monkeypatch):
    def wrong(values, scales, out):
        out.copy_(values).mul_(scales[:, None] * 1.01)

    monkeypatch.setattr(frozen, "dequantize_rows", wrong)
    with pytest.raises(SystemExit, match="gate failed, want"):
        stored_weights.main([str(path), "--count", "2"])


def test_pairs_that_are_turned():
    assert stored_weights.turned(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 1, 3])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("words, line", [
    ("--count 1", "--count: got 1, want 2 to 3, the number of samples in data.val"),
    ("--count 4", "--count: got 4, want 2 to 3, the number of samples in data.val"),
    ("--count 3 --batch 0", "--batch: got 0, want a whole number from 1 on"),
    ("rollout.guidance=3", "rollout.guidance: got 3.0, want 1 in stored_weights"),
    ("chain.guidance=3", "chain.guidance: got 3.0, want 1 in stored_weights"),
    ("eval.guidance=3", "eval.guidance: got 3.0, want 1 in stored_weights"),
    ("model.boundary=0.9", "model.boundary: got 0.9, want null in stored_weights"),
    ("rollout.lora={}", "rollout.lora: got '{}', want null in stored_weights"),
    ("rollout.precision=fp8", "rollout.precision: got 'fp8', want same in stored_weights"),
    ("rollout.cache=0.1", "rollout.cache: got 0.1, want 0 in stored_weights"),
    ("reward.draws=2", "reward.draws: got 2, want 1 in stored_weights"),
    ("model.shape=1", "model.shape: unknown"),
])  # fmt: skip
def test_mistakes_are_found_before_a_model_is_read(words, line, tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path)
    monkeypatch.setattr(stored_weights, "models", None)
    with pytest.raises(SystemExit) as stopped:
        stored_weights.main([str(path), *words.format(tmp_path).split()])
    assert stopped.value.code == 2
    assert f"error: {line.format(tmp_path)}" in capsys.readouterr().err
