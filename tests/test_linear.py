"""A linear layer as one operation: gradients, what is kept, and refusals."""

import pytest
import torch
import torch.nn.functional as F

from prfl_kernels.linear import linear
from prfl_kernels.sublayers.products import LowRank

F64 = torch.float64
SHAPES = {"bias": ((2, 3, 5), (4, 5), (4,)), "alone": ((3, 5), (4, 5)), "groups": ((2, 3, 5), (2, 4, 5))}


@pytest.mark.parametrize("name", SHAPES)
def test_gradcheck(name):
    inputs = [torch.randn(s, dtype=F64, requires_grad=True) for s in SHAPES[name]]
    assert torch.autograd.gradcheck(linear, inputs)


def test_gradcheck_of_an_update():
    shapes = (2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)
    inputs = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]

    def run(x, w, b, down, up):
        return linear(x, w, b, LowRank(down, up, 0.5))

    x, w, b, down, up = inputs
    torch.testing.assert_close(run(*inputs), F.linear(x, w + 0.5 * up @ down, b))
    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_have_the_dtypes_of_their_tensors_and_no_weight_is_kept_as_a_copy():
    x, w, b = torch.randn(3, 5).bfloat16(), torch.randn(4, 5), torch.randn(4)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: held.append(a) or a, lambda a: a):
        y = linear(x.requires_grad_(), w.requires_grad_(), b.requires_grad_())
    assert y.dtype == torch.bfloat16
    assert {a.data_ptr() for a in held} <= {a.data_ptr() for a in (x, w, b)}
    made = torch.autograd.grad(y.sum(), (x, w, b))
    assert [a.dtype for a in made] == [a.dtype for a in (x, w, b)]
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda a: held.append(a) or a, lambda a: a):
        linear(x, w.detach(), b.detach())
    assert x.data_ptr() not in {a.data_ptr() for a in held}  # frozen


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((3, 5), (4, 6)), r"got weight \[4, 6\], want \[4, 5\]"),
        (((3, 5), (2, 4, 5)), r"got x \[3, 5\], want \[G, M, K\]"),
        (((2, 3, 5), (2, 4, 5), (4,)), "want it alone"),
        (((3, 5), (4, 5), (5,)), r"got bias \[5\], want \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(shapes, message):
    with pytest.raises(ValueError, match=f"^linear: .*{message}"):
        linear(*(torch.randn(s) for s in shapes))
    low = LowRank(torch.randn(2, 6), torch.randn(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"^linear: got A \[2, 6\], want \[2, 5\]"):
        linear(torch.randn(3, 5), torch.randn(4, 5), None, low)


def test_the_gradients_of_an_update_that_is_not_there_are_empty():
    """As the shapes under torch.compile say."""
    d, x, weight = torch.randn(5, 4), torch.randn(5, 3), torch.randn(4, 3)
    made = torch.ops.prfl.linear_backward(d, x, weight, None, None, None, 1.0, True, True, True)
    assert [a.shape for a in made] == [(5, 3), (4, 3), (0,), (0,), (0,)]
