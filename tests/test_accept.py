"""The acceptance run: workers that survive faults, results that are kept, the list of rows, single stages."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import accept_faults
import pytest
import torch
from fused import needs_triton
from helpers import one_line

from prfl_bench import bench_kernels, selftest
from prfl_bench.accept import claims, correct, listing, report, sanitizer, steps, tiles
from prfl_bench.accept.command import accept
from prfl_bench.accept.crew import Worker
from prfl_bench.accept.journal import FILE, Journal
from prfl_bench.accept.results import read
from prfl_bench.accept.row import DIED, FAILED, HUNG, RAN, REFUSED, STAGES, Context, Row, Task
from prfl_bench.accept.run import Run, chosen
from prfl_engine import cli
from prfl_engine.errors import UserError
from prfl_kernels import dispatch, jit

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "accept_faults:rows"
CPU = Context("cpu", {})


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    made = Worker(SOURCE, "cpu", tmp_path / "log")
    yield made
    made.close()


def test_every_fault_costs_its_own_row_alone(worker):
    """In one worker that is replaced: a right result, a wrong one, one that raises, SIGSEGV, a hang."""
    rows = {row.name.split("/")[1]: row for row in accept_faults.rows("cpu")}
    last = accept_faults.rows("cpu")[-1]
    assert worker.run(Task(last), {"a": {}, "b": {}}, 3600)["values"] == {"known": ["a", "b"]}
    got = {}
    for name in ("right", "wrong", "raising", "crash", "absent", "hang"):
        (part,) = worker.parts(rows[name])
        limit = 8 if name == "hang" else 3600
        got[name] = worker.run(Task(rows[name], part), {}, limit)
    states = {name: result["state"] for name, result in got.items()}
    assert states == {
        "right": RAN, "wrong": FAILED, "raising": FAILED, "crash": DIED, "absent": REFUSED, "hang": HUNG,
    }  # fmt: skip
    assert "of the limit" in got["wrong"]["detail"] and got["wrong"]["values"]["error"] > 1
    assert got["raising"]["detail"] == "RuntimeError: no kernel image is available"
    assert got["crash"]["detail"].startswith("SIGSEGV: Fatal Python error")
    assert got["hang"]["detail"] == "no answer within 8 s, killed" and worker.process is None


class Answers(Worker):
    """A worker without a process: what becomes of every row is told beforehand."""

    def __init__(self, states: dict[str, str]):
        super().__init__("", "cpu", Path(os.devnull))
        self.states, self.asked = states, []

    def run(self, task, known, limit):
        self.asked.append(task.name)
        state = self.states.get(task.name, RAN)
        return {
            "name": task.name,
            "stage": task.row.stage,
            "state": state,
            "detail": "",
            "values": {},
            "seconds": 0.1,
        }


def a_run(tmp_path, monkeypatch, rows, minutes=1.0, states=()):
    """The run, and the workers that it asked for."""
    out = tmp_path / "out"
    run = Run(rows, "cpu", out, Journal(out, {"device": "cpu"}), minutes, lambda _: None)
    answers = Answers(dict(states))
    monkeypatch.setattr(run, "_worker", lambda environment: answers)
    run.run()
    return run, answers


def row(name: str, small: float = 1.0, **more) -> Row:
    return Row(name, lambda context: None, 1.0, small, **more)


def test_what_does_not_fit_into_the_minutes_is_listed_and_the_rest_runs(tmp_path, monkeypatch):
    rows = [row("memory/a"), row("memory/long", 3600), row("memory/b")]
    run, answers = a_run(tmp_path, monkeypatch, rows)
    assert answers.asked == ["memory/a", "memory/b"]
    assert list(run.not_run) == ["memory/long"] and "takes about" in run.not_run["memory/long"]


def test_predictions_are_corrected_by_what_the_stage_took(tmp_path, monkeypatch):
    run, _ = a_run(tmp_path, monkeypatch, [row("memory/a", 1.0)])
    assert run.expected(Task(row("memory/b", 10.0))) == pytest.approx(2.0)  # at most five times as fast
    assert run.expected(Task(row("attention/b", 10.0))) == 10.0


def test_rows_that_are_not_timed_run_beside_each_other(tmp_path, monkeypatch):
    """Parts of several rows by three workers, each part once; what is timed comes after all of them."""
    monkeypatch.setattr("prfl_bench.accept.run.workers_for", lambda device: 3)
    monkeypatch.setattr(Answers, "parts", lambda self, row: [f"{i}" for i in range(5)])
    rows = [row(f"correct/{n}", alone=False, parts=lambda device: []) for n in "ab"] + [row("memory/a")]
    _, answers = a_run(tmp_path, monkeypatch, rows)
    assert sorted(answers.asked[:-1]) == [f"correct/{n}/{i}" for n in "ab" for i in range(5)]
    assert answers.asked[-1] == "memory/a"


def test_a_row_that_the_end_of_the_minutes_cuts_off_has_not_run(tmp_path, monkeypatch):
    run, _ = a_run(tmp_path, monkeypatch, [row("memory/a")], minutes=0.2, states={"memory/a": HUNG})
    assert "when the minutes were over" in run.not_run["memory/a"] and not run.journal.results


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    rows = [row("memory/a"), row("memory/b")]
    a_run(tmp_path, monkeypatch, rows[:1])
    _, answers = a_run(tmp_path, monkeypatch, rows)
    assert answers.asked == ["memory/b"]


def test_a_cut_last_line_is_dropped_and_a_broken_one_is_named(tmp_path):
    journal = Journal(tmp_path, {"device": "cpu"})
    for name in ("a/1", "a/2"):
        journal.add({"name": name, "stage": "a", "state": RAN, "values": {}})
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    again = Journal(tmp_path, {"device": "cpu"})
    assert list(again.results) == ["a/1"]
    again.add({"name": "a/3", "stage": "a", "state": RAN, "values": {}})
    assert list(Journal(tmp_path, None).results) == ["a/1", "a/3"]
    path.write_bytes(whole.replace(b'{"name": "a/1"', b'{"name"; "a/1"'))
    with pytest.raises(UserError, match="--out: .*line 2: not JSON"):
        Journal(tmp_path, {"device": "cpu"})


@pytest.mark.parametrize("line", [
    "[1]", "{}", "[" * 100_000, '{"machine": 3, "date": "x"}', '{"machine": {}, "date": "x"}', '{"name": 3}',
    '{"name": "a/1", "state": "ran"}', os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path),
], ids=range(10))  # fmt: skip
def test_what_is_no_journal_is_refused_in_one_line(line, tmp_path, capsys):
    (tmp_path / FILE).write_text(line + "\n") if isinstance(line, str) else line(tmp_path / FILE)
    assert cli.main(["accept", "--minutes", "0", "--out", str(tmp_path)]) == 2
    assert one_line(capsys).startswith(f"prfl: --out: {tmp_path / FILE}")


def test_results_of_another_machine_are_refused(tmp_path):
    Journal(tmp_path, {"device": "cpu", "sources": "1"})
    with pytest.raises(UserError, match="want another folder"):
        Journal(tmp_path, {"device": "cpu", "sources": "2"})


BLOCKED = (
    "av", "torchao", "tensorboard", "flash_attn", "flash_attn_interface", "xformers", "peft", "diffusers",
    "transformers", "wandb", "pynvml", "scipy", "pandas", "kernels", "hypothesis", "pytest",
)  # fmt: skip
SELECTION = (
    "environment/machine", "environment/build", "correct/rms_norm/cpu", "attention/self/14B/32760/cpu",
    "memory/gated_add/14B/32760", "graphs/1.3B/1560", "sanitizer/memcheck",
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the small form")
def test_a_selection_runs_without_optional_packages_and_goes_on_after_kill(tmp_path):
    """By the command, in processes that cannot import what is optional; killed once on the way."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {BLOCKED}:\n    sys.modules[name] = None\n"
    )
    out, file = tmp_path / "out", tmp_path / "out" / FILE
    command = [sys.executable, "-m", "prfl_engine.cli", "accept", "--out", str(out), "--only", *SELECTION]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while first.poll() is None and not (file.exists() and len(file.read_bytes().splitlines()) > 3):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = file.read_bytes().splitlines()
    done = subprocess.run([*command, "--minutes", "600"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert file.read_bytes().splitlines()[: len(before) - 1] == before[:-1]
    results = read(next(out.glob("*-cpu.json")))
    states = {name: result["state"] for name, result in results.rows.items()}
    assert {s for n, s in states.items() if not n.startswith(("sanitizer", "environment"))} == {RAN}, (
        done.stdout
    )
    assert len(states) > len(SELECTION)
    page = (out / report.HTML).read_text()
    assert "<h1>Acceptance run on " in page and "They say nothing of a GPU" in page
    assert {v.verdict for v in claims.verdicts(results)} == {claims.UNKNOWN}


def test_a_name_that_is_none_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--only: got 'nothing'"):
        accept(tmp_path / "out", 1, ["nothing"])
    assert not (tmp_path / "out").exists()


def test_a_report_alone_needs_a_folder_with_results(tmp_path):
    with pytest.raises(UserError, match="holds no results to report"):
        accept(tmp_path, 0, [])


# What is listed.


def test_the_first_minutes_hold_all_correctness_rows_and_attention_at_one_shape(capsys):
    assert cli.main(["accept", "--list"]) == 0
    text = capsys.readouterr().out
    first = text.split("minutes end here")[0]
    rows = listing.rows("cuda")
    assert all(
        r.name in first for r in rows if r.stage == "correct" or r.name.startswith("attention/self/14B/32760")
    )
    assert all(r.name in text and r.seconds > 0 for r in rows)
    assert len({r.name for r in rows}) == len(rows) and {r.stage for r in rows} == set(STAGES)
    assert "Predicted, not measured" in text


def test_names_stages_and_patterns_choose_rows():
    rows = listing.rows("cuda")
    assert [r.name for r in chosen(rows, ["environment"])] == [r.name for r in rows[:3]]
    assert [r.name for r in chosen(rows, ["step/1.3B/none", "graphs/*/1560"])] == [
        "step/1.3B/none",
        "graphs/1.3B/1560",
    ]
    with pytest.raises(UserError, match="--only: got 'nothing'"):
        chosen(rows, ["nothing"])


def test_the_cases_are_those_of_the_self_test():
    parts = {p for r in listing.rows("cpu") if r.stage == "correct" for p in r.parts("cpu")}
    assert parts == {case.name for case in selftest.cases("cpu")}


def test_every_operation_of_the_list_is_timed():
    """Except the sublayers and the linear layer, whose time is that of products."""
    timed = {r.name.split("/")[1] for r in listing.rows("cuda") if r.stage == "memory"}
    left = {"modulated_attention", "modulated_ffn", "fp8_linear"}
    want = {e.name.replace(", ", "-") for e in bench_kernels.ENTRIES if not e.name.startswith("attention")}
    assert timed == want - left


# Single stages.


def test_a_step_takes_the_bytes_that_are_predicted():
    got, want = (made(CPU, "large/14B/full").values["bytes"] for made in (steps.measure, steps.predict))
    assert 0.98 * want < got <= want


def test_a_step_makes_its_tensors_on_the_device_that_it_is_given():
    """On a device that is not the CPU; meta tensors compute nothing, but refuse others beside them."""
    job = steps.jobs(CPU)["large/14B/lora"]
    assert steps.parameter_bytes(job) > 0
    step = steps.Step(job, "meta")
    step.prepare()
    assert [loss.device.type for loss in step.losses(lambda _: None)] == ["meta"] * 5
    assert all(p.grad.device.type == "meta" for p in step.trained)


def test_a_step_of_chains_that_persist_makes_no_forward_without_gradient():
    """From the third on, when both chains have been rolled out."""
    step = steps.Step(steps.jobs(CPU)["step/1.3B/persistent"], "cpu")
    without = []
    step.policy.blocks[0].register_forward_pre_hook(lambda *_: without.append(not torch.is_grad_enabled()))
    made = []
    for _ in range(5):
        without.clear()
        step.prepare()
        assert all(loss.isfinite() for loss in step.losses(lambda _: None))
        made.append((len(without), sum(without)))
    assert all(forwards >= 2 for forwards, _ in made)
    assert sum(n for _, n in made[:2]) > 0 and [n for _, n in made[2:]] == [0, 0, 0]


def test_tiles_are_measured_and_the_default_kept_unless_another_is_faster(monkeypatch):
    one = tiles.tune.Asked("some kernel", (16,), (1,))
    monkeypatch.setattr(tiles, "choices", lambda small: {"some": ("", lambda device: None, one)})
    for times, best in (({(1,): 1.0, (2,): 0.5, (3,): None}, [2]), ({(1,): 1.0, (2,): 0.99}, [1])):
        monkeypatch.setattr(tiles.tune, "measure", lambda *_, times=times: times)
        assert tiles.run(Context("cuda", {}, "some")).values["best"] == best


@needs_triton
def test_an_interpreter_that_runs_nothing_is_no_fault_of_a_row(monkeypatch):
    """As of Triton 3.6 with NumPy 2.5: refused with the reason, in the rows and by the dispatcher."""

    def run(*_):
        raise jit.triton.runtime.errors.InterpreterError("TypeError('only 0-dimensional arrays')")

    assert jit.interpreter_fault() is None
    monkeypatch.setattr(jit, "_loop", {(1,): run})
    monkeypatch.setattr(jit, "interpreter_fault", jit.interpreter_fault.__wrapped__)
    monkeypatch.setattr(jit, "INTERPRETED", True)
    assert tiles.names("cpu", "norms") == [""]
    found = tiles.run(CPU)
    assert found.state == REFUSED
    assert re.fullmatch(
        r"Triton needs another Triton or NumPy: the interpreter of \S+ with \S+: Type.*", found.detail
    )
    assert dispatch.absence("modulate", "triton", "cpu") == found.detail.removeprefix("Triton ")


SANITIZER = {
    "clean": ("called modulate\n========= ERROR SUMMARY: 0 errors\n", 0, RAN),
    "an access": (
        "called modulate\n========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n",
        0,
        FAILED,
    ),
    "a race": (
        "called a\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
        0,
        FAILED,
    ),
    "nothing ran": ("========= ERROR SUMMARY: 0 errors\n", 1, FAILED),
    "refused": ("========= Error: Device not supported\n", 1, REFUSED),
    "a crash": ("Segmentation fault\n", 139, FAILED),
}


@pytest.mark.parametrize("case", SANITIZER)
def test_the_sanitizer_is_read(case, tmp_path, monkeypatch):
    """By a program of that name that prints what compute-sanitizer does."""
    text, code, state = SANITIZER[case]
    program = tmp_path / sanitizer.NAME
    program.write_text(f"#!{sys.executable}\nprint({text!r}, end='')\nraise SystemExit({code})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = sanitizer.run(CPU, "memcheck")
    assert found.state == state, found


def test_without_the_sanitizer_it_is_refused(monkeypatch):
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert sanitizer.run(CPU, "memcheck").state == REFUSED


def test_the_small_form_skips_what_cuda_alone_has():
    names = {r.name for r in listing.rows("cpu")}
    assert "attention/self/14B/32760/cpu" in names and not any("75600" in name for name in names)
    assert correct.rows()
