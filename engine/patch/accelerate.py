"""accelerate and restore: every block of a transformer gets a forward that runs our sublayers.

The forward is an attribute of the block itself, so its class, parameters, state dict and hooks, and wrappers
of its call (checkpointing, FSDP) know nothing of it. It reads the block's layers in every call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from prfl_engine.errors import UserError, check, refusing
from prfl_engine.memory.policy import BlockPolicy, named
from prfl_engine.memory.recompute import Run, run_block
from prfl_engine.model.layers import Block
from prfl_engine.patch.block_cache import BlockCache
from prfl_engine.patch.diffusers_wan import Diffusers
from prfl_engine.patch.fastvideo import FastVideo
from prfl_engine.patch.layers import Replacement, complaint, hooked, sharded
from prfl_engine.patch.memo import Memo
from prfl_engine.patch.official import Official
from prfl_engine.patch.probe import probe
from prfl_engine.patch.report import Report
from prfl_engine.patch.structure import Structure, unwrapped
from prfl_engine.patch.view import BlockView, Call, Parts, compute_dtype
from prfl_engine.rollout.fp8 import Fp8Block, check_widths
from prfl_kernels.sublayers.chunks import check_chunk

PATCH = "_prfl_patch"
STRUCTURES: tuple[Structure, ...] = (Diffusers(), Official(), FastVideo())


class Patch:
    """What the blocks of a patched transformer share; its attribute PATCH."""

    def __init__(self, report: Report, structure: Structure):
        self.report, self.structure, self.memo = report, structure, Memo()
        self.plain, self.saves = report.policy.plain, report.policy.saves  # torch.compile reads no properties
        self.before: Run | None = None  # of the block before, while a forward runs
        self.cache: BlockCache | None = None  # inside `step_cache`

    def __getstate__(self) -> dict:
        return vars(self) | {"before": None, "cache": None}


class Forward(Replacement):
    """The forward of a patched block."""

    def __init__(self, block: nn.Module, patch: Patch, place: int):
        self.module, self.patch, self.original = block, patch, type(block).forward
        self.place = place == 0, place == patch.report.blocks - 1  # the first block? the last one?
        self.fp8: Fp8Block | None = None  # runs the block without gradient, inside `fp8`

    def __call__(self, *args, **kwargs) -> Tensor:
        """What the block's own forward returns for its own arguments."""
        block, structure, report = self.module, self.patch.structure, self.patch.report
        call, parts = structure.bind(block, self.patch.memo, *args, **kwargs), structure.parts(block)
        why = call if isinstance(call, str) else hooked(block) or structure.complaint(block) or _unread(parts)
        report.note(why)
        if why is not None:
            if self.patch.cache is not None and not torch.is_grad_enabled():
                raise UserError(f"step_cache: got a call for the original code ({why}), want one for ours")
            args, kwargs = structure.unpatched(args, kwargs)
            # FSDP2 changes the class; torch.compile cannot follow the attribute of one.
            original = self.original if torch.compiler.is_compiling() else type(block).forward
            return original(block, *args, **kwargs)
        return self._run(call, parts)

    def _run(self, call: Call, parts: Parts) -> Tensor:
        x, e, context, grid, image_tokens = call
        dtype = compute_dtype(x, parts.attention.q.weight)
        view = BlockView(self.module, parts, dtype, image_tokens, self.patch.report.chunk)
        if torch.is_grad_enabled() and not self.patch.plain:
            return self._under_policy(view, x, e, context, 1, grid)
        arguments = x, e, context, 1, grid
        if torch.is_grad_enabled() or (self.fp8 is None and self.patch.cache is None):
            return view.compute(*arguments, self.patch.saves)
        if any(a.requires_grad for a in (x, e, context)):
            raise UserError(
                "fp8 and step_cache: got inputs of a block that require gradient while none is enabled, as "
                "checkpointing with use_reentrant=True gives; want use_reentrant=False, or no checkpointing"
            )

        def run() -> Tensor:
            if self.fp8 is not None:
                return view(*arguments, self.fp8)
            return view.compute(*arguments, self.patch.saves)

        if self.patch.cache is None:
            return run()
        return self.patch.cache(self.place, x, lambda: view.attention_input(x, e, grid), run)

    def _under_policy(self, view: BlockView, *arguments) -> Tensor:
        """A block with gradient, as memory.recompute runs a row of them: the last one offloads nothing."""
        patch, (first, last) = self.patch, self.place
        policy, before = patch.report.policy, None if first else patch.before
        tokens, this = run_block(view, policy.staying() if last else policy, before, *arguments)
        patch.before = None if last else this
        return tokens


def _unread(parts: Parts) -> str | None:
    """Why the layers of a block cannot be read in a call."""
    for m in parts.linears():
        found = "it is sharded inside of the block" if sharded(m) else complaint(m)
        if found:
            return f"a linear layer: {found}"
    return None


