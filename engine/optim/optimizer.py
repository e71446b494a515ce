"""The optimizer, one update with it, its learning-rate schedule, and the moving average of the weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prfl_engine.config import OptimConfig
from prfl_engine.errors import UserError
from prfl_engine.optim.block_adamw import BlockAdamW, norm_of
from prfl_engine.optim.states import check_groups, check_like, check_moments
from prfl_engine.shards import local


def make_optimizer(groups: list[tuple[nn.Module, float]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over (module, learning rate) groups; only parameters that require gradients.

    torch's fused one where weights and states are float32 on the device and all gradients are there for the
    update, apex's if it is asked for, BlockAdamW for everything else, sharded parameters too.
    """
    made = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr, "base_lr": lr}
        for module, lr in groups
    ]
    parameters = [p for group in made for p in group["params"]]
    narrow = any(p.dtype == torch.bfloat16 for p in parameters)
    sharded = any(isinstance(p, DTensor) for p in parameters)
    if config.grad_dtype == "float32":
        set_grad_dtype(parameters, torch.float32)
    if config.name == "apex":
        if narrow or sharded or parameters[0].device.type != "cuda":
            what = "bfloat16 weights" if narrow else "sharded weights" if sharded else "weights on a CPU"
            raise UserError(f"optim.name: got 'apex' with {what}, want adamw or adamw8bit")
        return _apex(made, config)
    if in_blocks(config, narrow, sharded):
        return BlockAdamW(made, config)
    return torch.optim.AdamW(
        made, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def in_blocks(config: OptimConfig, narrow: bool, sharded: bool) -> bool:
    """Whether BlockAdamW updates: bfloat16 weights (narrow), sharded ones, or what else torch's has not."""
    return (
        narrow or sharded or config.name == "adamw8bit" or config.in_backward or config.offload != "none"
    )


def set_grad_dtype(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Let gradients add up in a dtype, those of sharded ones in float32. UserError where torch cannot."""
    for p in parameters:
        if not hasattr(p, "grad_dtype"):
            version = torch.__version__
            raise UserError(f"optim.grad_dtype: got 'float32', want 'weights' with torch {version}")
        p.grad_dtype = None if isinstance(p, DTensor) else dtype
        if isinstance(p, DTensor):
            p.register_post_accumulate_grad_hook(_widen)


@torch.no_grad()
def _widen(p: Tensor) -> None:
    """Let FSDP2 add the next gradients of a step to one in float32. It hands over each one, which has been
    added up over ranks in float32 (parallel.shard), in the dtype of the weight."""
    p.grad = p.grad.to(torch.float32)


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, saved: object) -> None:
    """Load moments and counters of a state_dict; learning rates, betas, weight decay and eps stay those that
    the optimizer was made with.

    Every entry is checked first: ValueError names the one that does not fit.
    """
    if isinstance(optimizer, BlockAdamW):
        optimizer.load_state_dict(saved)
        return
    adamw = isinstance(optimizer, torch.optim.AdamW)
    counters = {} if adamw else {"step": Tensor}  # apex counts in the group
    check_groups(saved, optimizer.param_groups, counters)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in saved["state"].items():  # a parameter that never had a gradient has none
        like = torch.empty_like(parameters[i], device="meta")
        want = {"exp_avg": like, "exp_avg_sq": like} | ({"step": torch.zeros(())} if adamw else {})
        check_like(f"parameter {i}", entry, want)
        check_moments(f"parameter {i}", entry)
    groups = optimizer.state_dict()["param_groups"]
    for group, source in zip(groups, saved["param_groups"], strict=True):
        group.update({name: source[name] for name in counters})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def not_finite(module: nn.Module) -> str | None:
    """The name of the first trained parameter with a value that is not finite on this rank; waits for the
    device once."""
    named = [(name, local(p.detach())) for name, p in module.named_parameters() if p.requires_grad]
    named = [(name, p) for name, p in named if p.numel()]
    norms = torch._foreach_norm([p for _, p in named], math.inf)
    finite = torch.stack([norm.float() for norm in norms]).isfinite()
    return next((name for (name, _), ok in zip(named, finite.tolist(), strict=True) if not ok), None)


def update(optimizer: torch.optim.Optimizer, clip: float | None) -> Tensor:
    """Clip the gradients to norm `clip` (None: not), take one optimizer step, and clear the gradients.

    Returns the gradient norm (0-dim, on the device; no synchronisation). If the norm is not finite, weights
    and states are left unchanged (with in_backward, from the first gradient on that is not finite).
    """
    if isinstance(optimizer, BlockAdamW):
        norm = optimizer.norm()
    else:
        norm = norm_of(p for group in optimizer.param_groups for p in group["params"])
    optimizer.found_inf = (~norm.isfinite()).float()
    # The update divides by it, which saves a pass over the gradients.
    optimizer.grad_scale = None if clip is None else (norm / clip).clamp(min=1).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], clip: float) -> Tensor:
    """Scale the gradients that are there to norm `clip` if theirs is larger; returns their norm before,
    0-dim on the device."""
    norm = norm_of(parameters)
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, (clip / norm).clamp(max=1))
    return norm


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """The learning rate of every group becomes its base_lr times the factor; no host sync."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["base_lr"] * factor)
        else:
            group["lr"] = group["base_lr"] * factor


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Factor on the learning rate of update `step` (from 0) of `steps`, after which it stays."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return 0.5 * (1 + math.cos(2 * math.pi * config.cycles * progress))


def _apex(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """NVIDIA apex's FusedAdam, in its capturable form, whose flag and scale are read on the device."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"optim.name: got 'apex', but FusedAdam cannot be imported ({error}): build NVIDIA's apex from "
            "its repository with --cpp_ext --cuda_ext, or take adamw"
        ) from None

    class Fused(FusedAdam):
        """torch's amp protocol: grad_scale and found_inf are attributes."""

        grad_scale = found_inf = None

        def step(self) -> None:
            super().step(grad_scaler=self)

        def _check_inf_per_device(self, _) -> dict[torch.device, Tensor]:
            return {self.found_inf.device: self.found_inf}

        def _get_scale_async(self) -> Tensor:
            return torch.ones_like(self.found_inf) if self.grad_scale is None else self.grad_scale

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad()

        def load_state_dict(self, saved: dict) -> None:
            super().load_state_dict(saved)
            for group in self.param_groups:
                for name in ("lr", "step"):  # torch moves the states to the device, not these
                    if name in group:
                        group[name] = group[name].to(group["params"][0].device)

    # The constructor makes the default learning rate a tensor, not that of a group.
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
    return Fused(
        groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, capturable=True
    )


class EMA:
    """Exponential moving average of a module's trained parameters, in float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.module = decay, module
        self.own = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().float().clone() for k, p in self.own.items()}

    @torch.no_grad()
    def update(self, times: int = 1) -> None:
        """Move the average so many times towards the parameters."""
        weight = 1 - self.decay**times
        pairs = zip(self.average.values(), self.own.values(), strict=True)
        same = [(local(a), local(p)) for a, p in pairs]  # torch works out how to shard a list at every call
        for a, p in same:
            if a.dtype != p.dtype:
                a.lerp_(p.float(), weight)  # one parameter in float32 at a time
        same = [(a, p) for a, p in same if a.dtype == p.dtype]
        if same:
            torch._foreach_lerp_([a for a, _ in same], [p for _, p in same], weight)

    @contextmanager
    def applied(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """The module with the averaged weights, inside a with block; dtype None: in that of its own."""
        units = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        if units:
            yield from self._in_place(units)
            return
        before = {k: p.data for k, p in self.own.items()}
        with torch.no_grad():
            for k, p in self.own.items():
                p.data = self.average[k].to(dtype or p.dtype)
        try:
            yield
        finally:
            for k, p in self.own.items():
                p.data = before[k]

    def _in_place(self, units: list[FSDPModule]) -> Iterator[None]:
        """FSDP2 does not see another .data, nor a write to shards where the whole is still there."""
        before = {k: p.detach().clone() for k, p in self.own.items()}
        try:
            self._write(self.average, units)
            yield
        finally:
            self._write(before, units)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor], units: list[FSDPModule]) -> None:
        for unit in units:
            unit.reshard()
        for k, p in self.own.items():
            local(p).copy_(local(values[k]))
