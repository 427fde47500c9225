"""Triton kernels for the parts of a block that PyTorch's own operations leave slow, each beside its definition.

Every kernel has a plain function that says what it computes (`attention`), and one of the same arguments that uses the
kernel where it runs and the plain function elsewhere (`fused_attention`): on CPUs, cards of compute capability below
8, without Triton, for other dtypes and for shapes that it does not handle. `available` says which it is for a device.

The kernels are operators of PyTorch (`skipdit::...`), so `torch.compile` keeps them in its graph, and gradients flow
through them, once: they have no second derivative.
"""

from .attention import attention, fused_attention
from .dispatch import available
from .float8 import Float8Linear, float8_available
from .mlp import fused_linear_gelu, linear_gelu
from .norm import (
    fused_gate_residual,
    fused_gate_residual_norm,
    fused_norm_modulate,
    gate_residual,
    gate_residual_norm,
    norm_modulate,
)

KERNELS = ("attention", "norm", "mlp")
"""Names by which `skipdit.models` turns them on."""

__all__ = [
    "KERNELS",
    "Float8Linear",
    "attention",
    "available",
    "float8_available",
    "fused_attention",
    "fused_gate_residual",
    "fused_gate_residual_norm",
    "fused_linear_gelu",
    "fused_norm_modulate",
    "gate_residual",
    "gate_residual_norm",
    "linear_gelu",
    "norm_modulate",
]
