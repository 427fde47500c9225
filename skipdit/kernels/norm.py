"""The passes over the hidden states around a block's linear layers: LayerNorm + modulate and gate + residual, fused.

x and y are [B, (F,) P, D]; shift, scale and gate come from the conditioning, [B, (1 or F,) 1, D], any strides with
whole rows: the six chunks of adaLN's output are read where they lie. The kernels compute in float32 and round once.
"""

import torch
import torch.nn.functional as F

from .dispatch import usable
from .tiles import groups_of

__all__ = [
    "MAX_WIDTH",
    "fused_gate_residual",
    "fused_gate_residual_norm",
    "fused_norm_modulate",
    "gate_residual",
    "gate_residual_norm",
    "norm_modulate",
]

MAX_WIDTH = 8192  # one program holds whole rows


# ---------------------------------------------------------------------- definitions


def norm_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm over the last axis and without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def gate_residual(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + gate * y."""
    return x + gate * y


def gate_residual_norm(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum x + gate * y, and its norm, modulated."""
    x = gate_residual(x, gate, y)
    return x, norm_modulate(x, shift, scale, eps)


# ---------------------------------------------------------------------- dispatch


def fused_norm_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`norm_modulate` in one pass where the kernel runs; under autocast in its dtype, as a linear layer wants it."""
    if not usable("norm", x, shift, scale, obstacle=_obstacle(x, shift, scale)):
        return norm_modulate(x, shift, scale, eps)
    return _norm_modulate(x, shift, scale, eps, _dtype_of_linears(x, shift, scale))


def fused_gate_residual(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`gate_residual` in one pass where the kernel runs."""
    if not usable("norm", x, gate, y, obstacle=_obstacle(x, gate) or _unlike(x, y)):
        return gate_residual(x, gate, y)
    return _gate_residual(x, gate, y, _promoted(x, gate, y))


def fused_gate_residual_norm(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_residual_norm` in one pass where the kernel runs."""
    obstacle = _obstacle(x, gate, shift, scale) or _unlike(x, y)
    if not usable("norm", x, gate, y, shift, scale, obstacle=obstacle):
        return gate_residual_norm(x, gate, y, shift, scale, eps)
    dtype = _promoted(x, gate, y)
    return _gate_residual_norm(x, gate, y, shift, scale, eps, dtype, _dtype_of_linears(x, shift, scale))


def _obstacle(x: torch.Tensor, *vectors: torch.Tensor) -> str:
    if x.ndim < 2 or x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} are wider than {MAX_WIDTH}"
    for vector in vectors:
        if vector.shape != vectors[0].shape:
            return "shift, scale and gate differ in shape"
        if vector.ndim != x.ndim or vector.shape[-1] != x.shape[-1] or groups_of(x.shape, vector.shape) is None:
            return "the conditioning is not of shape [B, (1 or F,) 1, D]"
    return ""


def _unlike(x: torch.Tensor, y: torch.Tensor) -> str:
    return "" if x.shape == y.shape else "the two sides of the residual differ in shape"


def _promoted(*tensors: torch.Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _dtype_of_linears(*tensors: torch.Tensor) -> torch.dtype:
    """Autocast would round to its dtype in the next linear layer: then it is written in that at once."""
    device = tensors[0].device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else _promoted(*tensors)


# ---------------------------------------------------------------------- the operators that torch.compile sees


@torch.library.custom_op("skipdit::norm_modulate", mutates_args=())
def _norm_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    from .norm_triton import norm_forward

    return norm_forward(x, shift, scale, eps, dtype)


@_norm_modulate.register_fake
def _(x, shift, scale, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("skipdit::norm_modulate_backward", mutates_args=())
def _norm_modulate_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, shift and scale; `residual`, the gradient of x on its other way, is added to the first."""
    from .norm_triton import norm_backward

    return norm_backward(grad, x, scale, eps, residual)


@_norm_modulate_backward.register_fake
def _(grad, x, scale, eps, residual):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.custom_op("skipdit::gate_residual", mutates_args=())
def _gate_residual(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .norm_triton import gate_forward

    return gate_forward(x, gate, y, dtype)


@_gate_residual.register_fake
def _(x, gate, y, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("skipdit::gate_residual_backward", mutates_args=())
def _gate_residual_backward(
    grad: torch.Tensor, gate: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and y."""
    from .norm_triton import gate_backward

    return gate_backward(grad, gate, y)


@_gate_residual_backward.register_fake
def _(grad, gate, y):
    return gate.new_empty(gate.shape), y.new_empty(y.shape)


@torch.library.custom_op("skipdit::gate_residual_norm", mutates_args=())
def _gate_residual_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .norm_triton import gate_norm_forward

    return gate_norm_forward(x, gate, y, shift, scale, eps, dtype, normed_dtype)


@_gate_residual_norm.register_fake
def _(x, gate, y, shift, scale, eps, dtype, normed_dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=normed_dtype)


# ---------------------------------------------------------------------- gradients


def _keep_norm(ctx, inputs: tuple, output: torch.Tensor) -> None:
    x, _, scale, ctx.eps, _ = inputs
    ctx.save_for_backward(x, scale)


def _differentiate_norm(ctx, grad: torch.Tensor) -> tuple:
    return *_norm_modulate_backward(grad, *ctx.saved_tensors, ctx.eps, None), None, None


def _keep_gate(ctx, inputs: tuple, output: torch.Tensor) -> None:
    x, gate, y, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(gate, y)


def _differentiate_gate(ctx, grad: torch.Tensor) -> tuple:
    gate_grad, y_grad = _gate_residual_backward(grad, *ctx.saved_tensors)
    return grad.to(ctx.dtype), gate_grad, y_grad, None


def _keep_both(ctx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, gate, y, _, scale, ctx.eps, _, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(gate, y, scale, output[0])


def _differentiate_both(ctx, grad: torch.Tensor, normed_grad: torch.Tensor) -> tuple:
    gate, y, scale, summed = ctx.saved_tensors
    grad, shift_grad, scale_grad = _norm_modulate_backward(normed_grad, summed, scale, ctx.eps, grad)
    gate_grad, y_grad = _gate_residual_backward(grad, gate, y)
    return grad.to(ctx.dtype), gate_grad, y_grad, shift_grad, scale_grad, None, None, None


_norm_modulate.register_autograd(_differentiate_norm, setup_context=_keep_norm)
_gate_residual.register_autograd(_differentiate_gate, setup_context=_keep_gate)
_gate_residual_norm.register_autograd(_differentiate_both, setup_context=_keep_both)
