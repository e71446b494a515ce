"""The denoising chain: a rollout without gradient, then windows of steps with gradient.

A `Velocity` is a model bound to its context: (x [N, C, T, H, W], t [N], active [N] long) -> v. t and active
are on the CPU; `active` names the samples of the full batch that x holds, so that the model can select their
context. One that makes a further forward of some has `also`, what to count with a phase, and `halves`, the
number of those in its last call.

A window is the last k steps before a latent that is scored. Between its steps only latents and solver states
live. Backward goes through the last step, whose graph exists. Then it recomputes the earlier steps one after
another, from the latest to the earliest, each from its saved state, and sends the gradient of its results
through it. So the peak memory of a window is that of a single step. (Nested checkpoints need more: what an
inner one saves outlives the outer one.)

Ranks that share one sharded model make every step together. Where windows have different lengths, those with
shorter ones make steps whose gradient is zero.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from prfl_engine import flow, phases

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


class Together(Protocol):
    """Ranks that gather weights in every forward, so that all must make the same number of them."""

    model: nn.Module  # the generator that makes the steps without gradient inside a `rollout`

    def parts(self, schedule: flow.Schedule) -> list[tuple[int, int]]:
        """First step, and the one after the last, of the runs of steps that are rolled out one after another,
        on all ranks at the same time."""

    def rollout(self, count: int, part: int) -> AbstractContextManager[int]:
        """Around the forwards of a part of a rollout of which this rank needs `count`; gives how many it must
        make in addition. All ranks enter it together."""

    def more(self, count: int) -> int:
        """How many steps with gradient this rank must make in addition to the `count` that it needs."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of every one of `values` on the ranks that make each forward at the same time."""


def advance(
    velocity: Velocity, schedule: flow.Schedule, state: flow.SolverState, index: Tensor, active: Tensor
) -> flow.SolverState:
    """One denoising step of the samples `active` [N] of a batch, each at its own step index [N]."""
    return flow.step(schedule, state, velocity(state.x, schedule.timesteps[index], active), index)


def _count(phase: str, velocity: Velocity, x: Tensor) -> None:
    """Count a call of the velocity, which has given as many samples as x has."""
    phases.count(phase, x)
    if (also := getattr(velocity, "also", {}).get(phase)) is not None:
        phases.count(also, x[: velocity.halves])


