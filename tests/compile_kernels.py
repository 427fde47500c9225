"""Compile every kernel for a card that need not be there, as at Latte-XL's sizes, and tell what came out as JSON lines.

python tests/compile_kernels.py 90 --dtype bfloat16 --frames 16

Triton brings all that this takes. "shared" is bytes of shared memory a program, "stack" and "local" bytes a thread that
did not fit into registers, "wide" the share of global accesses that move 16 bytes.
"""

import argparse
import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from skipdit.kernels import attention_triton, norm_triton


class Card:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(dtype: torch.dtype, frames: int, width: int, heads: int) -> None:
    """Launch every kernel once on a few patches; `main` has put compilation in the place of running."""
    qkv = torch.empty(2, frames, 2, 3, heads, width // heads, dtype=dtype)
    x = torch.empty(2, frames, 2, width, dtype=dtype)
    shift, scale, gate = torch.empty(2, 1, 1, 3 * width, dtype=dtype).chunk(3, dim=-1)
    attention_triton.forward(qkv, 1)
    attention_triton.backward(x, qkv, 1)
    norm_triton.norm_forward(x, shift, scale, 1e-6, dtype)
    norm_triton.gate_forward(x, gate, x, dtype)
    norm_triton.gate_norm_forward(x, gate, x, shift, scale, 1e-6, dtype, dtype)
    norm_triton.norm_backward(x, x, scale, 1e-6, x)
    norm_triton.gate_backward(x, gate, x)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a thread, as the assembler assigned them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


def described(name: str, kernel: object) -> dict[str, object]:
    ptx = kernel.asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global[.\w]*", ptx)
    return {
        "kernel": name,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
        "accesses": len(accesses),
        "wide": sum("v4.b32" in access for access in accesses) / len(accesses),
        "matrix_units": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="for example 80 or 90")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    args = parser.parse_args()
    driver.set_active(Card(args.capability))

    def compile_only(kernel: triton.JITFunction, grid: tuple[int, ...], *inputs: object, **constants: object) -> None:
        compiled = kernel.warmup(*inputs, grid=grid, **constants)
        print(json.dumps(described(kernel.fn.__module__.split(".")[-1] + kernel.fn.__name__, compiled)), flush=True)

    triton.JITFunction.__getitem__ = lambda kernel, grid: functools.partial(compile_only, kernel, grid)
    launches(getattr(torch, args.dtype), args.frames, args.width, args.heads)


if __name__ == "__main__":
    main()
