"""What optimizer steps measure, on its way from the device to the record.

Values of a step are read when the next one has begun, all in one transfer. So the host waits for the device
once a step, and by then for nothing. Phases are timed by marks that the device has passed by that time.
"""

import math
import resource
from collections import Counter
from collections.abc import Callable
from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from prfl_engine.gpu import gpu_metrics
from prfl_engine.metrics import MetricsWriter, NoMetrics
from prfl_engine.model.flops import Costs, peak
from prfl_engine.parallel import World
from prfl_engine.phases import BETWEEN, Clock, Lap, Shape


class Measured:
    """Values of a step, 0-dim on the device, on their way to the host."""

    def __init__(
        self, step: int, lr: float, values: dict[str, Tensor], lap: Lap, mean: Callable[[Tensor], Tensor]
    ):
        self.step, self.lr, self.lap, self.names = step, lr, lap, list(values)
        flat = mean(torch.stack([v.detach().float() for v in values.values()]))
        self.numbers = flat.to("cpu", non_blocking=True)  # into pinned memory, where it came from a GPU
        self.event = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None

    def read(self) -> dict[str, float]:
        """The values by name, with lr; waits for the transfer."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True)) | {"lr": self.lr}


class Performance:
    """Seconds, tokens and FLOPs of all ranks in the steps since the last record."""

    def __init__(self, device: torch.device, world: World, costs: Callable[[Shape], Costs], bfloat16: bool):
        """bfloat16: what products compute in; only then the peak of a processor is known."""
        self.device, self.world, self.costs = device, world, cache(costs)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak(name) if bfloat16 else None
        self.seconds, self.waits, self.work, self.steps = Counter(), Counter(), Counter(), 0

    def add(self, lap: Lap) -> None:
        """The lap of a step that the device has passed."""
        self.seconds.update(lap.seconds())
        self.waits.update(lap.waits())
        self.work.update(lap.work)
        self.steps += 1

    def values(self) -> dict[str, float]:
        """What the record holds, and start anew; every rank must call it.

        Seconds are those of a step, of validations and saves all since the last record; the mean of the
        ranks. So are those of waits for other ranks, where they are measured, of which there is also the
        rank's that waits least, as the others wait for it. Memory is the most that a rank has held, and that
        of the rank with least. Tokens and FLOPs are those of all samples together.
        """
        mine = {"seconds": dict(self.seconds), "waits": dict(self.waits), "memory": self._memory()}
        mine |= {"tokens": 0, "flops": 0}
        for (what, shape), n in self.work.items():
            costs = self.costs(shape)
            mine["tokens"] += n * costs.tokens * (what == "samples")
            mine["flops"] += n * (0 if what == "samples" else costs.flops[what])
        ranks = self.world.all(mine)
        mean, waits = (_mean([rank[kind] for rank in ranks]) for kind in ("seconds", "waits"))
        busy = _of_steps(mean)
        found = {"step_s": busy / self.steps}
        found |= {f"{name}_s": s / self._times(name) for name, s in mean.items()}
        if waits:  # several ranks agree before every step, so there are some where they are measured
            found["exposed_s"] = _of_steps(waits) / self.steps
            found["exposed_s_least"] = min(_of_steps(rank["waits"]) for rank in ranks) / self.steps
            found |= {f"{name}_exposed_s": s / self._times(name) for name, s in waits.items()}
        # Ranks that share a sample have counted it once each.
        tokens, flops = (sum(rank[k] for rank in ranks) / self.world.sequence for k in ("tokens", "flops"))
        found |= {"tokens_per_s": tokens / busy, "model_flop_per_s": flops / busy}
        if self.peak is not None:
            found["mfu"] = flops / busy / self.world.size / self.peak
        found["memory_bytes"] = max(rank["memory"] for rank in ranks)
        if len(ranks) > 1:
            found["memory_bytes_least"] = min(rank["memory"] for rank in ranks)
        self.seconds, self.waits, self.work, self.steps = Counter(), Counter(), Counter(), 0
        return found | gpu_metrics()

    def _times(self, phase: str) -> int:
        """What seconds of a phase are divided by."""
        return 1 if phase in BETWEEN else self.steps

    def _memory(self) -> float:
        """Most bytes since the last record: of tensors on the GPU; without one, of the process ever."""
        if self.device.type != "cuda":
            return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return float(most)


def _mean(ranks: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {name: fmean(rank.get(name, 0.0) for rank in ranks) for name in names}


def _of_steps(seconds: dict[str, float]) -> float:
    return sum(s for name, s in seconds.items() if name not in BETWEEN)


class Measurements:
    """What steps measure; a step's values are read, all in one transfer, when the next one has begun."""

    def __init__(
        self,
        metrics: MetricsWriter | NoMetrics,
        log_every: int,
        newest: dict[str, Tensor],
        bad_gradient: Callable[[int, float], None],
        logged: Callable[[int, dict[str, float]], None],
        mean: Callable[[Tensor], Tensor],
        clock: Clock,
        performance: Performance,
    ):
        """logged: called with a step and its values once they are; mean: of values over all processes, on the
        device."""
        self.logged = logged
        self.metrics, self.log_every, self.bad_gradient, self.mean = metrics, log_every, bad_gradient, mean
        self.clock, self.performance = clock, performance
        self.last: Measured | None = None
        self.newest = newest  # since the last log: not every step has every loss

    def put(self, step: int, lr: float, norm: Tensor, values: dict[str, Tensor]) -> None:
        """Start the transfer of a step's gradient norm and, where it is to be logged, of all values (0-dim)
        since the last log."""
        self.newest |= values
        logs = (step + 1) % self.log_every == 0
        named = {"grad_norm": norm} | (self.newest if logs else {})
        self.last = Measured(step, lr, named, self.clock.lap(), self.mean)
        if logs:
            self.newest = {}

    def unlogged(self) -> dict[str, Tensor]:
        """The values since the last log, the mean over all processes, which must all ask."""
        if not self.newest:
            return {}
        flat = self.mean(torch.stack([v.detach().float() for v in self.newest.values()]))
        return dict(zip(self.newest, flat.unbind(), strict=True))

    def settle(self) -> None:
        """Wait for the last step's values and log them; bad_gradient is called if its gradient was not
        finite."""
        if self.last is None:
            return
        last, self.last = self.last, None
        step, values = last.step, last.read()
        self.performance.add(last.lap)
        if not math.isfinite(values["grad_norm"]):
            self.bad_gradient(step, values["grad_norm"])
        if (step + 1) % self.log_every == 0:
            self.metrics.log(step + 1, self.performance.values(), "perf")
            self.metrics.log(step + 1, values, "train")
            self.logged(step, values)
