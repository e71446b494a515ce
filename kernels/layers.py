"""Our operations as layers in the form of Hugging Face's `kernels` package, for `kernelize`.

A layer of that form has a forward and no state: it reads the module whose forward it replaces. Of our
operations one alone has the borders of a module, the RMSNorm of queries and keys over the whole width; the
fused sublayers go across several modules of a block, and are for prfl_engine.patch. The form:
https://huggingface.co/docs/kernels, section "Layers".
"""

from torch import Tensor, nn

from prfl_kernels.qk_norm_rope.op import rms_norm


class RMSNorm(nn.Module):
    """x [..., C] over the root of its mean square, times the module's `weight` [C], computed in float32, in
    the dtype of x. The module has `variance_epsilon` (transformers) or `eps`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] of [..., C]."""
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        x = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        return rms_norm(x, self.weight, eps).view(hidden_states.shape)


class Repository:
    """What `kernels.register_kernel_mapping` takes for a layer of ours, in place of one of the Hub."""

    def __init__(self, layer: type[nn.Module]):
        self.layer, self.layer_name = layer, layer.__name__

    def load(self) -> type[nn.Module]:
        """The layer's class."""
        return self.layer
