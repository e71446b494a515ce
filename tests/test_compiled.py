"""The compiled extension: what it is built for, what is missing and why, the memory and threads it uses."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import all_cases
from fused import outputs_and_gradients

from prfl_kernels import extension as compiled

if why := compiled.absence("cpu", "cpu"):
    pytest.skip(f"prfl_kernels._C {why}", allow_module_level=True)


@pytest.fixture
def loaded_again():
    """The extension is loaded as if for the first time, and so it is for the tests that follow."""
    compiled._load.cache_clear()
    yield
    compiled._load.cache_clear()


@pytest.mark.usefixtures("loaded_again")
def test_environment_forces_the_instruction_set(monkeypatch):
    monkeypatch.setenv("PRFL_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="^PRFL_CPU_ISA: got instruction set 'mmx', want one of generic"):
        compiled.extension()
    monkeypatch.setenv("PRFL_CPU_ISA", "generic")
    assert compiled.extension().active_isa() == "generic"
    assert "generic of" in compiled.report()[0][2]


def test_report_says_what_is_there_and_why_not():
    rows = {part: (state, reason) for part, state, reason in compiled.report()}
    assert rows["cpu"][0] == "yes" and compiled.isas()[-1] in rows["cpu"][1]
    assert rows["cuda"][0] == "yes" or rows["cuda"][1]
    assert compiled.absence("cpu", "cpu") is None
    assert "CPU alone" in compiled.absence("cpu", "cuda")
    assert compiled.absence("cuda", "cpu")


def test_report_names_instruction_sets_that_the_compiler_did_not_know(monkeypatch):
    monkeypatch.setattr(compiled.extension(), "isas_left_out", "")
    assert "too old" not in compiled.report()[0][2]
    monkeypatch.setattr(compiled.extension(), "isas_left_out", "avx512_bf16")
    assert "too old for avx512_bf16" in compiled.report()[0][2]


@pytest.mark.usefixtures("loaded_again")
def test_without_the_extension_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "prfl_kernels._C", None)
    assert "g++ 9" in compiled.absence("cpu", "cpu")
    assert {state for _, state, _ in compiled.report()} == {"no"}
    with pytest.raises(ValueError, match="is not built"):
        compiled.extension()


def test_loops_run_on_the_threads_of_torch():
    """A second pool of threads would fight torch's for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    a = torch.randn(300, 300)
    (a @ a).exp()  # torch's threads are up
    (torch.randn(1 << 20) + 1).sum()
    before = len(os.listdir("/proc/self/task"))
    for kernel, _, inputs in all_cases():
        outputs_and_gradients(kernel, inputs)
    assert len(os.listdir("/proc/self/task")) == before
    torch.set_num_threads(threads)
    assert Path(torch.__file__).parent in Path(compiled.extension().openmp_runtime()).parents


FAULTS = """
import resource, sys, torch
from prfl_kernels import extension
if "keep" in sys.argv:
    assert extension.keep_freed_memory()
for _ in range(16):  # glibc before 2.38 places aligned memory behind what it freed until pieces join
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)  # 64 MiB: 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept_for_the_next_result():
    counted = [
        int(subprocess.run([sys.executable, "-c", FAULTS, *how], capture_output=True, check=True).stdout)
        for how in ([], ["keep"])
    ]
    assert counted[1] < counted[0] / 10
