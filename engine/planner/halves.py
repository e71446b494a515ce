"""Guided steps with gradient whose two halves both have one and are forwards of their own.

The half without the prompt comes first, and both save their activations. Backward begins with the half with
the prompt. Autograd holds its gradients of weights until it has those of the other half, and adds up both.
So a dry run has two passes, and their numbers make those of the step, at whose last block both halves have
saved all, and those of its other half, in whose backward the gradients of all blocks are held.
"""

from prfl_engine.config_method import scales
from prfl_engine.planner.meta import meta_tensors
from prfl_engine.planner.models import generator
from prfl_engine.planner.numbers import BLOCKS, Numbers
from prfl_engine.planner.setup import Setup, rounded

OTHER = {"graded step": "other half", "window": "other half of a window"}
"""The half without the prompt, by the pass of the half with it."""


def apart(setup: Setup) -> bool:
    """Whether graded steps have such halves."""
    c = setup.chain
    guided = scales(c.guidance) != (1, 1) and c.unconditional == "gradient"
    return guided and not setup.rollout.guidance_at_once


def both(numbers: dict[str, Numbers], setup: Setup) -> dict[str, Numbers]:
    """The numbers of all passes, of a dry run's as they are for setup.count blocks."""
    if not apart(setup):
        return numbers
    with meta_tensors():
        block = generator(setup, 1).blocks[0]
    gradients, made = sum(rounded(p.nbytes) for p in block.parameters() if p.requires_grad), dict(numbers)
    for name, other in OTHER.items():
        if name not in numbers:
            continue
        n, first = numbers[name], numbers[other]
        there = (BLOCKS - 1) * first.saved + first.saved_last  # in the dry run, before the second begins
        made[name] = n._replace(
            saved=n.saved + first.saved, saved_last=n.saved_last + first.saved_last,
            forward=n.forward + first.saved, forward_last=n.forward_last + first.saved_last,
            backward=n.backward + first.saved, backward_last=n.backward_last + first.saved_last,
            host=n.host + first.host, start=n.start - there,
        )  # fmt: skip
        more = (setup.count - BLOCKS) * gradients
        made[other] = first._replace(
            backward=first.backward + more + gradients, backward_last=first.backward_last + more,
            head=first.head + more,
        )  # fmt: skip
    return made
