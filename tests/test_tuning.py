"""Tile choices: constants in a fresh process, a GPU's file where there is one, and how it is made."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fused import DEVICE, needs_triton

from prfl_bench import operations, shapes, tune
from prfl_engine.build import pick_device
from prfl_engine.cli import main
from prfl_engine.errors import UserError
from prfl_kernels import tuning
from prfl_kernels.norm import triton_kernels as add_norm

pytestmark = needs_triton
NAME = "Test GPU 80GB"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by name, with a folder of its own for tuned choices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("PRFL_TUNING", str(tmp_path / "tuning"))
    tuning.tuned.cache_clear()
    yield tmp_path / "tuning/test-gpu-80gb.json"
    tuning.tuned.cache_clear()


def test_a_fresh_process_takes_the_constants(gpu, monkeypatch):
    assert tuning.choice("some kernel", (16, "n"), (1, 2)) == (1, 2)
    tuning.write(gpu, {("some kernel", (16, "n")): (3, 4)})
    monkeypatch.setenv("PRFL_TUNING", "")
    tuning.tuned.cache_clear()
    assert tuning.choice("some kernel", (16, "n"), (1, 2)) == (1, 2)


def test_tuned_choices_come_back_and_do_not_change_within_a_process(gpu):
    tuning.write(gpu, {("some kernel", (16, "n")): (3, 4)})
    assert tuning.choice("some kernel", (16, "n"), (1, 2)) == (3, 4)
    assert tuning.choice("some kernel", (16, "m"), (1, 2)) == (1, 2)
    tuning.write(gpu, {("some kernel", (16, "n")): (5, 6)})
    assert tuning.choice("some kernel", (16, "n"), (1, 2)) == (3, 4)
    assert [path.name for path in gpu.parent.iterdir()] == [gpu.name]
    tuning.tuned.cache_clear()
    with pytest.raises(ValueError, match=rf"tuning: {gpu}: got \[5, 6\] for some kernel, want 3 numbers"):
        tuning.choice("some kernel", (16, "n"), (1, 2, 3))


def test_where_gpus_differ_each_has_the_choices_of_its_kind(gpu, monkeypatch):
    names = {None: NAME, 0: NAME, 1: "Other GPU"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: names[index])
    tuning.write(gpu, {("some kernel", ()): (3,)})
    names |= {None: "Other GPU"}
    tuning.write(gpu.with_name("other-gpu.json"), {("some kernel", ()): (5,)})
    names |= {None: NAME}
    devices = [torch.device(name) for name in ("cuda:0", "cuda:1", "meta")]
    assert [tuning.choice("some kernel", (), (1,), device)[0] for device in devices] == [3, 5, 3]
    assert tuning.tuned() is tuning.tuned(0)  # read once


def test_launchers_ask_for_the_device_of_their_tensors(monkeypatch):
    asked = set()

    def choice(kernel, key, default, device):
        asked.add((kernel, device))
        return default

    monkeypatch.setattr(tuning, "choice", choice)
    launcher = type(add_norm._forward)
    monkeypatch.setattr(launcher, "run", lambda *arguments, **options: None)
    for _, bind in tune.launches(["1.3B"], [32760], 1):
        bind("meta")()
    assert {kernel for kernel, _ in asked} == set(tune.CANDIDATES)
    assert {device for _, device in asked} == {torch.device("meta")}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gpu": "Test GPU 80GB"}', b"\xff"])
def test_a_file_that_is_not_one_of_ours_is_named(gpu, text):
    gpu.parent.mkdir()
    gpu.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"tuning: {gpu}: got no file of tuned choices") as found:
        tuning.choice("some kernel", (), (1,))
    assert "\n" not in str(found.value)
    run = SimpleNamespace(train=SimpleNamespace(device="cpu"), model=SimpleNamespace(kernels=None))
    with pytest.raises(UserError, match=f"tuning: {gpu}"):
        pick_device(run)


@pytest.mark.parametrize("field", ["gpu", "torch", "triton"])
def test_a_file_made_for_something_else_is_named(gpu, field):
    tuning.write(gpu, {})
    gpu.write_text(json.dumps(json.loads(gpu.read_text()) | {field: "other"}))
    with pytest.raises(ValueError, match=f"tuning: {gpu}: got {field} 'other', want '"):
        tuning.choice("some kernel", (), (1,))


def test_a_candidate_with_another_result_is_refused(monkeypatch):
    """(1,) is the default, (2,) rounds in another place, (3,) is wrong, (4,) gives NaN."""
    monkeypatch.setitem(tune.CANDIDATES, "some kernel", {(16,): ((2,), (3,), (4,))})
    factors = {1: 1.0, 2: 1.0001, 3: 1.01, 4: float("nan")}
    made = []

    def run(s, x):
        made.append((tuning.choice("some kernel", (16, 5), (1,))[0], x))
        return None, x * factors[made[-1][0]]

    launch = operations.Launch("some", "memory", (torch.float32,), lambda s: [s.statistics(8, 4)], run)
    one = tune.Asked("some kernel", (16, 5), (1,))
    call = launch.bind(shapes.wan("1.3B", 40)._replace(device=DEVICE))
    times = tune.measure(call, one, lambda run: run() and float(made[-1][0]))
    assert times == {(1,): 1.0, (2,): 2.0, (3,): None, (4,): None}
    assert all(x is made[0][1] for _, x in made) and made[0][1].min() > 0.4


def launches(call, answers):
    """What call() launches on meta tensors: grids, numbers and options of every launch."""
    found = []
    launcher = type(add_norm._forward)

    def run(self, *arguments, grid, warmup, **options):
        held = [a.block_shape if hasattr(a, "block_shape") else a for a in arguments]
        found.append((grid, [a for a in held if isinstance(a, (int, list))], options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "run", run)
        with tuning.hooked(lambda kernel, key, default: answers.get((kernel, key), default)):
            call()
    return found


def test_every_candidate_reaches_its_launcher():
    kernels = set()
    for _, bind, one in tune.choices(list(shapes.MODELS), [32760], 1):
        kernels.add(one.kernel)
        variants = [launches(bind("meta"), {one[:2]: candidate}) for candidate in one.candidates]
        assert all(a != b for i, a in enumerate(variants) for b in variants[:i]), one
    assert kernels == set(tune.CANDIDATES)


def test_tune_measures_stores_and_is_obeyed(gpu, monkeypatch):
    """Whatever computes in the interpreter: modulate at a tiny shape, the later candidate the faster."""
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Model("tiny", 256, 2, 700))
    monkeypatch.setattr(operations, "LAUNCHES", operations.LAUNCHES[:1])
    monkeypatch.setitem(tune.CANDIDATES, "add_norm forward", {(256,): ((1, 9), (1, 3))})
    tuning.write(gpu, {("other kernel", (1,)): (7,)})
    seconds = iter(range(100, 0, -1))

    def timer(run):
        run()
        return next(seconds) / 1e3

    lines = list(tune.tune(["tiny"], [40], 2, timer, DEVICE))
    assert len(lines) == 2 and "(1, 3) of (1, 528) 100.000 ms, (1, 9) 99.000 ms" in lines[0]
    tuning.tuned.cache_clear()
    assert tuning.tuned() == {
        ("other kernel", (1,)): (7,),
        ("add_norm forward", (256, 32, "n", 5)): (1, 3),
        ("add_norm forward", (256, 16, "n", 5)): (1, 3),
    }
    x = torch.zeros(1, 20, 256, device=DEVICE)
    grid, rows, options = add_norm._plan("forward", (32, "n"), x, 0)
    assert (grid, rows, options["num_warps"]) == ((3, 1), (20, 7, 0, 0), 1)
    assert all(f"from {gpu}" in line for line in tune.listing(["tiny"], [40], 2))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("prfl: tune: got no CUDA GPU")
    assert main(["tune", "--list", "--model", "14B", "--tokens", "32760", "--sp", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("attention forward (16, 128, 15, 15)") for line in lines)
    assert all(", the default; of [" in line for line in lines)
    assert main(["tune", "--list", "--model", "2B"]) == 2
    assert main(["tune", "--list", "--sp", "11"]) == 2


def test_no_candidate_spills():
    """At the width where registers are fewest; for sm_90a, in a process that compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    script = Path(__file__).with_name("spills.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilling, *rest = done.stdout.splitlines()
    assert spilling.startswith("_spilling ") and rest == ["done"]
