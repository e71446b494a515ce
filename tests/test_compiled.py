"""The compiled extension: what it is built for, what is missing and why, the memory and threads it uses."""

import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpu_cases import all_cases
from fused import outputs_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_kernels import cuda_kernels
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


@pytest.mark.parametrize("built, driver, capability, why", [
    (13000, 12080, (9, 0), "is built with CUDA 13.0, the driver supports 12.8"),
    (12040, 13000, (9, 0), None),
    (12080, 12040, (9, 0), None),  # an older driver of the same major version runs its machine code
    (12080, 12040, (10, 0), "is built with CUDA 12.8, the driver supports 12.4"),  # but not its PTX
    (13000, 13000, (10, 0), None),
    (13000, 0, (9, 0), "needs an NVIDIA driver"),
    (13000, 13000, (8, 0), "is built for sm_90a, this GPU is sm_80"),
])  # fmt: skip
def test_cuda_kernels_are_absent_where_the_driver_does_not_fit(built, driver, capability, why, monkeypatch):
    module = SimpleNamespace(
        cuda_architectures="sm_90a", cuda_version=built, cuda_driver_version=lambda: driver
    )
    monkeypatch.setattr(compiled, "_load", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert compiled.absence("cuda", "cuda") == why


with_cuda = pytest.mark.skipif(not compiled.extension().cuda_architectures, reason="built without nvcc")


@with_cuda
def test_the_report_has_the_version_of_cuda():
    module = compiled.extension()
    assert module.cuda_version >= 12040 and module.cuda_driver_version() >= 0
    assert f"with CUDA {module.cuda_version // 1000}." in compiled.report()[2][2]


@with_cuda
def test_a_driver_without_tensor_maps_is_an_error():
    if compiled.extension().cuda_driver_version():
        pytest.skip("this driver has them")
    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    sizes = dict(batch=1, queries=1, keys=1, heads=1, scale=1.0)
    with pytest.raises(RuntimeError, match="^cuTensorMapEncodeTiled: got .* CUDA driver"):
        cuda_kernels.launch("attention_hopper_forward", q=q, k=q, v=q, out=q, lse=q.float(), **sizes)


# -- launches


def test_arguments_of_a_launch_go_by_name():
    h = torch.randn(1, 2, 8)
    given = dict(h=h, bias=h[0, 0], g=torch.empty_like(h), batch=1, length=2, width=8)
    compiled.launch("bias_gelu_forward", **given)
    torch.testing.assert_close(given["g"], torch.nn.functional.gelu(h + h[0, 0], approximate="tanh"))
    wrong = [
        ({name: a for name, a in given.items() if name != "bias"}, "got no argument bias"),
        (given | {"bais": None}, "got bais, which is none of its arguments"),
        (given | {"width": 8.5}, "got float for width"),
        (given | {"h": 3}, "got int for h"),
    ]
    for arguments, message in wrong:
        with pytest.raises(TypeError, match=f"^bias_gelu_forward: {message}"):
            compiled.launch("bias_gelu_forward", **arguments)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        compiled.extension().bias_gelu_forward(h)


def test_cuda_launches_run_on_the_device_of_their_tensors(monkeypatch):
    """Whatever device is current: its guard, and its own current stream."""
    seen = []

    @contextmanager
    def guard(device):
        seen.append(f"enter {device}")
        yield
        seen.append(f"leave {device}")

    library = SimpleNamespace(kernel=lambda **given: seen.append((given["x"].device.index, given["stream"])))
    monkeypatch.setattr(cuda_kernels, "library", lambda: library)
    monkeypatch.setattr(cuda_kernels, "_view", lambda a: a)
    monkeypatch.setattr(torch.cuda, "device", guard)
    streams = {0: SimpleNamespace(cuda_stream=70), 1: SimpleNamespace(cuda_stream=71)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    with FakeTensorMode():
        here, there = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
    cuda_kernels.launch("kernel", x=there, y=None, z=there, n=3)
    assert seen == ["enter cuda:1", (1, 71), "leave cuda:1"]
    with pytest.raises(ValueError, match="^kernel: got x on cuda:1 and z on cuda:0, want one device$"):
        cuda_kernels.launch("kernel", x=there, y=None, z=here)
    assert len(seen) == 3


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
