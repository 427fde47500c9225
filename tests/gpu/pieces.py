"""The hardware's own rates, the kernels' errors and times, piece by piece."""

import importlib.util
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
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
        for name, plain, fused, inputs in cases(setting, device, dtype):
            note.attempt(f"{name} {dtype}", lambda p=plain, f=fused, i=inputs, d=dtype: compare(p, f, i, d), seconds=3)


def cases(
    setting: Setting, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable, Callable, tuple[torch.Tensor, ...]]]:
    """Name, plain function, kernel, inputs: at the model's sizes and at awkward ones."""
    sizes = setting.sizes
    model = (2, sizes["frames"], sizes["patches"], 3, sizes["heads"], sizes["width"] // sizes["heads"])
    for shape in (model, (1, 5, 3, 3, 2, 40), (1, 16, 7, 3, 3, 64)):
        yield (
            f"attention {shape}",
            lambda qkv: kernels.attention(qkv, -3),
            lambda qkv: short_attention(qkv, 1),
            (torch.randn(shape, device=device).to(dtype),),
        )
    if dtype != torch.float32:  # what the kernel takes there
        yield (
            "attention over 64 patches",
            lambda qkv: kernels.attention(qkv, -2),
            lambda qkv: short_attention(qkv, 2),
            (torch.randn(1, 2, 64 if device.type == "cuda" else 17, 3, 2, 72, device=device).to(dtype),),
        )
    for shape in ((2, *model[1:3], sizes["width"]), (3, 5, 7, 48)):
        x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        vectors = torch.randn(shape[0], 1, 1, 3 * shape[-1], device=device).to(dtype).chunk(3, dim=-1)
        yield (
            f"norm_modulate {shape}",
            kernels.norm_modulate,
            lambda x, *v, d=dtype: _norm_modulate(x, *v, 1e-6, d),
            (x, *vectors[:2]),
        )
        yield (
            f"gate_residual {shape}",
            kernels.gate_residual,
            lambda x, g, y, d=dtype: _gate_residual(x, g, y, d),
            (x, vectors[0], y),
        )
        yield (
            f"gate_residual_norm {shape}",
            kernels.gate_residual_norm,
            lambda x, g, y, *v, d=dtype: _gate_residual_norm(x, g, y, *v, 1e-6, d, d),
            (x, vectors[0], y, *vectors[1:]),
        )


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
        for name, ways, inputs, moved, operations in pieces_of(setting, device, 2 * clips):
            for way, call in ways.items():
                if fast or not way.startswith("kernel"):
                    key = f"B{2 * clips} {name}: {way}"
                    note.attempt(
                        key,
                        lambda c=call, i=inputs, m=moved, o=operations: {
                            **device_seconds(c, i, device, setting.repeats), "bytes": m, "operations": o
                        },
                        seconds=2,
                    )  # fmt: skip


def pieces_of(setting: Setting, device: torch.device, batch: int) -> Iterator[tuple]:
    """Name, way -> call, inputs, bytes, operations."""
    s, half = setting.sizes, torch.bfloat16
    frames, patches, width, heads = s["frames"], s["patches"], s["width"], s["heads"]

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(half)

    values = batch * frames * patches * width
    qkvs = [(some(batch, frames, patches, 3, heads, width // heads),) for _ in range(COPIES)]
    ways = {"transposed copies and SDPA": lambda qkv: kernels.attention(qkv, -3)}
    for warps in (1, 2, 4):
        ways[f"kernel, {warps} warps"] = lambda qkv, w=warps: triton_attention(qkv, w)
    yield "temporal attention", ways, qkvs, 8 * values, 4 * values * frames

    ways = {"as chosen by PyTorch": lambda qkv: kernels.attention(qkv, -2)}
    if patches <= 64:
        ways["kernel"] = lambda qkv: short_attention(qkv, 2)
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        if device.type == "cuda" or backend == "MATH":
            ways[backend] = lambda qkv, b=backend: with_backend(qkv, getattr(SDPBackend, b))
    yield "spatial attention", ways, qkvs, 8 * values, 4 * values * patches
    del qkvs

    def norm_inputs() -> tuple[torch.Tensor, ...]:
        x, y = (some(batch, frames, patches, width) for _ in range(2))
        return (x, y, *some(batch, 1, 1, 3 * width).chunk(3, dim=-1))

    inputs = [norm_inputs() for _ in range(COPIES)]
    plain: dict[str, Callable] = {
        "LayerNorm + modulate": lambda x, y, gate, shift, scale: kernels.norm_modulate(x, shift, scale),
        "gate + residual": lambda x, y, gate, shift, scale: kernels.gate_residual(x, gate, y),
        "gate + residual + norm": lambda x, y, gate, shift, scale: kernels.gate_residual_norm(x, gate, y, shift, scale),
    }
    for (name, function), tensors in zip(plain.items(), (2, 3, 4), strict=True):
        ways = {"eager": function, "compiled": torch.compile(function, dynamic=False)}
        for rows in (1, 2, 4, 8):
            ways[f"kernel, {rows} rows"] = lambda *args, n=name, r=rows: triton_norms(n, r, *args)
        yield name, ways, inputs, tensors * 2 * values, 0
    del inputs

    hidden = s["hidden"]
    weight, bias = some(hidden, width), some(hidden)
    rows = values // width
    inputs = [(some(rows, width), weight, bias) for _ in range(2)]
    ways = {
        "linear alone": F.linear,
        "eager": kernels.linear_gelu,
        "compiled": torch.compile(kernels.linear_gelu, dynamic=False),
        "epilogue": _linear_gelu,
    }
    moved = 2 * (rows * (width + hidden) + width * hidden)
    yield "linear + GELU", ways, inputs, moved, 2 * rows * width * hidden


def triton_attention(qkv: torch.Tensor, warps: int) -> torch.Tensor:
    from skipdit.kernels.attention_triton import forward

    return forward(qkv, 1, num_warps=warps)


def triton_norms(name: str, rows: int, x, y, gate, shift, scale) -> object:
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
