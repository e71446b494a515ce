"""The doctor's report: complete, plain data, and honest about what is missing."""

import importlib
import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from prfl_engine import gpu
from prfl_engine.tools import doctor
from prfl_kernels import dispatch


@pytest.fixture
def report():
    return doctor.report()


def probe(name):
    return doctor._probe(next(b for b in doctor.BACKENDS if b.name == name))


def test_every_operation_is_reported_and_rendered(report):
    rows = [(row["op"], row["implementation"], row["reason"]) for row in report["operations"]]
    assert rows and rows == [tuple(choice) for choice in dispatch.choices()]
    text = doctor.render(report)
    for op, implementation, reason in rows:
        assert any(op in x and implementation in x and reason in x for x in text.splitlines()), op


def test_every_implementation_is_reported_with_its_reason_and_why_it_does_not_run(report):
    rows = [tuple(row.values()) for row in report["implementations"]]
    assert rows == [(op, record.name, record.reason, why) for op, record, why in dispatch.records()]
    assert {row[:2] for row in rows} == {(op, c) for op, own in dispatch.OPERATIONS.items() for c in own}
    text = doctor.render(report).split("Implementations")[1]
    for op, name, reason, why in rows:
        state = "no" if why else "yes"
        line = [x for x in text.splitlines() if x.split()[:2] == [name, state] and reason in x and op in x]
        assert line and (not why or why in line[0]), (op, name)


def test_report_is_plain_data_and_names_this_machine(report):
    assert json.loads(json.dumps(report)) == report
    assert report["torch"]["version"] == torch.__version__
    assert report["cpu"]["cores"] >= 1 and report["cpu"]["memory_bytes"] > 1 << 28
    text = doctor.render(report)
    assert torch.__version__ in text and "GPU" in text
    for row in report["compilers"] + report["compiled"] + report["backends"]:
        assert row["available"] or row["reason"], row
        assert row["name"] in text


def test_what_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    row = probe("FlashAttention 3")
    assert not row["available"] and row["version"] is None and "hopper/" in row["reason"]


def test_a_folder_is_not_taken_for_the_package_of_its_name(monkeypatch):
    """Such as kernels/ of this project, for a Python that was started in the checkout."""
    folder = types.ModuleType("kernels")
    folder.__file__ = None
    monkeypatch.setitem(sys.modules, "kernels", folder)
    row = probe("kernels (Hugging Face)")
    assert not row["available"] and row["reason"].startswith("pip install kernels, then kernels.get_kernel(")


def test_version_skew_keeps_its_message(monkeypatch):
    def skewed(name):
        raise AttributeError("module 'cutlass' has no attribute 'Arch'")

    monkeypatch.setattr(importlib, "import_module", skewed)
    row = probe("FlashAttention 4")
    assert not row["available"]
    assert "cutlass" in row["reason"] and "pip install" in row["reason"]


def test_a_missing_dependency_is_told_from_a_missing_package(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert "No module named 'einops'" in probe("FlashAttention 2")["reason"]


def test_flash_attention_4_alone_is_not_taken_for_version_2(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    row = probe("FlashAttention 2")
    assert not row["available"] and "flash_attn_func" in row["reason"]


def test_pypi_apex_is_called_unrelated(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda name: "0.9.10" if name == "apex" else None)
    row = probe("apex")
    assert not row["available"] and "unrelated" in row["reason"]


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine whose torch sees one H100."""
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, uuid="4f1c"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 << 30, 80 << 30))
    gpu._nvml.cache_clear()
    yield monkeypatch
    gpu._nvml.cache_clear()


class FakeNvml(types.ModuleType):
    NVML_CLOCK_SM = 1
    NVMLError = type("NVMLError", (Exception,), {})

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-4f1c":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=5 << 30)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 345_600

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return 1980

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=97)


def test_gpu_readings(fake_gpu):
    fake_gpu.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    assert gpu.gpu_metrics() == {
        "gpu_memory_bytes": float(5 << 30),
        "gpu_power_w": 345.6,
        "gpu_sm_clock_mhz": 1980.0,
        "gpu_utilization_percent": 97.0,
    }
    gpus, note = doctor._gpus()
    assert note == ""
    line = "GPU: NVIDIA H100, sm_90, 80 GiB, 5.0 GiB used, 346 W, 1980 of 1980 MHz"
    assert doctor._render_gpu(gpus[0]) == line


def test_gpu_without_nvml_is_one_clear_line_and_the_memory_alone(fake_gpu):
    fake_gpu.setitem(sys.modules, "pynvml", None)
    gpus, note = doctor._gpus()
    assert gpus[0]["name"] == "NVIDIA H100"
    assert "pip install nvidia-ml-py" in note and "\n" not in note
    assert gpu.gpu_metrics() == {"gpu_memory_bytes": float(10 << 30)}


def test_no_gpu_no_metrics(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.gpu_metrics() == {}
    gpus, note = doctor._gpus()
    assert gpus == [] and note.startswith("No GPU: ")


@pytest.mark.gpu
def test_gpu_metrics_on_a_gpu():
    values = gpu.gpu_metrics()
    assert values["gpu_memory_bytes"] > 0
    assert all(isinstance(value, float) for value in values.values())


def test_compiler_that_is_not_there():
    row = doctor._compiler("no-such-compiler", "--version")
    assert row == {
        "name": "no-such-compiler",
        "available": False,
        "version": None,
        "reason": "not on PATH",
    }
