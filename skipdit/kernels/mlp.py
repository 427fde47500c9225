"""The MLP's first layer with its activation in the matrix product's epilogue: the hidden tensor is written once.

No kernel of our own: cuBLASLt has this one, and PyTorch offers it as `_addmm_activation`. It is wrapped as an operator
because torch.compile would take it apart again. It has no gradient; training takes the plain way.
"""

import torch
import torch.nn.functional as F

from .dispatch import usable

__all__ = ["fused_linear_gelu", "linear_gelu"]


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x weight^T + bias), the tanh form (Hendrycks & Gimpel 2016); x [..., K], weight [N, K], bias [N]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def fused_linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`linear_gelu` in one operation on CUDA devices while no gradient is wanted."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return linear_gelu(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):  # casts that an operator of our own does not get
        return linear_gelu(x, weight, bias)
    mixed = "" if x.dtype == weight.dtype == bias.dtype else "they differ in dtype"
    if not usable("mlp", x, weight, bias, obstacle=mixed):
        return linear_gelu(x, weight, bias)
    return _linear_gelu(x, weight, bias)


@torch.library.custom_op("skipdit::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    hidden = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return hidden.view(*x.shape[:-1], weight.shape[0])


@_linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
