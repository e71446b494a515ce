"""metrics.jsonl stays valid JSON, survives a killed run, and is cut back on resume."""

import json
import math
import subprocess
import sys

import pytest

from prfl_engine.errors import UserError
from prfl_engine.metrics import MetricsWriter, progress, read_metrics


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def reject(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_round_trip(tmp_path):
    with MetricsWriter(tmp_path / "new/run", tensorboard=False) as writer:
        writer.log(0, {"loss": 0.1 + 0.2, "reward": -1}, prefix="train")
        writer.log(1, {"gpu": 3})
        assert steps(tmp_path / "new/run") == [0, 1]  # flushed, not only on close
    first, second = read_metrics(tmp_path / "new/run/metrics.jsonl")
    assert first["values"] == {"train/loss": 0.1 + 0.2, "train/reward": -1.0}
    assert second["values"] == {"gpu": 3.0}
    assert first["time"] <= second["time"]


def test_tensors_are_numbers(tmp_path):
    import torch

    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(torch.tensor(4).item(), {"loss": torch.tensor(0.5)})
    assert read_metrics(tmp_path)[0]["values"] == {"loss": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path, value):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(0, {"loss": value, "good": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=reject)["values"] == {"loss": None, "good": 1.0}
    assert math.isnan(read_metrics(tmp_path)[0]["values"]["loss"])


def test_resume_drops_the_steps_that_come_again(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(6):
            writer.log(step, {"run": 1})
        writer.log(3, {"fid": 1}, prefix="val")  # out of order, as validation may write it
    with MetricsWriter(tmp_path, tensorboard=False, start=3) as writer:
        assert steps(tmp_path) == [0, 1, 2]
        writer.log(3, {"run": 2})
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert read_metrics(tmp_path)[3]["values"] == {"run": 2.0}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_torn_last_line_is_ignored_and_then_overwritten(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(0, {"loss": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "time": 17')
    assert steps(tmp_path) == [0]
    with MetricsWriter(tmp_path, tensorboard=False, start=1) as writer:
        writer.log(1, {"loss": 2})
    assert steps(tmp_path) == [0, 1]
    with MetricsWriter(tmp_path, tensorboard=False):
        assert steps(tmp_path) == []  # a run from the start


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"step": 1}', '{"values": {}}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0, "time": 0, "values": {{}}}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a metrics record"):
        read_metrics(path)


def test_tensorboard_holds_the_values_and_forgets_the_dropped_steps(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path) as writer:
        for step in range(4):
            writer.log(step, {"loss": step}, prefix="train")
    with MetricsWriter(tmp_path, start=2) as writer:
        writer.log(2, {"loss": 20.0}, prefix="train")
    board = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(0, 0), (1, 1), (2, 20)]


def test_tensorboard_is_quiet_and_not_imported_before_it_is_needed(tmp_path):
    code = (
        "import sys; from prfl_engine.metrics import MetricsWriter\n"
        f"with MetricsWriter({str(tmp_path)!r}) as writer:\n"
        "    assert 'tensorboard' not in sys.modules and 'tqdm' not in sys.modules\n"
        "    writer.log(0, {'loss': 1.0})\n"
        "assert 'tensorboard' in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_missing_wandb_is_one_line_that_names_the_field(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.wandb: got 'mine'.*pip install wandb") as caught:
        MetricsWriter(tmp_path, wandb_project="mine")
    assert "\n" not in str(caught.value)


def test_wandb_gets_every_value(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    class Wandb:
        @staticmethod
        def init(project, name, dir):
            calls.append((project, name))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with MetricsWriter(tmp_path / "night", tensorboard=False, wandb_project="mine") as writer:
        writer.log(7, {"loss": 1}, prefix="train")
    assert calls == [("mine", "night"), (7, {"train/loss": 1.0}), "finish"]


def test_progress_leaves_stdout_alone_and_is_sparse_without_a_terminal(capsys):
    assert list(progress(range(1000), "steps", total=1000)) == list(range(1000))
    out, err = capsys.readouterr()
    assert out == ""
    assert "steps: 100%" in err and err.count("\r") == 2  # the first and the last state only
