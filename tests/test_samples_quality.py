"""What benchmarks/samples_quality.py compares, for how many steps, and that a killed call goes on."""

import json

import pytest

from prfl_bench import samples_quality
from prfl_bench.samples_quality import PILOT, Mode, Record, config_of, step_seconds


def test_the_modes():
    assert Mode.of("fresh") == Mode("fresh")
    assert Mode.of("samples:4")[1:] == (4, 0, 1, 1)
    assert Mode.of("persistent:16")[1:] == (1, 16, 1, 1)
    assert Mode.of("persistent:1:4")[1:] == (1, 1, 4, 1)
    assert Mode.of("persistent:1:4:3")[1:] == (1, 1, 4, 3)


BAD = ["old", "fresh:1", "samples", "samples:0", "samples:x", "persistent", "persistent:1:2:3:4"]


@pytest.mark.parametrize("text", BAD)
def test_another_mode_is_refused(text):
    with pytest.raises(SystemExit, match="--modes: got .*want fresh, samples:K, persistent:N"):
        Mode.of(text)


def test_steps_at_equal_seconds():
    """The first round of a pool is fresh rollouts; the rest of the seconds goes to steps of the mode."""
    assert Mode.of("fresh").steps(120, 1.0) == 120
    assert Mode.of("samples:4").steps(120, 2.0) == 60
    assert Mode.of("persistent:16").steps(120, 0.5) == 16 + 208


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of a PRFL stage, as far as reading it goes."""
    (tmp_path / "prfl").mkdir()
    lines = "model: {path: generator}\ndata: {batch_size: 8, train: train.list}\nreward: {path: reward}\n"
    lines += "rollout: {mode: persistent, pool: 8}\nloss: {sft_every: 4}\n"
    (tmp_path / "prfl/config.yaml").write_text(lines)
    return tmp_path


def test_a_mode_is_a_configuration(folder):
    c = config_of(folder, "out", Mode.of("persistent:4:2:3"), 7, "optim.lr=1e-3")
    r = c.rollout
    assert (r.mode, r.pool, r.stride, c.loss.sft_every, c.optim.lr) == ("persistent", 32, 3, 2, 1e-3)
    assert (c.train.steps, c.train.save_every, c.train.keep, c.eval.every) == (7, 4, 2, 0)  # 4 and 7
    c = config_of(folder, "out", Mode.of("samples:4"), 8)
    assert (c.rollout.mode, c.rollout.samples, c.loss.sft_every, c.train.save_every) == ("fresh", 4, 1, 4)


def test_a_pilot_times_whole_steps_after_the_first_round(folder, monkeypatch):
    """A clock that counts steps: flow matching ticks once, the rest of a step twice."""
    now = [0]

    def train(config):
        assert config.train.steps == 3 + PILOT + 2
        writer = samples_quality.MetricsWriter(folder / "out", tensorboard=False)
        for step in range(config.train.steps):
            now[0] += 1 if step >= 3 else 10
            if step:
                writer.log(step, {})
            now[0] += 2
        writer.log(config.train.steps, {})
        writer.close()

    monkeypatch.setattr(samples_quality, "train", train)
    assert step_seconds(folder, Mode.of("persistent:3"), lambda: now[0]) == 3


@pytest.fixture
def made(folder, monkeypatch):
    """The folder, and what was run in it: pilots and runs, which cost nothing."""
    calls = []

    def pilot(_, modes, clock):
        calls.append([mode.name for mode in modes])
        return dict.fromkeys(calls[-1], [0.5, 1.5, 9.0]) | {"fresh": [1.0, 3.0, 5.0]}

    def trained(_, mode, steps, count, clock, *more):
        calls.append((mode.name, steps, *more[:2]))
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        at = {"reward": 0.5 + 0.1 * mode.pool, "distance": 0.2}
        drift, age = (0.1, 6) if mode.pool else (None, None)
        return {"steps": steps, "seconds": 9.0, "half": at, "end": at, "drift": drift, "age": age}

    stop = [0]
    monkeypatch.setattr(samples_quality, "gate", lambda _: None)
    monkeypatch.setattr(samples_quality, "pilot", pilot)
    monkeypatch.setattr(samples_quality, "trained", trained)
    monkeypatch.setattr(samples_quality.torch, "set_num_threads", lambda _: None)
    return folder, calls, stop


def call(folder, *more):
    samples_quality.main([str(folder), "--lr", "1e-4", "2e-4", "--seeds", "0", "1", *more])


def test_a_killed_call_goes_on_where_it_stopped(made, capsys):
    folder, calls, stop = made
    modes = "--modes", "fresh", "persistent:1"
    stop[0] = 4
    with pytest.raises(KeyboardInterrupt):
        call(folder, *modes)
    path = folder / "samples_quality.jsonl"
    with open(path, "a") as file:
        file.write('{"run": {"mode')  # torn
    first = calls.copy()
    calls.clear()
    stop[0] = 0
    call(folder, *modes)
    assert first[0] == ["fresh", "persistent:1"] and calls[0] == first[-1]  # one pilot, nothing twice
    runs = first[1:-1] + calls
    lrs, seeds = ("optim.lr=0.0001", "optim.lr=0.0002"), ("train.seed=0", "train.seed=1")
    steps = {"fresh": 120, "persistent:1": 1 + 238}  # the median of the ratios is 0.5
    assert runs == [(m, steps[m], s, lr) for s in seeds for lr in lrs for m in steps]
    assert all(line.endswith("}") and json.loads(line) for line in path.read_text().splitlines())
    shown = capsys.readouterr().out
    assert "0.600, 0.600 (0.600, 0.600); 0.200, 0.200 (0.200, 0.200); 0.100; 6" in shown
    calls.clear()
    call(folder, "--modes", "persistent:4")  # has a pilot of its own
    assert calls[0] == ["persistent:4"] and len(calls) == 5


def test_a_file_of_other_settings_is_refused(made):
    folder, _, _ = made
    call(folder, "--modes", "fresh")
    with pytest.raises(SystemExit, match=r"samples_quality.jsonl: got .*'steps': 120.*, want .*'steps': 60"):
        call(folder, "--modes", "fresh", "--steps", "60")


def test_a_first_round_has_to_fit(made):
    folder, calls, _ = made
    with pytest.raises(SystemExit, match="--steps: got 17, want more than 17 with persistent:16"):
        call(folder, "--modes", "persistent:16", "--steps", "17")
    assert not calls


def test_the_ratio_is_the_median_over_rounds(tmp_path):
    record = Record(tmp_path / "file", {})
    record.add({"pilot": {"fresh": [1.0, 2.0, 4.0], "samples:4": [3.0, 4.0, 8.0]}})
    assert record.seconds["samples:4"] == (4.0, 2.0)
    assert Record(tmp_path / "file", {}).seconds == record.seconds