class Chain:
    """The states of a batch on its way from noise or from any state: of every sample, before each step.

    Samples may be at different steps; all that have to advance do so together in one call.
    """

    def __init__(
        self,
        velocity: Velocity,
        schedule: flow.Schedule,
        start: Tensor | list[list[flow.SolverState | None]],
        stretch: Callable[[], Velocity] | None = None,
        together: "Together | None" = None,
        plain: Velocity | None = None,
    ):
        """start: noise [B, C, T, H, W], which is not changed; or the known states of every sample, in the
        form of `states`.

        velocity makes the steps of windows with gradient, plain (None: the same one) those without. For every
        stretch of steps before a window, stretch() gives the velocity (None: plain). together: the ranks that
        make every forward at the same time.
        """
        self.together, self.plain = together, plain or velocity
        self.velocity, self.schedule, self.stretch = velocity, schedule, stretch
        if isinstance(start, Tensor):
            first = flow.init_state(flow.rounded(start.detach(), schedule.dtype))
            start = [[first.select(slice(b, b + 1))] for b in range(len(start))]
        # states[b][i]: the state [1, ...] of sample b before step i, None where it was dropped.
        self.states = start

    def at(self, index: Tensor, active: Tensor) -> flow.SolverState:
        """The states of the samples `active` [N] before their steps index [N]."""
        rows = [self.states[b][i] for b, i in zip(active.tolist(), index.tolist(), strict=True)]
        return rows[0] if len(rows) == 1 else flow.SolverState(*map(torch.cat, zip(*rows, strict=True)))

    @torch.no_grad()
    def advance_to(self, index: Tensor, first: Tensor, velocity: Velocity | None = None) -> None:
        """Advance without gradient until every sample's state before step index[b] is known; states before
        step first[b] are dropped on the way.

        Both [B] long, on the CPU. The cost is one forward of one sample for every state that is missing.
        velocity None: that of a new stretch.
        """
        if velocity is None:
            velocity = self.plain if self.stretch is None else self.stretch()
        if self.together is None:
            self._advance(index, first, velocity)
            return
        everyone = torch.arange(len(index))
        for part, (begin, end) in enumerate(self.together.parts(self.schedule)):
            if begin == end:
                continue
            goal, have = index.clamp(max=end), self._newest()
            with self.together.rollout(max(0, *(goal - have).tolist()), part) as more:
                self._advance(goal, first, velocity)
                last = self.at(self._newest(), everyone)
                for _ in range(more):
                    advance(velocity, self.schedule, last, index.clamp(begin, end - 1), everyone)

    def _advance(self, index: Tensor, first: Tensor, velocity: Velocity) -> None:
        while True:
            for states, n in zip(self.states, first.tolist(), strict=True):
                known = min(n, len(states) - 1)
                states[:known] = [None] * known
            at = self._newest()
            active = (at < index).nonzero().squeeze(1)
            if not len(active):
                return
            at = at[active]
            state = advance(velocity, self.schedule, self.at(at, active), at, active)
            _count("rollout", velocity, state.x)
            self._append(state, active)

    def _newest(self) -> Tensor:
        """The steps [B] that the newest states are before."""
        return torch.tensor([len(states) - 1 for states in self.states])

    def _append(self, state: flow.SolverState, active: Tensor) -> None:
        for row, b in enumerate(active.tolist()):
            self.states[b].append(flow.SolverState(*(a[row : row + 1].detach() for a in state)))

    def graded(
        self, index: Tensor, window: int = 1, detach_input: bool = False, anchor: Velocity | None = None
    ) -> "Window":
        """The last `window` steps up to and with step index[b], with gradient to the model.

        index [B] long on the CPU, 0 <= index < len(schedule); a window is cut to index[b] + 1 steps. The
        states before it are constants. detach_input gives the model a detached input at every step, so that
        the gradient goes from step to step through the sampler alone (DRTune, Wu et al. 2024). anchor: a
        constant velocity that the last one is compared with.
        """
        phases.mark("rollout")
        first = (index - (window - 1)).clamp(min=0)
        if self.stretch is not None:
            self.advance_to(first, first)
        self.advance_to(index, first, self.plain)
        phases.mark("graded")
        return Window(self, index, window, detach_input, anchor)


