"""AdamW in little memory: bfloat16 weights, 8-bit moments, states on the host, updates in backward.

A parameter and what belongs to it are handled in blocks of 4 Mi values, so neither the float32 arithmetic nor
the copies of what lives on the host need more than a few blocks of room on the device. Nothing waits for
the device: learning rates are numbers, everything else that decides about an update is a tensor there.

Bytes a parameter in addition to its weight and gradient: two float32 moments 8, or 2.03 in 8 bits; the rest
of a float32 master weight 2.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prfl_engine.config import OptimConfig
from prfl_engine.errors import UserError, check
from prfl_engine.memory.host import HostBlocks, new_block
from prfl_engine.memory.live_bytes import host_memory
from prfl_engine.optim.states import check_groups, check_like, check_moments
from prfl_engine.phases import computing
from prfl_engine.seeds import Purpose, torch_seed
from prfl_engine.shards import local, offset, summed
from prfl_kernels.jit import wide

BLOCK = 1 << 22  # values; float32 blocks are powers of two, which is what pinned memory is rounded up to
GROUP = 256  # values that share a scale, as in torchao and bitsandbytes


class BlockAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov, Hutter 2019) in float32, by torch's fused kernel, of bfloat16 or float32 parameters.

    groups as torch.optim takes them. What is used of config: betas, eps, weight_decay, and
    name "adamw8bit": moments of parameters of 4,096 values and more in blockwise dynamic 8-bit numbers
      (Dettmers et al. 2022) by torchao's functions, of the second moment its root (see EightBits); of sharded
      ones those whose rows are a multiple of 256;
    rounding of bfloat16 weights: "master" keeps the 16 bits that they lack of float32, so that the update is
      that of a float32 weight; "stochastic" keeps nothing and rounds up or down at random, right on average;
    in_backward: a parameter is updated when its gradient arrives, which is freed; step() only ends the step;
    offload: "states" or "all", gradients too, live in host memory, pinned on CUDA; gradients add up there.

    As in torch's amp protocol `grad_scale` (gradients are divided by it) and `found_inf` (1: change nothing),
    0-dim float32 tensors on the device or None, are read by step(). In a backward a gradient that is not
    finite stops its own and all later updates of the step.

    Of parameters that FSDP2 has sharded, a rank updates its own part. All ranks decide alike: norms are
    summed over the shards, what is in 8 bits depends on the whole shape, random bits on the place in it.
    """

    def __init__(self, groups: list[dict], config: OptimConfig):
        super().__init__(groups, dict(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay))
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.config, self.in_backward = config, config.in_backward
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}
        self.index_of = {p: i for i, p in enumerate(self.group_of)}
        device = next(iter(self.group_of)).device
        self.eight_bits = EightBits(device, config.betas) if config.name == "adamw8bit" else None
        self.generator = torch.Generator(device)
        for group in self.param_groups:
            group["updates"] = 0  # steps so far, known to the host; states hold those that changed something
        pinned = config.offload != "none" and device.type == "cuda"
        home = torch.device("cpu") if config.offload != "none" else device
        place = nullcontext if config.offload == "none" else host_memory
        for p, i in self.index_of.items():
            if p.dtype not in (torch.float32, torch.bfloat16) or not local(p).is_contiguous():
                raise UserError(f"parameter {i}: got {p.dtype}, want contiguous float32 or bfloat16")
            sizes = [len(a) for a in _blocks(p)]
            with place():
                moments = [new_block(self._layout(p, n), home, pinned) for n in sizes]
            self.state[p] = {"step": torch.zeros((), device=device), "blocks": moments}
        # Gradients on the host are no part of the state that checkpoints hold.
        self.gradients: dict[Tensor, list[dict[str, Tensor]]] = {}
        if config.offload == "all":
            for p in self.group_of:
                dtype = torch.float32 if config.grad_dtype == "float32" else p.dtype
                with place():
                    self.gradients[p] = [
                        new_block({"gradient": (len(a), dtype)}, home, pinned) for a in _blocks(p)
                    ]
        self.host = None
        if config.offload != "none":
            everything = (*(s["blocks"] for s in self.state.values()), *self.gradients.values())
            self.host = HostBlocks(device, [block for blocks in everything for block in blocks])
        self._norms: dict[Tensor, Tensor] = {}  # of the gradients that have arrived in this step
        self._ok: Tensor | None = None  # in_backward: all of them finite
        if self.in_backward or self.gradients:
            for p in self.group_of:
                p.register_post_accumulate_grad_hook(self._arrived)  # FSDP calls it in its reduction

    def _layout(self, p: Tensor, n: int) -> dict[str, tuple[int, torch.dtype]]:
        # Of a sharded parameter whole groups are on a rank where its rows hold whole groups.
        row = math.prod(p.shape[1:]) if isinstance(p, DTensor) else n  # p[0] would gather all of it
        return state_layout(self.config, p.dtype, p.numel(), row, n)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norm of the gradients of this step, 0-dim float32 on the device; no host sync."""
        if self.in_backward or self.gradients:
            norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
            return norm if self.in_backward else summed(norm, self.group_of)
        return norm_of(self.group_of)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; with in_backward that has been done already."""
        ok = None if self.found_inf is None else self.found_inf == 0
        if self.gradients:
            self._update([(p, None) for p in self.group_of if p in self._norms], ok)
        elif not self.in_backward:
            self._update([(p, p.grad) for p in self.group_of if p.grad is not None], ok)
        for group in self.param_groups:
            group["updates"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those on the host too."""
        super().zero_grad(set_to_none)
        self._norms, self._ok = {}, None

    def _arrived(self, p: Tensor) -> None:
        """A backward has added to p.grad."""
        grad, p.grad = p.grad, None
        with computing():
            self._take(p, grad)

    def _take(self, p: Tensor, grad: Tensor) -> None:
        if not self.in_backward:
            self._norms[p] = self._add(p, grad, first=p not in self._norms)
            return
        if p in self._norms:
            raise ValueError("optim.in_backward: got two gradients of one parameter in a step, want one")
        norm = self._norms[p] = summed(torch.linalg.vector_norm(local(grad), dtype=torch.float32), [p])
        self._ok = norm.isfinite() if self._ok is None else self._ok & norm.isfinite()
        self._update([(p, grad)], self._ok)

    @torch.no_grad()
    def _add(self, p: Tensor, grad: Tensor, first: bool) -> Tensor:
        """Add to the gradient on the host; returns the norm of the sum."""
        squares = []
        work = zip(_blocks(grad), self.gradients[p], strict=True)
        for g, here in self._on_device(work, "write" if first else "both"):
            total = here["gradient"]
            total.copy_(g) if first else total.add_(g)
            squares.append(torch.linalg.vector_norm(total, dtype=torch.float32))
        return torch.linalg.vector_norm(torch.stack(squares))

    @torch.no_grad()
    def _update(self, pairs: list[tuple[Tensor, Tensor | None]], ok: Tensor | None) -> None:
        """Update parameters with their gradients, None: those on the host; nothing changes unless ok."""
        steps = {p: self.state[p]["step"] + 1 for p, _ in pairs}
        scale = None if self.in_backward else self.grad_scale
        bad = None if ok is None else (~ok).float()
        for (p, i, w, g), block in self._on_device(self._work(pairs), "both"):
            group = self.group_of[p]
            g = (block["gradient"] if g is None else g).float()
            x, (m, v) = master(w, block), self._moments(block)
            torch._fused_adamw_(
                [x], [g], [m], [v], [], [steps[p]], lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=scale, found_inf=bad,
            )  # fmt: skip
            if "exp_avg_rms" in block:  # encoding what has not changed does not give the old codes
                for name, a in self.eight_bits.encode(m, v).items():
                    _put(block[name], a, ok)
            # A weight that has not changed comes back the same, however it is rounded.
            if "rest" in block:
                high, rest = split_master(x)
                w.copy_(high)
                block["rest"].copy_(rest)
            elif w.dtype == torch.bfloat16:
                # By step and place, so that neither the order of updates nor a resumed run changes a bit.
                place = self.index_of[p] << 40 | offset(p) + i * BLOCK
                seed = torch_seed(Purpose.ROUNDING, group["updates"], place)
                w.copy_(round_stochastically(x, self.generator.manual_seed(seed)))
        for p, t in steps.items():
            _put(self.state[p]["step"], t, ok)

    def _work(self, pairs) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
        for p, grad in pairs:
            weights, blocks = _blocks(p.detach()), self.state[p]["blocks"]
            gradients = [None] * len(blocks) if grad is None else _blocks(grad)
            for i, (w, g, block) in enumerate(zip(weights, gradients, blocks, strict=True)):
                yield (p, i, w, g), block if grad is not None else block | self.gradients[p][i]

    def _on_device(self, work: Iterable[tuple], how: str) -> Iterator[tuple]:
        return iter(work) if self.host is None else self.host.stream(work, how)

    def _moments(self, block: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The float32 moments of a block: its own, or decoded."""
        if "exp_avg_rms" in block:
            return self.eight_bits.decode(block)
        return block["exp_avg"], block["exp_avg_sq"]

    def state_dict(self) -> dict:
        """torch's, with states {"step": 0-dim float32, "blocks": [{name: 1-dim tensor}]}; waits for copies to
        the host."""
        if self.host is not None:
            self.host.wait()
        return super().state_dict()

    def load_state_dict(self, saved: dict) -> None:
        """Copy moments and counters of a state_dict of the same parameters, name and rounding; offload may
        differ. Learning rates and the like stay those of the configuration. ValueError names what differs;
        then nothing has changed."""
        check_groups(saved, self.param_groups, {"updates": int})
        mine = self.state_dict()["state"]
        for i, own in mine.items():
            check_like(f"parameter {i}", saved["state"].get(i), own)
            check_moments(f"parameter {i}", saved["state"][i])
        for i, own in mine.items():
            own["step"].copy_(saved["state"][i]["step"])
            for block, source in zip(own["blocks"], saved["state"][i]["blocks"], strict=True):
                for name, a in block.items():
                    a.copy_(source[name])
        for group, source in zip(self.param_groups, saved["param_groups"], strict=True):
            group["updates"] = source["updates"]


class EightBits:
    """The moments m and v of AdamW in blockwise dynamic 8-bit numbers: a code into a table of 256 values, and
    a scale for 256 codes.

    Table and scales are torchao's, the codes too but for ties: its search makes 35 passes over the values
    unless it is compiled, bucketize one. Two things differ from torchao and bitsandbytes.

    The root of v is stored. The smallest positive number is 3e-7 of the largest in its group, so v itself
    rounds to 0 where gradients are below 4e-4 of the group's largest; m does not, and m / (sqrt(v) + eps)
    explodes.

    Decoded moments keep |m| <= K sqrt(v), K^2 = (1 - beta1)^2 / ((1 - beta2) (1 - beta1^2 / beta2)): v is
    raised where it is below. By Cauchy-Schwarz, moments of any gradients have this, and an update keeps it.
    So no codes make an update larger than the largest that float32 moments can make: K = 7.3 learning rates
    with the usual betas. benchmarks/adamw8bit_error.py measures both.
    """

    def __init__(self, device: torch.device, betas: tuple[float, float]):
        try:
            from torchao.optim import quant_utils
        except ImportError as error:
            raise UserError(
                f"optim.name: got 'adamw8bit', but torchao cannot be imported ({error}): "
                "pip install torchao, or prfl with its extra [lowmem]"
            ) from None
        self.of, self.limit = quant_utils, update_limit(betas)
        signed = (("exp_avg", True), ("exp_avg_rms", False))
        self.tables = {k: torch.tensor(quant_utils.create_dynamic_map(s), device=device) for k, s in signed}
        self.bounds = {k: (a[1:] + a[:-1]) / 2 for k, a in self.tables.items()}

    def decode(self, block: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """float32 m and v [n] of uint8 codes [n] and float32 scales [n / 256], by their names in a block."""
        m, root = (
            self.of.dequant_with_qmap(block[name], table, block[f"{name}_scale"])
            for name, table in self.tables.items()
        )
        return m, torch.maximum(root, m.abs() / self.limit).square_()

    def encode(self, m: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Codes and scales of float32 m and v [n], as `decode` takes them."""
        made = {}
        for (name, bounds), value in zip(self.bounds.items(), (m, v.sqrt()), strict=True):
            scaled, made[f"{name}_scale"] = self.of.scale_tensor(value, GROUP)
            made[name] = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
        return made


def state_layout(
    config: OptimConfig, dtype: torch.dtype, values: int, row: int, n: int
) -> dict[str, tuple[int, torch.dtype]]:
    """(size, dtype) of what is kept for a block of n values of a parameter of so many values, of which `row`
    values are always together on a rank."""
    layout = {"exp_avg": (n, torch.float32), "exp_avg_sq": (n, torch.float32)}
    if config.name == "adamw8bit" and values >= 4096 and row % GROUP == 0:
        layout = {name: (n, torch.uint8) for name in ("exp_avg", "exp_avg_rms")}
        layout |= {f"{name}_scale": (n // GROUP, torch.float32) for name in list(layout)}
    if dtype == torch.bfloat16 and config.rounding == "master":
        layout["rest"] = (n, torch.int16)
    return layout


def update_limit(betas: tuple[float, float]) -> float:
    """The largest |m| / sqrt(v) of AdamW's moments, whatever the gradients. UserError where there is none."""
    first, second = betas
    check(
        first >= 0 and first * first < second < 1, "optim.betas", list(betas),
        "beta1^2 < beta2 < 1 with adamw8bit: otherwise an update has no limit",
    )  # fmt: skip
    return (1 - first) / math.sqrt((1 - second) * (1 - first * first / second))


def norm_of(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, over all shards, 0-dim, added up in float32 at least; no host sync."""
    parameters = list(parameters)
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads, 2, dtype=wide(grads[0].dtype))
    return summed(torch.linalg.vector_norm(torch.stack(norms)), parameters)


def master(w: Tensor, block: dict[str, Tensor]) -> Tensor:
    """The float32 weights: w itself, a copy of a bfloat16 w, or its 16 bits and the rest below them."""
    if "rest" not in block:
        return w.float()
    return ((w.view(torch.int16).int() << 16) + block["rest"]).view(torch.float32)


def split_master(x: Tensor) -> tuple[Tensor, Tensor]:
    """(the nearest bfloat16, int16 difference of the bits) of finite float32; `master` puts them together."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Finite float32 x to one of its two neighbours in bfloat16, the likelier the nearer: E = x.

    Random 16 bits are added below the bits that stay.
    """
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def _put(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    target.copy_(value if ok is None else torch.where(ok, value, target))


def _blocks(a: Tensor) -> tuple[Tensor, ...]:
    return local(a).reshape(-1).split(BLOCK)
