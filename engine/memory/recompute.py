"""Runs transformer blocks under policies: what a block saves for its backward, offloads, or recomputes.

The intermediates of a block, in the order in which they are computed (L tokens, C width, F FFN width, H
heads):

    input              the residual stream before the block                            L C, its own dtype
    normed             what the projections of self-attention read                     L C
    projections        q and k before their norm, v                                  3 L C
    rotated            q and k after norm and rotation                               2 L C
    attention          output of self-attention and its log-sum-exp                    L C + L H float32
    after_attention    the residual stream after self-attention                        L C, its own dtype
    cross_normed       what the queries of cross-attention read                        L C
    cross_projections  those queries before their norm                                 L C
    cross_queries      and after it                                                    L C
    cross_attention    output of cross-attention and its log-sum-exp                   L C + L H float32
    after_cross        the residual stream after cross-attention                       L C, its own dtype
    ffn_normed         what the FFN reads                                              L C
    hidden             its hidden layer before the GELU                                L F

Each is saved on the device, offloaded to the host, or recomputed in backward. The input cannot be recomputed.

A block has one autograd graph of three operations, the sublayers. Every tensor that autograd saves for them
is replaced by a slot. When backward reads a slot, its tensor is returned from the device, copied back from
the host, or recomputed by running the sublayer that produced it once more. Parts inside a sublayer are
recomputed by its own backward; a residual-stream tensor that is neither saved nor offloaded needs a rerun of
the sublayer before it, and the rerun also supplies that sublayer's inner parts. The FFN is the last sublayer,
so its forward is never rerun (a checkpoint of the whole block reruns it).

A user's own torch.utils.checkpoint around a Block works too, also with selective contexts: its policy sees
torch.ops.prfl.modulated_attention, cross_attention and modulated_ffn, and an operation that it saves is not
rerun. Attention is inside of these; torch.ops.prfl.attention is seen only where it is called alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prfl_engine.memory.host import HostTensor, store_of
from prfl_engine.memory.policy import BETWEEN, INNER, BlockPolicy
from prfl_engine.model.layers import Block
from prfl_engine.model.wan import RunBlocks, plain_blocks
from prfl_kernels.qk_norm_rope.rope import Grid


def run_under(
    policies: BlockPolicy | Sequence[BlockPolicy], watch: Callable[[], Callable[[Tensor], None]] | None = None
) -> RunBlocks:
    """A `RunBlocks` with gradient: each block under its own policy, or all under one.

    The last block offloads nothing, because its backward comes first. What a block offloads has left the
    device by the end of the next block's forward. The backward of a block starts to fetch what the block
    before it has offloaded. watch() is called when blocks begin to run; the function that it returns is
    called with the tokens before every block and after the last one. Without gradient the blocks run plainly.
    """

    def run(
        blocks: Sequence[Block], tokens: Tensor, e: Tensor, context: Tensor, repeats: int, grid: Grid
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return plain_blocks(blocks, tokens, e, context, repeats, grid)
        found = [policies] * len(blocks) if isinstance(policies, BlockPolicy) else policies[: len(blocks)]
        found = [*found[:-1], *(policy.staying() for policy in found[-1:])]
        border = None if watch is None else watch()
        before = None
        for block, policy in zip(blocks, found, strict=True):
            if border is not None:
                border(tokens)
            tokens, before = run_block(block, policy, before, tokens, e, context, repeats, grid)
        if border is not None:
            border(tokens)
        return tokens

    return run


def run_block(
    block: Block,
    policy: BlockPolicy,
    before: "Run | None",
    tokens: Tensor,
    e: Tensor,
    context: Tensor,
    repeats: int,
    grid: Grid,
) -> tuple[Tensor, "Run | None"]:
    """A block with gradient under its policy, after a block that ran as `before`: (the tokens after it, its
    run, None without a backward). What the block before has offloaded has left the device then."""
    this = Run(policy, before)
    if not policy.offload and (before is None or not before.policy.offload):
        tokens = block(tokens, e, context, repeats, grid, this)
    else:
        store = store_of(tokens.device)
        batches = store.batches
        tokens = block(tokens, e, context, repeats, grid, this)
        store.release(store.batches - batches)
    return tokens, this if this.active else None


class _Slot:
    """Replaces, in the graph, a tensor that an operation saved."""

    __slots__ = ("run", "sublayer", "index", "name", "value", "view")

    def __init__(self, run: "Run", sublayer: str, index: int, value: Tensor):
        self.run, self.sublayer, self.index, self.name, self.value = run, sublayer, index, "", value
        self.view = value.shape, value.stride()


def _unpack(slot: "_Slot | Tensor") -> Tensor:
    return slot.run.get(slot) if isinstance(slot, _Slot) else slot


class Run:
    """One forward of a block under a policy (a `BlockRun`), and what its backward needs; the block's graph
    owns it."""

    def __init__(self, policy: BlockPolicy, before: "Run | None" = None):
        """before: the run of the previous block, whose offloaded tensors this one starts to fetch."""
        self.policy, self.before, self.active = policy, before, False

    def __call__(
        self, block: Block, x: Tensor, e: Tensor, context: Tensor, repeats: int, grid: Grid
    ) -> Tensor:
        """x' [B, L, C]. A block without a backward (frozen, with no trained parameter before it) saves
        nothing."""
        if self.policy.plain or not any(a.requires_grad for a in (x, e, context, *block.parameters())):
            return block.compute(x, e, context, repeats, grid, self.policy.saves)
        self.active, self.block, self.grid, self.context, self.repeats = True, block, grid, context, repeats
        self.vectors = block.vectors(e)
        # No tensor here has a graph: that of this block would hold itself.
        self.between: dict[str, Tensor | HostTensor] = {"input": x.detach()}
        # Which inputs take gradient decides what layers save, so a rerun asks for the same ones.
        self.graded = {"attend": x.requires_grad}
        self.attention: list[Tensor | HostTensor] = []  # output and log-sum-exp of self-attention, if saved
        self.rerun_saves: dict[tuple[str, int], Tensor] = {}  # what the rerun of a sublayer has saved
        self.made: dict[str, Tensor] = {}  # residual-stream tensors that were recomputed
        self.offloaded: list[HostTensor] = []
        self._known = self._inputs()
        saved = self.policy.saved
        self.reruns = {"attend": "after_attention" not in saved, "feed": False}
        # Layers that run one by one save everything: where nothing is to be saved, they are rerun.
        whole = block.cross_attn.fused or any(name in saved for name, _, _ in INNER["cross"])
        self.reruns["cross"] = "after_cross" not in saved or not whole
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        """The block's result; what each sublayer saved is kept, offloaded or dropped before the next one
        runs."""
        saves = self.policy.saves
        (after, n, _), slots = self._watched("attend", self._attend, x, saves.attend)
        self.graded["cross"] = n.requires_grad
        self.between |= {"after_attention": after.detach(), "cross_normed": n.detach()}
        places = {a.untyped_storage()._cdata: name for name, a in self.between.items()}
        self._dispose("attend", slots, places)
        self.attention = [s.value for s in slots if s.name == "attention" and s.value is not None]
        y, slots = self._watched("cross", self._cross, n, saves.cross)
        self._dispose("cross", slots, places)
        del n
        self.between = {k: a for k, a in self.between.items() if k in self.policy.saved}
        out, slots = self._watched("feed", self.block.feed, after, y, self.vectors, self.grid, saves.feed)
        self._dispose("feed", slots, {})
        return out

    def _inputs(self) -> set[int]:
        """The storages of what a block reads and does not make; those of its weights may be others in
        backward (memory.frozen)."""
        known = (self.context, *self.vectors, *self.block.parameters())
        return {a.untyped_storage()._cdata for a in known}

    def _attend(self, x, keep, attention=None):
        return self.block.attend(x, self.vectors, self.grid, keep, attention)

    def _cross(self, n, keep):
        return self.block.cross_attn(n, self.context, self.repeats, keep)

    def _watched(self, sublayer: str, call: Callable, *arguments) -> tuple:
        """(what a sublayer returns, a slot for every tensor that its graph saves)."""
        slots: list[_Slot] = []

        def pack(a: Tensor) -> "_Slot | Tensor":
            if a.untyped_storage()._cdata in self._known:
                return a
            slots.append(_Slot(self, sublayer, len(slots), a.detach()))
            return slots[-1]

        with saved_tensors_hooks(pack, _unpack):
            made = call(*arguments)
        tail = [name for name, _, count in INNER[sublayer] for _ in range(count)]
        if sublayer == "cross" and not self.block.cross_attn.fused:
            tail = []  # tensors that separate layers save have no names
        if sublayer == "feed" and slots:
            slots[0].name = "after_cross"
        for slot, name in zip(reversed(slots), reversed(tail), strict=False):
            slot.name = name
        return made, slots

    def _dispose(self, sublayer: str, slots: list[_Slot], places: dict[int, str]) -> None:
        """Keep, offload or drop what a sublayer has saved; places: names of residual-stream tensors by
        storage."""
        saved, offload, leaving = self.policy.saved, self.policy.offload, []
        for slot in slots:
            if slot.value.numel():
                slot.name = places.get(slot.value.untyped_storage()._cdata, slot.name)
            if slot.name == "after_cross" and slot.name in saved:
                self.between[slot.name] = slot.value
            forgotten = slot.name not in saved or not slot.value.numel()
            if slot.name in BETWEEN or (self.reruns[sublayer] and forgotten):
                slot.value = None
            elif slot.name in offload and slot.value.numel():
                leaving.append(slot)
        between = [k for k in self.between if k in offload and isinstance(self.between[k], Tensor)]
        if not leaving and not between:
            return
        store = store_of(self.context.device)
        offloaded = store.put([*(slot.value for slot in leaving), *(self.between[k] for k in between)])
        for slot, a in zip(leaving, offloaded, strict=False):
            slot.value = a
        self.between |= dict(zip(between, offloaded[len(leaving) :], strict=True))
        self.offloaded += offloaded

    def fetch(self) -> None:
        """Start to copy back what is on the host."""
        for a in self.offloaded:
            a.fetch()
        self.offloaded = []

    def get(self, slot: _Slot) -> Tensor:
        """The tensor of `slot`, for the backward."""
        self.fetch()
        if self.before is not None:
            self.before.fetch()
            self.before = None
        if slot.name in BETWEEN:
            value = self._between(slot.name)
            self.made.pop(slot.name, None)  # no later slot needs it
            return value if value.shape == slot.view[0] else value.as_strided(*slot.view)
        if slot.value is not None:
            return _here(slot.value)
        key = slot.sublayer, slot.index
        if key not in self.rerun_saves:
            self._rerun(slot.sublayer)
        return self.rerun_saves.pop(key)

    def _between(self, name: str) -> Tensor:
        if name in self.between:
            return _here(self.between[name])
        if name == "cross_normed" and "after_attention" in self.between:
            return self.block.cross_input(self._between("after_attention")).detach()
        if name == "after_cross":
            if "cross" not in self.made:
                self._rerun("cross")
            x = self._between("after_attention")
            return (x + self.made.pop("cross")).to(x.dtype)
        if name not in self.made:
            self._rerun("attend")
        return self.made[name]

    def _rerun(self, sublayer: str) -> None:
        """Rerun a sublayer for what it saves and returns."""
        found: list[Tensor] = []
        known = self._inputs()

        def pack(a: Tensor) -> int:
            if a.untyped_storage()._cdata not in known:
                found.append(a.detach())  # a result refers to its graph, which refers to this function
            return 0  # never read: this graph has no backward

        # Outside of the hooks: cross-attention's input may have to be recomputed, by a norm that saves too.
        x = self._between("input" if sublayer == "attend" else "cross_normed").detach()
        x.requires_grad_(self.graded[sublayer])
        with torch.enable_grad(), saved_tensors_hooks(pack, _unpack):
            if sublayer == "attend":
                given = [_here(a) for a in self.attention] or None
                made = self._attend(x, self.policy.rerun, given)
                self.made |= {"after_attention": made.x.detach(), "cross_normed": made.n.detach()}
            else:
                self.made["cross"] = self._cross(x, self.policy.rerun).detach()
        between = {a.untyped_storage()._cdata for a in (x, *self.made.values())}
        self.rerun_saves |= {
            (sublayer, i): a for i, a in enumerate(found) if a.untyped_storage()._cdata not in between
        }


def _here(a: Tensor | HostTensor) -> Tensor:
    return a.get() if isinstance(a, HostTensor) else a