class Window:
    """Steps of a chain with gradient. `x` [B, C, T, H, W] is the latent after the last of them, `distance`
    [B] that of the last velocity to the anchor's, see flow.distance; None: there is none.

    A loss of both is backpropagated by `backward` alone, which goes through all steps of the window. Any
    other backward through x would stop at the last step, so it raises RuntimeError.
    """

    def __init__(
        self, chain: Chain, index: Tensor, window: int, detach_input: bool, anchor: Velocity | None = None
    ):
        self.chain: Chain | None = chain
        self.index, self.window, self.detach_input = index, window, detach_input
        everyone = torch.arange(len(index))
        self.leaf, out, self.distance = self._step(index, everyone, window > 1, anchor)
        _count("graded", chain.velocity, out.x)
        if anchor is not None:
            _count("rollout", anchor, out.x)
        self.x: Tensor | None = out.x
        self.inside = False  # a backward of our own is running
        if out.x.requires_grad:
            out.x.register_hook(self._guard)
        # The step with gradient is also the rollout's next step.
        new = torch.tensor([len(states) for states in chain.states]) == index + 1
        rows = everyone[new]  # row numbers: a mask on the device would have to be counted there first
        some = out if new.all() else out.select(rows.to(out.x.device, non_blocking=True))
        chain._append(some, rows)

    def _guard(self, _) -> None:
        if not self.inside:
            raise RuntimeError("a loss of a window: got backward(), want window.backward(loss)")
        phases.mark("graded")  # the backward of what scores it is done

    def _step(self, index, active, through, anchor=None):
        """(state before the steps index, state after them, distance of their velocity to that of anchor); the
        first is a leaf that takes gradient if `through`."""
        leaf = flow.SolverState(*(a.detach().requires_grad_(through) for a in self.chain.at(index, active)))
        velocity = self.chain.velocity
        if self.detach_input:
            def velocity(x, t, active):  # fmt: skip
                return self.chain.velocity(x.detach(), t, active)
        if anchor is None:
            return leaf, advance(velocity, self.chain.schedule, leaf, index, active), None
        t = self.chain.schedule.timesteps[index]
        known = anchor(leaf.x.detach(), t, active)
        v = velocity(leaf.x, t, active)
        return leaf, flow.step(self.chain.schedule, leaf, v, index), flow.distance(v, known)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a loss of x and distance through every step of the window, and free it. RuntimeError,
        with nothing added to any gradient, the second time, and once a later window has dropped the states of
        this one."""
        if self.x is None:
            raise RuntimeError("a window: got a second backward, want one")
        first = (self.index - (self.window - 1)).clamp(min=0).tolist()
        gone = [states[i] is None for states, i in zip(self.chain.states, first, strict=True)]
        if self.window > 1 and any(gone):
            raise RuntimeError("a window: got backward after a later window was made, want it before")
        self.inside = True
        try:
            loss.backward()
        finally:
            self.inside = False
        leaf, self.leaf, self.x, self.distance = self.leaf, None, None, None
        active, more = torch.arange(len(self.index)), 0
        count = min(self.window - 1, int(self.index.max()))
        if self.window > 1 and self.chain.together is not None:
            more = self.chain.together.more(count)
        for distance in range(1, count + 1):
            on = self.index[active] >= distance  # the others are at the noise
            # The gradient of the state before the later step is that of the state after this one.
            rows = slice(None)
            if not on.all():
                rows = on.nonzero().squeeze(1).to(leaf.x.device, non_blocking=True)
            gradients, active = [a.grad[rows] for a in leaf], active[on]
            for a in leaf:  # the caller's loss may keep the leaf of the last step alive
                a.grad = None
            leaf, out, _ = self._step(self.index[active] - distance, active, True)
            _count("earlier", self.chain.velocity, out.x)
            torch.autograd.backward(out, gradients)
            del out, gradients
        for _ in range(more):
            _, out, _ = self._step(self.index, torch.arange(len(self.index)), True)
            torch.autograd.backward(out, [torch.zeros_like(a) for a in out])
        self.chain = None  # whoever still has the window keeps no states


def rollout(
    velocity: Velocity,
    schedule: flow.Schedule,
    start: Tensor | list[list[flow.SolverState | None]],
    index: Tensor,
) -> flow.SolverState:
    """Denoise every sample up to (not including) step index[b], without gradient.

    start: noise [B, C, T, H, W], or known states, as `Chain` takes it; index [B] long on the CPU,
    0 <= index <= len(schedule). A sample leaves the batch as soon as its index is reached, so from noise a
    batch costs index.sum() forwards of one sample.
    """
    chain = Chain(velocity, schedule, start)
    chain.advance_to(index, index)
    return chain.at(index, torch.arange(len(index)))


def sample(velocity: Velocity, schedule: flow.Schedule, noise: Tensor) -> Tensor:
    """The whole chain without gradient: noise [B, C, T, H, W] to latents of the same shape."""
    index = torch.full((len(noise),), len(schedule), dtype=torch.long)
    return rollout(velocity, schedule, noise, index).x
