"""What tests of e4m3 share: how far a rounded value may be from what it stands for.

Bounds are derived, not tuned. Rounding a value to e4m3 moves it by at most 2^-4 of itself (3 bits
behind the point) or, below the smallest normal number, by 2^-10; a bfloat16 result by 2^-8 of itself.
An instruction of Hopper's tensor cores adds 32 products and its accumulator cut to 14 bits, 4 of them
before float32: 4 * 33 * 2^-13 < 2^-5 of the sum of the magnitudes.
"""

import torch
from fused import DEVICE

E4M3 = torch.float8_e4m3fn
INSTRUCTION = 2**-5 if DEVICE == "cuda" else 0.0
# Without test_schema, which compares with torch.allclose, and that does not know e4m3.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def rounding(values, scales):
    """How far e4m3 with these scales may be from `values`."""
    return (2**-4 * values.abs() + 2**-10 * scales) * (1 + 2**-20)


def assert_rounded(out, scale, want):
    """out times scale is `want` up to `rounding`, and to float32's; a row's largest value is 448, a row of
    zeros has scale 1."""
    assert out.dtype == E4M3 and out.shape == want.shape
    assert scale.dtype == torch.float32 and scale.shape == want.shape[:-1]
    values, want, scales = out.double(), want.double(), scale[..., None].double()
    assert ((values * scales - want).abs() <= rounding(want, scales) * (1 + 2**-12)).all()
    largest, some = values.abs().amax(-1), want.abs().amax(-1) > 0
    assert (largest[some] == 448).all() and (scale[~some] == 1).all() and not largest[~some].any()