def accelerate(
    model: nn.Module,
    recompute: str | BlockPolicy = "none",
    keep: str = "all",
    chunk: int | None = None,
) -> Report:
    """Let the blocks of a Wan transformer compute by our operations, forward and backward.

    model is a transformer of Wan2.1, Wan2.2, HY-Video-PRFL, VideoX-Fun, diffusers or FastVideo, or a module
    with one in it. recompute and keep are what a block saves for its backward, as model.recompute and
    model.keep of a configuration, and chunk the tokens that a sublayer works on at a
    time. Returns what was replaced. Products run in autocast's dtype where it is on, else in that of the
    weights; norms, modulation and rotation in float32.

    Raises UserError, and has changed nothing, for a transformer that is not known or has something our code
    does not do (quantised weights, hooks inside of blocks, sparse attention, another rope, ...), for a block
    that does not compute what ours computes, and for settings that are not known.
    """
    with refusing("accelerate"):
        policy = named(recompute, keep) if isinstance(recompute, str) else recompute
        check_chunk(chunk)
    check(isinstance(policy, BlockPolicy), "recompute", policy, "a name or a BlockPolicy")
    owner = _transformer(model)
    blocks = {f"blocks.{i}": unwrapped(block) for i, block in enumerate(owner.blocks)}
    structure = _structure(type(owner).__name__, next(iter(blocks.values())))
    for name, block in blocks.items():
        if found := _refusal(block, structure):
            raise UserError(f"{name}: {found}")
    if found := structure.model_complaint(owner):
        raise UserError(f"{type(owner).__name__}: {found}")
    probed = set()
    for name, block in blocks.items():
        kind = type(block), tuple((k, tuple(p.shape)) for k, p in block.named_parameters())
        if kind not in probed:
            probe(name, block, structure)
            probed.add(kind)
    kept = tuple(name for name, m in owner.named_children() if name != "blocks" and [*m.parameters()])
    first = type(next(iter(blocks.values()))).__name__
    patch = Patch(Report(structure.name, first, len(blocks), kept, policy, chunk), structure)
    for place, block in enumerate(blocks.values()):
        block.forward = Forward(block, patch, place)
    for m, forward in structure.others(owner, patch.memo).items():
        m.forward = forward
    setattr(owner, PATCH, patch)
    return patch.report


def _transformer(model: nn.Module) -> nn.Module:
    """The one module with a list of blocks."""
    # Not hasattr: wrappers hand on the attributes of what they wrap.
    lists = ((m, m._modules.get("blocks")) for m in model.modules())
    found = [m for m, blocks in lists if isinstance(blocks, nn.ModuleList) and len(blocks)]
    if len(found) != 1:
        kind = type(model).__name__
        raise UserError(f"model: got a {kind} with {len(found)} lists of blocks, want one Wan transformer")
    return found[0]


def _structure(name: str, block: nn.Module) -> Structure:
    if isinstance(block, Block):
        raise UserError(f"{name}: it is ours, and runs our operations already")
    if isinstance(block, FullyShardedDataParallel):
        raise UserError(f"{name}: its blocks are FSDP1 units; call accelerate before FSDP wraps the model")
    for structure in STRUCTURES:
        if structure.matches(block):
            return structure
    known = "; ".join(structure.name for structure in STRUCTURES)
    raise UserError(f"{name}: its blocks {type(block).__name__} are none that is known; want {known}")


def _refusal(block: nn.Module, structure: Structure) -> str | None:
    """Why our code would not compute what this block computes, as far as its parts show it."""
    if isinstance(block, FullyShardedDataParallel) or not structure.matches(block):
        return f"it is a {type(block).__name__} without the parts of {structure.name}"
    if isinstance(vars(block).get("forward"), Forward):
        return "it is accelerated already; restore(model) undoes that"
    if "forward" in vars(block):
        return "its forward was replaced (offloading, caching); call accelerate before"
    for name, m in block.named_modules():
        if m is not block and isinstance(m, FSDPModule | FullyShardedDataParallel):
            return f"{name}: it is an FSDP unit inside of a block; want whole blocks as units"
        if isinstance(m, nn.Dropout) and m.p > 0 and "lora_dropout" not in name:
            return f"{name}: it drops values out (p = {m.p})"
    try:
        parts = structure.parts(block)
    except (AttributeError, IndexError) as error:
        return f"it is not as in {structure.name}: {error}"
    if found := hooked(block) or structure.complaint(block):
        return found
    names = {id(m): name for name, m in block.named_modules()}
    for m in parts.linears():
        if found := complaint(m):
            return f"{names[id(m)]}: {found}"
    return _unfit(block, parts, names)


