"""The kernels of `norm.py`, whose plain functions say what they compute.

All are bounded by memory: each reads its inputs once and writes its outputs once. A program does a few whole rows of
one group, the rows that share a vector of the conditioning. In the backward pass a program walks down its rows and
keeps the sums for that vector's gradient; the programs' sums are added up afterwards, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .tiles import groups_of, on_device, power_of_two

ROWS = 4  # of a program, forward
ROWS_BACKWARD = 16


@triton.jit
def _vector(base, group, stride, columns, width):
    return tl.load(base + group * stride + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def _normalise(x, columns, width, eps):
    """Rows of x [ROWS, BLOCK] in float32, zero beyond the width -> normalised, and 1 / standard deviation."""
    mean = tl.sum(x, 1) / width
    centred = tl.where(columns[None, :] < width, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    sum_ptr,
    normed_ptr,
    rows,
    width,
    chunks,
    x_group_stride,
    x_row_stride,
    y_group_stride,
    y_row_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: (group, chunk of ROWS rows). With GATE x becomes x + gate * y; with NORM that is normalised."""
    group = (tl.program_id(0) // chunks).to(tl.int64)
    row = (tl.program_id(0) % chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (row[:, None] < rows) & (columns[None, :] < width)
    here = group * x_group_stride + row[:, None] * x_row_stride + columns[None, :]
    out = (group * rows + row[:, None]) * width + columns[None, :]
    x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        there = group * y_group_stride + row[:, None] * y_row_stride + columns[None, :]
        y = tl.load(y_ptr + there, mask=mask, other=0.0).to(tl.float32)
        x += _vector(gate_ptr, group, gate_stride, columns, width)[None, :] * y
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask=mask)
        x = rounded.to(tl.float32)  # what the backward pass will see
    if NORM:
        normed, _ = _normalise(x, columns, width, eps)
        scale = _vector(scale_ptr, group, scale_stride, columns, width)
        shift = _vector(shift_ptr, group, shift_stride, columns, width)
        normed = normed * (1 + scale)[None, :] + shift[None, :]
        tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    grad_ptr,
    x_ptr,
    scale_ptr,
    residual_ptr,
    x_grad_ptr,
    sums_ptr,
    rows,
    width,
    chunks,
    grad_group_stride,
    grad_row_stride,
    x_group_stride,
    x_row_stride,
    residual_group_stride,
    residual_row_stride,
    scale_stride,
    eps,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With n the normalised x and h = grad * (1 + scale): dx = (h - mean(h) - n mean(h n)) / std (+ residual).

    The sums of grad and of grad * n over the program's rows go to sums[group, chunk, 0 and 1], float32.
    """
    program = tl.program_id(0).to(tl.int64)
    group, chunk = program // chunks, program % chunks
    columns = tl.arange(0, BLOCK)
    inside = columns[None, :] < width
    factor = 1 + _vector(scale_ptr, group, scale_stride, columns, width)[None, :]
    shift_sum = tl.zeros((1, BLOCK), tl.float32)
    scale_sum = tl.zeros((1, BLOCK), tl.float32)
    for step in range(ROWS):
        row = chunk * ROWS + step + tl.arange(0, 1)
        mask = (row[:, None] < rows) & inside
        x = tl.load(x_ptr + group * x_group_stride + row[:, None] * x_row_stride + columns[None, :], mask=mask, other=0)
        here = group * grad_group_stride + row[:, None] * grad_row_stride + columns[None, :]
        grad = tl.load(grad_ptr + here, mask=mask, other=0.0).to(tl.float32)
        normed, inverse = _normalise(x.to(tl.float32), columns, width, eps)
        shift_sum += grad
        scale_sum += grad * normed
        grad = grad * factor
        along = tl.sum(grad * normed, 1) / width
        x_grad = (grad - (tl.sum(grad, 1) / width)[:, None] - normed * along[:, None]) * inverse[:, None]
        if RESIDUAL:
            there = group * residual_group_stride + row[:, None] * residual_row_stride + columns[None, :]
            x_grad += tl.load(residual_ptr + there, mask=mask, other=0.0).to(tl.float32)
        out = (group * rows + row[:, None]) * width + columns[None, :]
        tl.store(x_grad_ptr + out, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
    sums = sums_ptr + program * 2 * width + columns[None, :]
    tl.store(sums, shift_sum, mask=inside)
    tl.store(sums + width, scale_sum, mask=inside)


@triton.jit
def _gate_backward(
    grad_ptr,
    gate_ptr,
    y_ptr,
    y_grad_ptr,
    sums_ptr,
    rows,
    width,
    chunks,
    grad_group_stride,
    grad_row_stride,
    y_group_stride,
    y_row_stride,
    gate_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dy = grad * gate; the sum of grad * y over the program's rows goes to sums[group, chunk], float32."""
    program = tl.program_id(0).to(tl.int64)
    group, chunk = program // chunks, program % chunks
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = _vector(gate_ptr, group, gate_stride, columns, width)
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROWS):
        row = chunk * ROWS + step
        mask = inside & (row < rows)
        here = group * grad_group_stride + row * grad_row_stride + columns
        grad = tl.load(grad_ptr + here, mask=mask, other=0.0).to(tl.float32)
        there = group * y_group_stride + row * y_row_stride + columns
        y = tl.load(y_ptr + there, mask=mask, other=0.0).to(tl.float32)
        gate_sum += grad * y
        out = (group * rows + row) * width + columns
        tl.store(y_grad_ptr + out, (grad * gate).to(y_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + program * width + columns, gate_sum, mask=inside)


# ---------------------------------------------------------------------- launches


def _rows_of(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[..., D] -> [groups, rows, D] with whole rows; copied only where no strides describe that."""
    grouped = x.reshape(groups, -1, x.shape[-1])
    return grouped if grouped.stride(-1) == 1 else grouped.contiguous()


def _vectors(vector: torch.Tensor, groups: int) -> torch.Tensor:
    rows = vector.reshape(groups, vector.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _block(width: int) -> dict[str, int]:
    """Tile width and warps: 16 elements of a row for a thread."""
    block = power_of_two(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _run_forward(x, gate, y, shift, scale, eps, sum_dtype, normed_dtype, rows_at_once=ROWS):
    """The sum and the normed sum; None for what was not asked for, which is what gets no dtype."""
    vector = shift if gate is None else gate
    groups = groups_of(x.shape, vector.shape)
    sums, normed = (
        None if dtype is None else torch.empty(x.shape, dtype=dtype, device=x.device)
        for dtype in (sum_dtype, normed_dtype)
    )
    if not x.numel():
        return sums, normed
    x = _rows_of(x, groups)
    y = x if y is None else _rows_of(y, groups)
    gate, shift, scale = (None if t is None else _vectors(t, groups) for t in (gate, shift, scale))
    chunks = triton.cdiv(x.shape[1], rows_at_once)
    strides = [0 if t is None else t.stride(0) for t in (gate, shift, scale)]
    with on_device(x):
        _forward[(groups * chunks,)](
            x, y, gate, shift, scale, sums, normed, x.shape[1], x.shape[2], chunks, *x.stride()[:2], *y.stride()[:2],
            *strides, eps, GATE=gate is not None, NORM=shift is not None, ROWS=rows_at_once, **_block(x.shape[2]),
        )  # fmt: skip
    return sums, normed


def norm_forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype, rows_at_once: int = ROWS
) -> torch.Tensor:
    """`norm_modulate`."""
    return _run_forward(x, None, None, shift, scale, eps, None, dtype, rows_at_once)[1]


def gate_forward(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, rows_at_once: int = ROWS
) -> torch.Tensor:
    """`gate_residual`."""
    return _run_forward(x, gate, y, None, None, 0.0, dtype, None, rows_at_once)[0]


def gate_norm_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
    rows_at_once: int = ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_residual_norm`."""
    return _run_forward(x, gate, y, shift, scale, eps, dtype, normed_dtype, rows_at_once)


def norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    rows_at_once: int = ROWS_BACKWARD,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, shift and scale; the latter two shaped as `scale`."""
    groups = groups_of(x.shape, scale.shape)
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return x_grad, torch.zeros_like(scale), torch.zeros_like(scale)
    x, grad = _rows_of(x, groups), _rows_of(grad, groups)
    other = x if residual is None else _rows_of(residual, groups)
    vectors = _vectors(scale, groups)
    chunks = triton.cdiv(x.shape[1], rows_at_once)
    sums = torch.empty((groups, chunks, 2, x.shape[2]), dtype=torch.float32, device=x.device)
    with on_device(x):
        _norm_backward[(groups * chunks,)](
            grad, x, vectors, other, x_grad, sums, x.shape[1], x.shape[2], chunks, *grad.stride()[:2], *x.stride()[:2],
            *other.stride()[:2], vectors.stride(0), eps, RESIDUAL=residual is not None, ROWS=rows_at_once,
            **_block(x.shape[2]),
        )  # fmt: skip
    shift_grad, scale_grad = (sums[:, :, i].sum(1).reshape(scale.shape).to(scale.dtype) for i in (0, 1))
    return x_grad, shift_grad, scale_grad


def gate_backward(
    grad: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, rows_at_once: int = ROWS_BACKWARD
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and y."""
    groups = groups_of(y.shape, gate.shape)
    y_grad = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return torch.zeros_like(gate), y_grad
    y, grad = _rows_of(y, groups), _rows_of(grad, groups)
    vectors = _vectors(gate, groups)
    chunks = triton.cdiv(y.shape[1], rows_at_once)
    sums = torch.empty((groups, chunks, y.shape[2]), dtype=torch.float32, device=y.device)
    with on_device(y):
        _gate_backward[(groups * chunks,)](
            grad, vectors, y, y_grad, sums, y.shape[1], y.shape[2], chunks, *grad.stride()[:2], *y.stride()[:2],
            vectors.stride(0), ROWS=rows_at_once, **_block(y.shape[2]),
        )  # fmt: skip
    return sums.sum(1).reshape(gate.shape).to(gate.dtype), y_grad
