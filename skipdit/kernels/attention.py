"""Self-attention over short sequences, read in place from the projection's output.

Axes: B batch, F frames, P patches, H heads, d head size. The projection gives queries, keys and values as
[B, F, P, 3, H, d]; attention runs along F (temporal) or P (spatial) and leaves [B, F, P, H * d]. The general way
makes four transposed copies of that; the kernel none.
"""

import torch
import torch.nn.functional as F

from .dispatch import usable

__all__ = ["MAX_HEAD_SIZE", "MAX_LENGTH", "attention", "fused_attention"]

# One program holds a whole sequence: longer ones of float32 do not fit into registers.
MAX_LENGTH = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
MAX_HEAD_SIZE = 128


def attention(qkv: torch.Tensor, axis: int = -2) -> torch.Tensor:
    """The definition: softmax(q k^T / sqrt(d)) v along one axis, every other one counting as batch.

    Args:
        qkv: [..., 3, H, d].
        axis: Which axis of the result attention runs along: -2 is the last of "...", -3 the one before.

    Returns:
        [..., H * d].
    """
    # each [..., axis, ..., H, d] -> [..., H, axis, d]
    query, key, value = (t.movedim(axis - 1, -2) for t in qkv.unbind(-3))
    batch_axes = query.shape[:-3]
    query, key, value = (t.flatten(0, -4) for t in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value)
    attended = attended.unflatten(0, batch_axes).movedim(-2, axis - 1)
    return attended.flatten(-2)


def fused_attention(qkv: torch.Tensor, axis: int = -2) -> torch.Tensor:
    """`attention` by the kernel where that runs and the sequences are short, else by its definition.

    Args:
        qkv: [B, (F,) P, 3, H, d] with any strides.
        axis: -2 (P) or -3 (F).

    Returns:
        [B, (F,) P, H * d].
    """
    if not _fits(qkv, axis):
        return attention(qkv, axis)
    if qkv.ndim == 5:
        return short_attention(qkv.unsqueeze(1), 2).squeeze(1)
    return short_attention(qkv, axis + 4)


def _fits(qkv: torch.Tensor, axis: int) -> bool:
    obstacle = ""
    if (qkv.ndim, axis) not in ((5, -2), (6, -2), (6, -3)):
        obstacle = "it runs along F or P of [B, (F,) P, D] only"
    elif qkv.shape[axis - 2] > MAX_LENGTH.get(qkv.dtype, 64):
        obstacle = f"sequences of {qkv.dtype} are longer than {MAX_LENGTH.get(qkv.dtype, 64)}"
    elif qkv.shape[-1] > MAX_HEAD_SIZE:
        obstacle = f"heads are larger than {MAX_HEAD_SIZE}"
    return usable("attention", qkv, obstacle=obstacle)


# The operators that torch.compile sees: opaque, with shapes and gradients known.


@torch.library.custom_op("skipdit::short_attention", mutates_args=())
def short_attention(qkv: torch.Tensor, axis: int) -> torch.Tensor:
    """qkv [B, F, P, 3, H, d], axis 1 or 2 -> [B, F, P, H * d]."""
    from .attention_triton import forward

    return forward(qkv, axis)


@torch.library.custom_op("skipdit::short_attention_backward", mutates_args=())
def short_attention_backward(grad: torch.Tensor, qkv: torch.Tensor, axis: int) -> torch.Tensor:
    """grad [B, F, P, H * d] -> gradient of qkv, [B, F, P, 3, H, d]. The weights of attention are computed anew."""
    from .attention_triton import backward

    return backward(grad, qkv, axis)


@short_attention.register_fake
def _(qkv: torch.Tensor, axis: int) -> torch.Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]))


@short_attention_backward.register_fake
def _(grad: torch.Tensor, qkv: torch.Tensor, axis: int) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx, inputs: tuple, output: torch.Tensor) -> None:
    qkv, ctx.axis = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return short_attention_backward(grad, *ctx.saved_tensors, ctx.axis), None


short_attention.register_autograd(_differentiate, setup_context=_keep)