def _unfit(block: nn.Module, parts: Parts, names: dict[int, str]) -> str | None:
    """What is wrong with norms and shapes, and what is left over."""
    width = parts.modulation.shape[2]
    for m in parts.norms():
        name, weight = names[id(m)], getattr(m, "weight", None)
        if weight is None or tuple(weight.shape) != (width,):
            return f"{name}: it is no norm over {width} channels with a weight"
        eps = getattr(m, "eps", getattr(m, "variance_epsilon", None))
        if eps != parts.eps:
            return f"{name}: its eps is {eps}, that of the first norm {parts.eps}"
    if parts.norm.bias is None or width % (2 * parts.heads):
        return f"{width} channels in {parts.heads} heads, and a norm before cross-attention without bias"
    known = {id(p) for m in (*parts.linears(), *parts.norms()) for p in m.parameters()}
    known.add(id(parts.modulation))
    more = [name for name, p in block.named_parameters() if id(p) not in known]
    more += [name for name, _ in block.named_buffers()]
    more = [name for name in more if "norm_added_q" not in name]  # in old checkpoints; nothing reads it
    return f"{', '.join(more)}: our block has nothing like it" if more else None


def report_of(model: nn.Module) -> Report:
    """The report of a patched transformer; a copy of a model has one of its own. UserError without one."""
    found = [m for m in model.modules() if PATCH in vars(m)]
    if len(found) != 1:
        raise UserError(f"model: got {len(found)} patched transformers, want one")
    return vars(found[0])[PATCH].report


def restore(model: nn.Module) -> None:
    """Undo accelerate and fast_reward_pool in all modules of a model. UserError, with nothing changed, where
    something has replaced the forward of a block since."""
    owners = [m for m in model.modules() if PATCH in vars(m)]
    for owner in owners:
        there = sum(isinstance(vars(m).get("forward"), Forward) for m in owner.modules())
        if (want := len(owner.blocks)) != there:
            name = type(owner).__name__
            raise UserError(
                f"{name}: {want - there} of {want} blocks had their forward replaced since; undo that first"
            )
    for m in model.modules():
        if isinstance(vars(m).get("forward"), Replacement):
            del m.forward
    for owner in owners:
        delattr(owner, PATCH)


@contextmanager
def fp8(model: nn.Module) -> Iterator[None]:
    """Inside a with block the blocks of a patched model run in e4m3 where no gradient is enabled, as
    rollout.precision fp8 does (prfl_engine.rollout.fp8). The weights are those at its beginning.

    Raises UserError for heads or widths that e4m3 products do not take, and for sharded weights.
    """
    report_of(model)
    blocks = [f for m in model.modules() if isinstance(f := vars(m).get("forward"), Forward)]
    for forward in blocks:
        parts = forward.patch.structure.parts(forward.module)
        if isinstance(parts.modulation, DTensor):
            raise UserError("fp8: got sharded weights, want whole ones")
        if found := hooked(forward.module) or _unread(parts):
            raise UserError(f"fp8: {found}")
        check_widths(parts.modulation.shape[2], parts.ffn[0].weight.shape[0], parts.heads)
    try:
        for forward in blocks:
            forward.fp8 = _quantized(forward)
        yield
    finally:
        for forward in blocks:
            forward.fp8 = None


@torch.no_grad()
def _quantized(forward: Forward) -> Fp8Block:
    parts = forward.patch.structure.parts(forward.module)
    made = Fp8Block(BlockView(forward.module, parts, torch.bfloat16, 0, None))
    for product in made.products:
        product.quantize()
    return made


@contextmanager
def step_cache(model: nn.Module, threshold: float, steps: int, lanes: int = 1) -> Iterator[BlockCache]:
    """Inside a with block a patched model reuses what its blocks added in an earlier denoising step, where no
    gradient is enabled, as rollout.cache does it (prfl_engine.rollout.step_cache).

    A step is computed when its first modulated input has moved by `threshold` since the last computed one, in
    sum and relative to its size; and the first and the last of `steps` always are. Every forward of the model
    is a step; with lanes = 2 every other one, as where a sampler calls the model with the prompt and without
    it in turn. After `steps` steps the next chain begins. All samples of a batch are computed together.
    Yields the cache, which counts forwards that were `computed` and `reused`.

    Raises UserError for numbers out of range; inside, for calls that the original code would take, for tokens
    whose shape changes within a chain, and for checkpointing with use_reentrant=True.
    """
    report_of(model)
    check(0 < threshold < float("inf"), "threshold", threshold, "a positive number")
    check(steps >= 1, "steps", steps, "at least 1")
    check(lanes >= 1, "lanes", lanes, "at least 1")
    (patch,) = (vars(m)[PATCH] for m in model.modules() if PATCH in vars(m))
    check(patch.cache is None, "model", "a model with a step cache", "one without")
    patch.cache = BlockCache(threshold, steps, lanes)
    try:
        yield patch.cache
    finally:
        patch.cache = None
