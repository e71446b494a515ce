"""Working through the tokens of a sequence in pieces, so that what is made on the way is never whole.

A sublayer names its pieces once and runs the same function on each; with one piece nothing is copied.
"""

from collections.abc import Callable, Sequence

from torch import Tensor


def check_chunk(chunk: int | None) -> None:
    """Raise ValueError unless chunk is None or a number of tokens from 1 on."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: got {chunk}, want a number of tokens from 1 on, or None")


def pieces(x: Tensor, chunk: int | None) -> list[slice]:
    """The tokens of x [B, L, ...] in order, in slices of at most `chunk` tokens of the whole batch (but one
    of every sample at least); one slice of all of them if chunk is None or large enough."""
    batch, length = x.shape[:2]
    step = length if chunk is None else max(1, chunk // max(1, batch))
    if step >= length:
        return [slice(0, length)]
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def within(boundary: int, at: slice) -> int:
    """The boundary of a sequence as one of the tokens `at`."""
    return min(max(boundary - at.start, 0), at.stop - at.start)


def numbers(a: Tensor, at: slice) -> Tensor:
    """The piece of numbers a token [n, B, L], contiguous as kernels take them."""
    return a[:, :, at].contiguous()


def together(
    run: Callable[[slice], Sequence[Tensor | None]], found: list[slice], axes: Sequence[int]
) -> list[Tensor | None]:
    """The results of run(piece) of all pieces as whole tensors: axes gives the token axis of each result.

    A result that is None for one piece is None for all. Those of one piece are returned as they are.
    """
    if len(found) == 1:
        return list(run(found[0]))
    wholes: list[Tensor | None] = [None] * len(axes)
    for at in found:  # no name is bound to the results: they would outlive their piece
        wholes = [
            _put(whole, part, at, found[-1].stop, axis)
            for whole, part, axis in zip(wholes, run(at), axes, strict=True)
        ]
    return wholes


def _put(whole: Tensor | None, part: Tensor | None, at: slice, length: int, axis: int) -> Tensor | None:
    if part is None:
        return None
    if whole is None:
        shape = list(part.shape)
        shape[axis] = length
        whole = part.new_empty(shape)
    whole.narrow(axis, at.start, at.stop - at.start).copy_(part)
    return whole
