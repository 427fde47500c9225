"""The hardware's own rates, the kernels' errors and times, piece by piece."""

import importlib.util
import math
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipdit import kernels
from skipdit.kernels.attention import short_attention
from skipdit.kernels.float8 import Float8Linear, quantize_rows
from skipdit.kernels.mlp import _linear_gelu
from skipdit.kernels.norm import _gate_residual, _gate_residual_norm, _norm_modulate

from .common import Record, Setting, device_seconds, error, median_seconds

COPIES = 4  # of the inputs, so that the cache does not hold them
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs_kernels(device: torch.device) -> bool:
    """On a card that has them, or (as a rehearsal) in Triton's interpreter."""
    if device.type == "cuda":
        return kernels.available(device)[0]
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    from skipdit.kernels import attention_triton

    return not isinstance(attention_triton._forward, triton.JITFunction)


# ---------------------------------------------------------------------- rates


def rates(setting: Setting, device: torch.device, note: Record) -> None:
    """Matrix and memory rates of this very run, which all shares refer to."""
    note.attempt("hardware", lambda: describe(device))
    for dtype in (torch.bfloat16, torch.float16):
        note.attempt(f"matrix {dtype}", lambda dtype=dtype: matrix_rate(setting, device, dtype))
    note.attempt("memory", lambda: memory_rate(setting, device))
    sizes = setting.sizes
    rows = 2 * sizes["frames"] * sizes["patches"]
    width, hidden = sizes["width"], sizes["hidden"]
    for inner, outer in ((width, 3 * width), (width, width), (width, hidden), (hidden, width), (2 * width, width)):
        for kind in (linear, float8_product):
            name = f"{kind.__name__.replace('_', ' ')} {rows}x{inner}x{outer}"
            note.attempt(name, lambda f=kind, k=inner, n=outer: f(rows, k, n, setting, device))


