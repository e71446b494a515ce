"""Products of matrices by the fastest that torch has for the processor.

That is torch's own, with one exception. torch's float32 products on x86 are MKL's, whose AVX-512 code runs
on Intel's processors alone. On AMD's they go to oneDNN, which comes with torch too, from LEAST
multiplications on. One thread of an AMD EPYC of Zen 5, GFLOP/s of torch and of oneDNN
(benchmarks/bench_matmul.py):

    M x K x N             y           dx          dW
    832 x 128 x 512       88, 159     85, 158     84, 100
    1080 x 1536 x 1536    102, 218    102, 192    103, 178
    1080 x 1536 x 8960    93, 195     102, 160    99, 146
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl_kernels import processor
from prfl_kernels.compiling import constant

LEAST = 2**22  # multiplications; smaller products take as long or longer in oneDNN


@constant  # of the machine, not of the tensors
def choice() -> tuple[bool, str]:
    """(whether large float32 products on the CPU go to oneDNN, why)."""
    if processor.vendor() != "AuthenticAMD":
        return False, "the processor is not AMD's"
    if not torch.backends.mkl.is_available():
        return False, "torch's float32 products are not MKL's"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False, "torch has no oneDNN"
    return True, "the processor is AMD's, for which MKL has no AVX-512"


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, in float32 on the CPU: the operation that torch.compile makes of a linear layer."""
    # For a matrix with gaps between its rows oneDNN has no fast code: 128 x 32 x 512 took 46 ms.
    dense = weight.is_contiguous() or weight.mT.is_contiguous()
    weight = weight if dense else weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(a: Tensor, multiplications: int) -> bool:
    large = multiplications >= LEAST and a.dtype == torch.float32 and a.device.type == "cpu"
    return large and torch.backends.mkldnn.enabled and choice()[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., K], weight [N, K] and bias [N] or None of one dtype. Without gradient."""
    if x.dim() > 2 and not x.is_contiguous():
        # torch would copy W for every sample: [64, 12, 512] by [128, 512] took 5.4 ms in bfloat16, not 0.5.
        x = x.contiguous()
    if _by_onednn(x, x.numel() * len(weight)):
        return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, for [M, K] [K, N] or [B, M, K] [B, K, N]. Without gradient.

    Of one sample as a plain product: up to 1.6 times as fast as torch's batched one, in bfloat16 on the CPU.
    """
    if a.dim() == 3:
        return product(a[0], b[0])[None] if len(a) == 1 else a @ b
    by_onednn = _by_onednn(a, a.numel() * b.shape[1])
    return onednn(a, b.mT) if by_onednn else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b, in place; returns total. Shapes as for `product`. Without gradient.

    By torch everywhere: oneDNN's would take memory for the product besides.
    """
    return (total.addmm_ if a.dim() == 2 else total.baddbmm_)(a, b)
