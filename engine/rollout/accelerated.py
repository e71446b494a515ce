"""Cheaper steps without gradient for a rollout: in fp8, with step caching, as a CUDA graph, with an adapter
that is distilled to few steps.

Off by default. Acceleration changes which latents a rollout visits, never the gradient: graded steps, the
reward and flow matching run in the ordinary precision, at the latents that the rollout has visited. The drift
measures the change. Every `rollout.probe_every` optimizer steps a fixed sample is rolled out from fixed noise
to the last step that may be graded, once plainly and once accelerated; the drift is the relative L2 distance
of the two latents. Above `rollout.max_drift` rollouts are plain until a later probe is below it.

Probes draw no random numbers. They also run in the first step of a process and after every checkpoint, so a
resumed run depends only on its weights and step number.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from prfl_engine import chain, flow
from prfl_engine.batch import Batch
from prfl_engine.config import RolloutConfig
from prfl_engine.errors import UserError
from prfl_engine.guidance import Guidance
from prfl_engine.model import lora
from prfl_engine.model.wan import RunBlocks, WanTransformer, plain_blocks
from prfl_engine.objectives import fixed
from prfl_engine.rollout.cuda_graphs import Captured, CudaRecorder
from prfl_engine.rollout.fp8 import Fp8Blocks
from prfl_engine.rollout.step_cache import StepCache, cached
from prfl_kernels.qk_norm_rope.rope import Grid


def make_rollout(
    model: WanTransformer,
    config: RolloutConfig,
    schedule: flow.Schedule,
    device: torch.device,
    together: chain.Together | None = None,
    guidance: Guidance | None = None,
) -> "Rollout | None":
    """The accelerated rollout that the configuration asks for, or None if it asks for none. together: the
    ranks that share a sharded model. Raises UserError if this model or device cannot run it."""
    if config.precision == "same" and config.cache == 0 and not config.cuda_graph and config.lora is None:
        return None
    if config.cuda_graph and device.type != "cuda":
        raise UserError(f"rollout.cuda_graph: got true on {device.type}, want a CUDA device")
    recorder = CudaRecorder() if config.cuda_graph else None
    return Rollout(model, config, schedule, recorder, together, guidance)


class Rollout:
    """Velocities of a model for the steps of a rollout."""

    def __init__(
        self,
        model: WanTransformer,
        config: RolloutConfig,
        schedule: flow.Schedule,
        record: Callable | None = None,
        together: chain.Together | None = None,
        guidance: Guidance | None = None,
    ):
        """record: a recorder (`cuda_graphs.CudaRecorder`) if the blocks are to be replayed as a graph;
        together: the ranks that share a sharded model; guidance: of the steps."""
        self.guidance = guidance
        self.model, self.config, self.schedule, self.together = model, config, schedule, together
        self.runs = model if together is None else together.model
        self.fp8 = Fp8Blocks(model) if config.precision == "fp8" else None
        self.version: Hashable = None  # of the weights, see Fp8Blocks.follow
        self.accelerated = True  # False: plain until a probe passes
        plain = plain_blocks if record is None else self._captured(plain_blocks, record)
        fast = plain
        if self.fp8 is not None:
            fast = self.fp8 if record is None else self._captured(self.fp8, record)
        elif record is not None and config.lora is not None:  # its recordings have the adapter in them
            fast = self._captured(plain_blocks, record)
        self.blocks: dict[bool, RunBlocks] = {False: plain, True: fast}

    @property
    def approximate(self) -> bool:
        """Whether an accelerated rollout visits other latents than a plain one."""
        return self.fp8 is not None or self.config.cache > 0 or self.config.lora is not None

    def stretches(self, batch: Batch, context: Tensor) -> Callable[[], chain.Velocity]:
        """A function that gives the velocity for one stretch of steps without gradient.

        A stretch ends with a graded step, before which the residuals of the step cache are freed.
        context as in `objectives.bind`; with guidance batch and context are those of `Guidance.both`.
        """
        context = self._context(batch, context, self.accelerated)
        return lambda: self._velocity(batch, context, self.accelerated)

    @torch.no_grad()
    def _context(self, batch: Batch, context: Tensor, accelerated: bool) -> Tensor:
        """The context tokens of a rollout: of the adapter's own embedding, or those given."""
        if self.config.lora is None or not accelerated:
            return context.detach()
        with self._adapted(accelerated):
            return self.model.embed_context(batch.text, batch.clip)

    def _adapted(self, accelerated: bool) -> AbstractContextManager[None]:
        """A with block in which the model computes with the adapter of accelerated rollouts."""
        on = accelerated and self.config.lora is not None
        return lora.lent(*dict.fromkeys((self.model, self.runs))) if on else nullcontext()

    def _velocity(self, batch: Batch, context: Tensor, accelerated: bool) -> chain.Velocity:
        bound = partial(self._bound, accelerated)
        if self.guidance is None:
            return bound(batch, context)
        return self.guidance.velocity(bound, batch, context)

    def _bound(self, accelerated: bool, batch: Batch, context: Tensor) -> chain.Velocity:
        model, run_blocks, cache = self.runs, self.blocks[accelerated], None
        if accelerated and self.config.cache > 0:
            last = self.schedule.timesteps[-1].item()
            cache = StepCache(self.config.cache, last, model.sequence, self.together)
        if accelerated and self.fp8 is not None:
            with self._adapted(accelerated):
                self.fp8.follow(self.version)

        @torch.no_grad()
        def velocity(x: Tensor, t: Tensor, active: Tensor) -> Tensor:
            condition = None if batch.condition is None else _rows(batch.condition, active)
            t = t.to(x.device, non_blocking=True)
            run = run_blocks if cache is None else cached(run_blocks, cache, t, active)
            with self._adapted(accelerated):
                return model(x, t, _rows(context, active), condition, run)

        return velocity

    def _captured(self, run_blocks: RunBlocks, record: Callable) -> RunBlocks:
        """run_blocks on all blocks of the model, recorded and replayed."""
        blocks, parameters = self.runs.blocks, list(self.runs.blocks.parameters())

        def call(tokens: Tensor, e_B6C: Tensor, context: Tensor, key: tuple[int, Grid]) -> Tensor:
            return run_blocks(blocks, tokens, e_B6C, context, *key)

        graph = Captured(call, lambda: tuple(p.data_ptr() for p in parameters), record)
        return lambda _, tokens, e_B6C, context, repeats, grid: graph(
            tokens, e_B6C, context, key=(repeats, tuple(grid))
        )

    @torch.no_grad()
    def drift(self, batch: Batch, noise: Tensor, index: Tensor) -> Tensor:
        """Relative L2 distance, a scalar, of the latents before step index[b] of the accelerated rollout
        from those of the plain one; arguments as in `chain.rollout`."""
        noise = fixed(self.model, batch, noise)
        batch = batch if self.guidance is None else self.guidance.both(batch)
        context = self.model.embed_context(batch.text, batch.clip)
        made = []
        for how in (True, False):
            velocity = self._velocity(batch, self._context(batch, context, how), how)
            way = chain.Chain(velocity, self.schedule, noise, None, self.together)
            way.advance_to(index, index)
            made.append(way.at(index, torch.arange(len(index))).x)
        fast, plain = made
        drift = (fast - plain).norm() / plain.norm()
        return drift if self.together is None else self.together.largest(drift)


def _rows(a: Tensor, active: Tensor) -> Tensor:
    """The samples `active` (on the CPU) of a batch."""
    return a if len(active) == len(a) else a[active.to(a.device, non_blocking=True)]