def describe(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "triton", "diffusers", "skipdit")
    found = {"python": platform.python_version(), "cuda": torch.version.cuda, "device": str(device)}
    for package in packages:
        try:
            found[package] = version(package)
        except Exception:  # not installed, or run from its folder
            found[package] = None
    found["kernels"] = kernels.available(device)[1]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
        found["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found["nvidia_smi"] = None
    return found


def matrix_rate(setting: Setting, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of a large product of random numbers, the median and the best of some calls."""
    side = setting.matrix_side
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: one @ other, device, setting.repeats)
    return {"rate": 2 * side**3 / seconds}


def memory_rate(setting: Setting, device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written ones counted."""
    source = torch.randint(0, 255, (setting.copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, setting.repeats)
    return {"rate": 2 * setting.copied_bytes / seconds}


def linear(rows: int, inner: int, outer: int, setting: Setting, device: torch.device) -> dict[str, float]:
    x, weight = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (rows, outer))
    bias = torch.zeros(outer, device=device, dtype=torch.bfloat16)
    took = device_seconds(F.linear, [(x, weight, bias)] * 2, device, setting.repeats)
    return {**took, "rate": 2 * rows * inner * outer / took["seconds"]}


def float8_product(rows: int, inner: int, outer: int, setting: Setting, device: torch.device) -> dict[str, float]:
    """As `Float8Linear` multiplies, without the scaling of the inputs."""
    layer = Float8Linear(torch.nn.Linear(inner, outer, device=device, dtype=torch.bfloat16))
    x, scale = quantize_rows(torch.randn(rows, inner, device=device))
    took = device_seconds(layer.product, [(x, scale)], device, setting.repeats)
    return {**took, "rate": 2 * rows * inner * outer / took["seconds"]}


# ---------------------------------------------------------------------- correctness


def correctness(setting: Setting, device: torch.device, note: Record) -> None:
    """Error of each kernel and of the plain operations in the same dtype, both against float64."""
    if not runs_kernels(device):
        note.attempt("kernels", lambda: {"left out": kernels.available(device)[1]})
        return
    for dtype in DTYPES[::-1]:
        for name, plain, fused, make in cases(setting, device, dtype):
            note.attempt(f"{name} {dtype}", lambda p=plain, f=fused, m=make, d=dtype: compare(p, f, m(), d), seconds=3)


def cases(
    setting: Setting, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable, Callable, Callable[[], tuple[torch.Tensor, ...]]]]:
    """Name, plain function, kernel, what makes inputs: at the model's sizes and at awkward ones."""
    s = setting.sizes
    model = (2, s["frames"], s["patches"], 3, s["heads"], s["width"] // s["heads"])
    for shape in (model, (1, 5, 3, 3, 2, 40), (1, 16, 7, 3, 3, 64)):
        yield f"attention {shape}", *attention_case(-3, 1, shape, device, dtype)
    if dtype != torch.float32:  # what the kernel takes there
        shape = (1, 2, 64 if device.type == "cuda" else 17, 3, 2, 72)
        yield "attention over 64 patches", *attention_case(-2, 2, shape, device, dtype)
    norms = (
        ("norm_modulate", (0, 3, 4), lambda x, *v: _norm_modulate(x, *v, 1e-6, dtype)),
        ("gate_residual", (0, 1, 2), lambda x, gate, y: _gate_residual(x, gate, y, dtype)),
        ("gate_residual_norm", range(5), lambda *args: _gate_residual_norm(*args, 1e-6, dtype, dtype)),
    )
    for shape in ((2, s["frames"], s["patches"], s["width"]), (3, 5, 7, 48)):
        for name, taken, fused in norms:
            make = lambda shape=shape, taken=taken: itemgetter(*taken)(norm_inputs(shape, device, dtype))  # noqa: E731
            yield f"{name} {shape}", getattr(kernels, name), fused, make


def attention_case(axis: int, place: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple:
    """Attention along an axis of queries, keys and values [B, F, P, 3, H, d]; the kernel counts axes from the front."""
    make = lambda: (torch.randn(shape, device=device).to(dtype),)  # noqa: E731
    return lambda qkv: kernels.attention(qkv, axis), lambda qkv: short_attention(qkv, place), make


def norm_inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, gate, what a branch adds, shift and scale; vectors are one a sample."""
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(shape[0], 1, 1, 3 * shape[-1], device=device).to(dtype).chunk(3, dim=-1)
    return x, gate, y, shift, scale


def compare(
    plain: Callable, fused: Callable, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> dict[str, float | bool]:
    """Relative errors of outputs and gradients; "ok" if the kernel's are no larger than the plain one's (5% over)."""
    torch.manual_seed(1)
    found: dict[str, list[torch.Tensor]] = {}
    for name, function, kind in (("exact", plain, torch.float64), ("plain", plain, dtype), ("kernel", fused, dtype)):
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(2)
        grads = [torch.randn(o.shape, device=o.device).to(dtype).to(kind) for o in outputs]
        torch.autograd.backward(outputs, grads)
        found[name] = [*outputs, *(leaf.grad for leaf in leaves)]
    count = len(outputs)
    errors: dict[str, float | bool] = {}
    ok = True
    for part, those in (("forward", slice(None, count)), ("backward", slice(count, None))):
        for name in ("kernel", "plain"):
            errors[f"{part} {name}"] = max(map(error, found[name][those], found["exact"][those]))
        least = {torch.float32: 2e-6}.get(dtype, 0.0)  # below that both are exact for all purposes
        ok &= errors[f"{part} kernel"] <= max(1.05 * errors[f"{part} plain"], least)
    return {**errors, "ok": ok}


# ---------------------------------------------------------------------- times of pieces


def pieces(setting: Setting, device: torch.device, note: Record) -> None:
    """Every way to compute each piece, in bf16; bytes are those that must move, operations those of matrix units."""
    fast = runs_kernels(device)
    for clips in setting.clips:
        for piece in pieces_of(setting, device, 2 * clips):
            for way, call in piece.ways.items():
                if fast or not way.startswith("kernel"):
                    name = f"B{2 * clips} {piece.name}: {way}"
                    note.attempt(name, lambda p=piece, c=call: piece_way(p, c, device, setting), seconds=2)


@dataclass(frozen=True)
class Piece:
    """One kind of work: ways to do it, what makes copies of their arguments, bytes that must move, operations."""

    name: str
    ways: dict[str, Callable]
    inputs: Callable[[], list[tuple[torch.Tensor, ...]]]
    moved: int
    operations: int


def piece_way(piece: Piece, call: Callable, device: torch.device, setting: Setting) -> dict[str, Any]:
    took = device_seconds(call, piece.inputs(), device, setting.repeats)
    return {**took, "bytes": piece.moved, "operations": piece.operations}


def pieces_of(setting: Setting, device: torch.device, batch: int) -> Iterator[Piece]:
    """Nothing lies on the device until inputs are asked for."""
    yield from attention_pieces(setting, device, batch)
    yield from norm_pieces(setting, device, batch)
    s = setting.sizes
    rows, width, hidden = batch * s["frames"] * s["patches"], s["width"], s["hidden"]

    def inputs() -> list[tuple[torch.Tensor, ...]]:
        weight, bias = (torch.randn(n, device=device).to(torch.bfloat16) for n in ((hidden, width), (hidden,)))
        return [(torch.randn(rows, width, device=device).to(torch.bfloat16), weight, bias) for _ in range(2)]

    ways = {
        "linear alone": F.linear,
        "eager": kernels.linear_gelu,
        "compiled": torch.compile(kernels.linear_gelu, dynamic=False),
        "epilogue": _linear_gelu,
    }
    moved = 2 * (rows * (width + hidden) + width * hidden)
    yield Piece("linear + GELU", ways, inputs, moved, 2 * rows * width * hidden)


def attention_pieces(setting: Setting, device: torch.device, batch: int) -> Iterator[Piece]:
    s = setting.sizes
    frames, patches, width, heads = s["frames"], s["patches"], s["width"], s["heads"]
    values = batch * frames * patches * width
    shape = (batch, frames, patches, 3, heads, width // heads)

    def inputs() -> list[tuple[torch.Tensor, ...]]:
        return [(torch.randn(shape, device=device).to(torch.bfloat16),) for _ in range(COPIES)]

    ways: dict[str, Callable] = {"transposed copies and SDPA": lambda qkv: kernels.attention(qkv, -3)}
    for warps in (1, 2, 4):
        ways[f"kernel, {warps} warps"] = lambda qkv, w=warps: triton_attention(qkv, w)
    yield Piece("temporal attention", ways, inputs, 8 * values, 4 * values * frames)

    ways = {"as chosen by PyTorch": lambda qkv: kernels.attention(qkv, -2)}
    if patches <= 64:
        ways["kernel"] = lambda qkv: short_attention(qkv, 2)
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        if device.type == "cuda" or backend == "MATH":
            ways[backend] = lambda qkv, b=backend: with_backend(qkv, getattr(SDPBackend, b))
    yield Piece("spatial attention", ways, inputs, 8 * values, 4 * values * patches)


def norm_pieces(setting: Setting, device: torch.device, batch: int) -> Iterator[Piece]:
    s = setting.sizes
    shape = (batch, s["frames"], s["patches"], s["width"])

    def inputs() -> list[tuple[torch.Tensor, ...]]:
        return [norm_inputs(shape, device, torch.bfloat16) for _ in range(COPIES)]

    plain: dict[str, Callable] = {
        "LayerNorm + modulate": lambda x, gate, y, shift, scale: kernels.norm_modulate(x, shift, scale),
        "gate + residual": lambda x, gate, y, shift, scale: kernels.gate_residual(x, gate, y),
        "gate + residual + norm": kernels.gate_residual_norm,
    }
    for (name, function), tensors in zip(plain.items(), (2, 3, 4), strict=True):
        ways = {"eager": function, "compiled": torch.compile(function, dynamic=False)}
        for rows in (1, 2, 4, 8):
            ways[f"kernel, {rows} rows"] = lambda *args, n=name, r=rows: triton_norms(n, r, *args)
        yield Piece(name, ways, inputs, tensors * 2 * math.prod(shape), 0)


def triton_attention(qkv: torch.Tensor, warps: int) -> torch.Tensor:
    from skipdit.kernels.attention_triton import forward

    return forward(qkv, 1, num_warps=warps)


def triton_norms(name: str, rows: int, x, gate, y, shift, scale) -> object:
    from skipdit.kernels import norm_triton

    dtype = x.dtype
    if name == "LayerNorm + modulate":
        return norm_triton.norm_forward(x, shift, scale, 1e-6, dtype, rows)
    if name == "gate + residual":
        return norm_triton.gate_forward(x, gate, y, dtype, rows)
    return norm_triton.gate_norm_forward(x, gate, y, shift, scale, 1e-6, dtype, dtype, rows)


def with_backend(qkv: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        return kernels.attention(qkv, -2)
