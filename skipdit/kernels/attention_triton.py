"""The kernels of `attention.py`. Its `attention` says what they compute.

One program does one sequence of one head: all of q, k and v fit in its registers, so nothing is read twice and no
softmax is carried from block to block. A head's size is split into two powers of two (72 = 64 + 8, the 8 in a tile of
16 of which half is masked), because a tile must be a power of two and 128 for 72 would nearly double the work; masked
elements are neither read nor written. Products and softmax are in float32, as in PyTorch's fused attention.
"""

import torch
import triton
import triton.language as tl

from .tiles import on_device, power_of_two, split

LOG2_E = 1.4426950408889634


@triton.jit
def _tile(base, rows, columns, row_stride, column_stride: tl.constexpr, length, width: tl.constexpr):
    """Rows of one head, [BLOCK, columns]; zero where there are none."""
    mask = (rows[:, None] < length) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def _write(base, tile, rows, columns, row_stride, length, width: tl.constexpr):
    mask = (rows[:, None] < length) & (columns[None, :] < width)
    tl.store(base + rows[:, None] * row_stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """Matrix product to float32, of float32 by three of TF32 (as exact, and on matrix units).

    WIDEN is for Triton's interpreter, which cannot multiply bfloat16.
    """
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _weights(scores, rows, length, scale_log2):
    """Softmax over the keys before it is normalised, [BLOCK, BLOCK] in float32, 1 at the largest; 0 beyond the end."""
    scores = tl.where(rows[None, :] < length, scores * scale_log2, float("-inf"))
    return tl.exp2(scores - tl.max(scores, 1)[:, None])


@triton.jit
def _forward(
    qkv,
    out,
    outer,
    length,
    batch_stride,
    outer_stride,
    row_stride,
    kind_stride,
    out_batch_stride,
    out_outer_stride,
    out_row_stride,
    scale_log2,
    HEADS: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Program: (sample, sequence, head), heads fastest, for they lie beside each other in memory."""
    program = tl.program_id(0)
    head = program % HEADS
    sequence = (program // HEADS).to(tl.int64)
    batch, other = sequence // outer, sequence % outer
    query = qkv + batch * batch_stride + other * outer_stride + head * HEAD_STRIDE
    key = query + kind_stride
    value = key + kind_stride
    result = out + batch * out_batch_stride + other * out_outer_stride + head * SIZE
    rows = tl.arange(0, BLOCK).to(tl.int64)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, 16 if HIGH == 0 else HIGH)

    q = _tile(query, rows, low, row_stride, COLUMN_STRIDE, length, SIZE)
    k = _tile(key, rows, low, row_stride, COLUMN_STRIDE, length, SIZE)
    v = _tile(value, rows, low, row_stride, COLUMN_STRIDE, length, SIZE)
    scores = _dot(q, tl.trans(k), WIDEN)
    if HIGH > 0:
        q_high = _tile(query, rows, high, row_stride, COLUMN_STRIDE, length, SIZE)
        k_high = _tile(key, rows, high, row_stride, COLUMN_STRIDE, length, SIZE)
        v_high = _tile(value, rows, high, row_stride, COLUMN_STRIDE, length, SIZE)
        scores += _dot(q_high, tl.trans(k_high), WIDEN)
    weights = _weights(scores, rows, length, scale_log2).to(v.dtype)
    total = tl.sum(weights.to(tl.float32), 1)[:, None]  # of the rounded weights: the result is a true mean of v
    _write(result, _dot(weights, v, WIDEN) / total, rows, low, out_row_stride, length, SIZE)
    if HIGH > 0:
        attended = _dot(weights, v_high, WIDEN) / total
        _write(result, attended, rows, high, out_row_stride, length, SIZE)


@triton.jit
def _backward(
    grad,
    qkv,
    grad_qkv,
    outer,
    length,
    batch_stride,
    outer_stride,
    row_stride,
    kind_stride,
    grad_batch_stride,
    grad_outer_stride,
    grad_row_stride,
    out_batch_stride,
    out_outer_stride,
    out_row_stride,
    out_kind_stride,
    scale,
    scale_log2,
    HEADS: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """With W the weights, O = W V: dV = W^T dO, dS = W * (dO V^T - rowsum(W * dO V^T)), dQ = dS K, dK = dS^T Q."""
    program = tl.program_id(0)
    head = program % HEADS
    sequence = (program // HEADS).to(tl.int64)
    batch, other = sequence // outer, sequence % outer
    query = qkv + batch * batch_stride + other * outer_stride + head * HEAD_STRIDE
    key = query + kind_stride
    value = key + kind_stride
    incoming = grad + batch * grad_batch_stride + other * grad_outer_stride + head * SIZE
    query_out = grad_qkv + batch * out_batch_stride + other * out_outer_stride + head * SIZE
    key_out = query_out + out_kind_stride
    value_out = key_out + out_kind_stride
    rows = tl.arange(0, BLOCK).to(tl.int64)
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, 16 if HIGH == 0 else HIGH)

    q = _tile(query, rows, low, row_stride, COLUMN_STRIDE, length, SIZE)
    k = _tile(key, rows, low, row_stride, COLUMN_STRIDE, length, SIZE)
    v = _tile(value, rows, low, row_stride, COLUMN_STRIDE, length, SIZE)
    g = _tile(incoming, rows, low, grad_row_stride, 1, length, SIZE).to(q.dtype)
    scores = _dot(q, tl.trans(k), WIDEN)
    wanted = _dot(g, tl.trans(v), WIDEN)
    if HIGH > 0:
        q_high = _tile(query, rows, high, row_stride, COLUMN_STRIDE, length, SIZE)
        k_high = _tile(key, rows, high, row_stride, COLUMN_STRIDE, length, SIZE)
        v_high = _tile(value, rows, high, row_stride, COLUMN_STRIDE, length, SIZE)
        g_high = _tile(incoming, rows, high, grad_row_stride, 1, length, SIZE).to(q.dtype)
        scores += _dot(q_high, tl.trans(k_high), WIDEN)
        wanted += _dot(g_high, tl.trans(v_high), WIDEN)
    weights = _weights(scores, rows, length, scale_log2)
    weights = weights / tl.sum(weights, 1)[:, None]
    change = weights * (wanted - tl.sum(weights * wanted, 1)[:, None]) * scale
    weights, change = tl.trans(weights).to(q.dtype), change.to(q.dtype)

    _write(value_out, _dot(weights, g, WIDEN), rows, low, out_row_stride, length, SIZE)
    _write(query_out, _dot(change, k, WIDEN), rows, low, out_row_stride, length, SIZE)
    _write(key_out, _dot(tl.trans(change), q, WIDEN), rows, low, out_row_stride, length, SIZE)
    if HIGH > 0:
        value_grad = _dot(weights, g_high, WIDEN)
        query_grad = _dot(change, k_high, WIDEN)
        key_grad = _dot(tl.trans(change), q_high, WIDEN)
        _write(value_out, value_grad, rows, high, out_row_stride, length, SIZE)
        _write(query_out, query_grad, rows, high, out_row_stride, length, SIZE)
        _write(key_out, key_grad, rows, high, out_row_stride, length, SIZE)


def _shape(qkv: torch.Tensor, axis: int) -> tuple[int, int, int, dict[str, int]]:
    """Number of programs, sequences of a sample, length of one, and the constants of both kernels."""
    batch, _, _, _, heads, size = qkv.shape
    length, outer = qkv.shape[axis], qkv.shape[3 - axis]
    low, high = split(size)
    constants = {
        "HEADS": heads,
        "HEAD_STRIDE": qkv.stride(4),
        "COLUMN_STRIDE": qkv.stride(5),
        "SIZE": size,
        "LOW": low,
        "HIGH": high,
        "BLOCK": power_of_two(length, 16),
        "WIDEN": not isinstance(_forward, triton.JITFunction),
    }
    return batch * outer * heads, outer, length, constants


def _warps(block: int, dtype: torch.dtype) -> int:
    """So many that a program's tiles fit into registers."""
    return block // 16 * (2 if dtype == torch.float32 else 1)


def forward(qkv: torch.Tensor, axis: int, num_warps: int | None = None) -> torch.Tensor:
    """qkv [B, F, P, 3, H, d] with any strides, axis 1 or 2 -> [B, F, P, H * d]."""
    programs, outer, length, constants = _shape(qkv, axis)
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]))
    if not out.numel():
        return out
    scale_log2 = qkv.shape[-1] ** -0.5 * LOG2_E
    strides = [tensor.stride(i) for tensor in (qkv, out) for i in (0, 3 - axis, axis)]
    with on_device(qkv):
        _forward[(programs,)](
            qkv, out, outer, length, *strides[:3], qkv.stride(3), *strides[3:], scale_log2, **constants,
            num_warps=num_warps or _warps(constants["BLOCK"], qkv.dtype),
        )  # fmt: skip
    return out


def backward(grad: torch.Tensor, qkv: torch.Tensor, axis: int, num_warps: int | None = None) -> torch.Tensor:
    """grad [B, F, P, H * d] -> gradient of qkv, [B, F, P, 3, H, d]."""
    programs, outer, length, constants = _shape(qkv, axis)
    grad_qkv = qkv.new_empty(qkv.shape)
    if not grad_qkv.numel():
        return grad_qkv
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    scale = qkv.shape[-1] ** -0.5
    strides = [tensor.stride(i) for tensor in (qkv, grad, grad_qkv) for i in (0, 3 - axis, axis)]
    with on_device(qkv):
        _backward[(programs,)](
            grad, qkv, grad_qkv, outer, length, *strides[:3], qkv.stride(3), *strides[3:], grad_qkv.stride(3),
            scale, scale * LOG2_E, **constants, num_warps=num_warps or _warps(constants["BLOCK"], qkv.dtype),
        )  # fmt: skip
    return grad_qkv
