"""Memory, power and clock of the GPU, for the metrics."""

from functools import cache

import torch


def gpu_metrics() -> dict[str, float]:
    """Memory, power, clock and utilisation of the current GPU; empty where there is none.

    Without nvidia-ml-py the memory alone, which torch knows too.
    """
    if not torch.cuda.is_available():
        return {}
    index = torch.cuda.current_device()
    values, _ = _nvml_values(index)
    if not values:
        free, total = torch.cuda.mem_get_info(index)
        return {"gpu_memory_bytes": float(total - free)}
    return {name: float(value) for name, value in values.items() if name in _LOGGED}


_LOGGED = ("gpu_memory_bytes", "gpu_power_w", "gpu_sm_clock_mhz", "gpu_utilization_percent")


def _nvml_values(index: int) -> tuple[dict[str, float], str]:
    """What NVML says of torch's device `index`, and why not when it says nothing.

    The device is looked up by UUID: NVML counts the machine's GPUs, torch those that
    CUDA_VISIBLE_DEVICES leaves it. A reading that the GPU does not have is left out.
    """
    nvml, why = _nvml()
    if nvml is None:
        return {}, why
    try:
        uuid = torch.cuda.get_device_properties(index).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (nvml.NVMLError, AttributeError) as error:
        return {}, f"GPU {index}: no power or clocks, NVML does not find it ({error})"
    readings = {
        "gpu_memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "gpu_power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "gpu_sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "gpu_sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "gpu_utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }
    values = {}
    for name, read in readings.items():
        try:
            values[name] = read()
        except nvml.NVMLError:
            continue
    return values, "" if values else f"GPU {index}: NVML gives no reading of it"


@cache
def _nvml() -> tuple[object | None, str]:
    """The initialised pynvml module, or None and the reason."""
    try:
        import pynvml
    except ImportError as error:
        return None, f"No power or clocks: pip install nvidia-ml-py ({error})"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"No power or clocks: NVML does not start ({error})"
    return pynvml, ""
