"""Where the time of a full forward goes: every part by itself at its real shape, times how often it runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from skipdit import kernels
from skipdit.models.layers import NORM_EPS

from .common import Record, Setting, build, device_seconds, variant
from .models import inputs_of
from .pieces import runs_kernels

HALF = torch.bfloat16


@dataclass(frozen=True)
class Part:
    """One kind of work.

    Attributes:
        name: For the table.
        full, reused: How often a full and a reused forward do it.
        call: The plain operations, on one of `inputs`.
        fused: By kernels, or None where there is none.
        inputs: Copies of the arguments.
        operations, moved: Operations of matrix units and bytes that must move, of one call.
    """

    name: str
    full: int
    reused: int
    call: Callable[..., object]
    fused: Callable[..., object] | None
    inputs: list[tuple]
    operations: int
    moved: int


@torch.no_grad()
def breakdown(setting: Setting, device: torch.device, note: Record) -> None:
    """Seconds, operations and bytes of every part, plain and by kernels."""
    model = variant(build(setting, device), HALF)
    for clips in setting.clips:
        for part in parts(setting, model, device, 2 * clips):
            numbers = {"full": part.full, "reused": part.reused, "operations": part.operations, "bytes": part.moved}
            note.attempt(
                f"B{2 * clips} {part.name}",
                lambda p=part, n=numbers: {**n, "plain": device_seconds(p.call, p.inputs, device, setting.repeats)},
                seconds=1,
            )
            if part.fused is not None and runs_kernels(device):
                note.attempt(
                    f"B{2 * clips} {part.name}, kernel",
                    lambda p=part, n=numbers: {
                        **n, "kernel": device_seconds(p.fused, p.inputs, device, setting.repeats)
                    },
                    seconds=1,
                )  # fmt: skip


def parts(setting: Setting, model, device: torch.device, batch: int) -> Iterator[Part]:
    """The parts of a forward in the order of its work; `device_seconds` leaves the host's share out."""
    s = setting.sizes
    frames, patches, width, heads, hidden = s["frames"], s["patches"], s["width"], s["heads"], s["hidden"]
    tokens = batch * frames * patches
    values, depth, units = tokens * width, s["depth"], s["depth"] // 2
    few = 4 * setting.shallow  # blocks of a reused step
    block, final = model.blocks[0], model.final_layer

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(HALF)

    def tensors(count: int, *shape: int) -> list[tuple]:
        return [tuple(some(*shape) for _ in range(count)) for _ in range(2)]

    grid = (batch, frames, patches)
    latents, timestep, labels = inputs_of(setting, batch, device, HALF)
    flat = latents.transpose(1, 2).flatten(0, 1)
    in_patch = latents.shape[1] * model.config.patch_size**2
    yield Part(
        "patch embedding", 1, 1, model.x_embedder, None, [(flat,)], 2 * tokens * in_patch * width, 2 * values
    )  # fmt: skip
    yield Part(
        "timestep and labels", 1, 1, lambda t, y: model.t_embedder(t) + model.embed_labels(y, (batch,)), None,
        [(timestep, labels)], 2 * batch * (256 + width) * width, 2 * (256 + width) * width,
    )  # fmt: skip
    yield Part(
        "adaLN vectors", depth, few, block.adaLN_modulation, None, tensors(1, batch, 1, 1, width),
        2 * batch * width * 6 * width, 12 * width * width,
    )  # fmt: skip

    vectors = some(batch, 1, 1, 3 * width).chunk(3, dim=-1)
    shift, scale, gate = vectors
    pairs = tensors(2, *grid, width)
    yield Part(
        "LayerNorm + modulate", depth + 1, few + 1, lambda x, y: kernels.norm_modulate(x, shift, scale, NORM_EPS),
        lambda x, y: kernels.fused_norm_modulate(x, shift, scale, NORM_EPS), pairs, 0, 4 * values,
    )  # fmt: skip
    yield Part(
        "gate + residual + LayerNorm + modulate", depth, few,
        lambda x, y: kernels.gate_residual_norm(x, gate, y, shift, scale, NORM_EPS),
        lambda x, y: kernels.fused_gate_residual_norm(x, gate, y, shift, scale, NORM_EPS), pairs, 0, 8 * values,
    )  # fmt: skip
    yield Part(
        "gate + residual", depth, few, lambda x, y: kernels.gate_residual(x, gate, y),
        lambda x, y: kernels.fused_gate_residual(x, gate, y), pairs, 0, 6 * values,
    )  # fmt: skip
    del pairs

    singles = tensors(1, tokens, width)
    yield linear("qkv linear", depth, few, block.attn.qkv, singles)
    yield linear("projection linear", depth, few, block.attn.proj, singles)
    fc1 = block.mlp.fc1
    yield Part(
        "MLP first linear + GELU", depth, few, lambda x: kernels.linear_gelu(x, fc1.weight, fc1.bias),
        lambda x: kernels.fused_linear_gelu(x, fc1.weight, fc1.bias), singles, 2 * tokens * width * hidden,
        2 * (values + tokens * hidden + width * hidden),
    )  # fmt: skip
    yield linear("MLP second linear", depth, few, block.mlp.fc2, tensors(1, tokens, hidden))

    qkvs = tensors(1, *grid, 3, heads, width // heads)
    yield Part(
        "spatial attention", units, few // 2, lambda qkv: kernels.attention(qkv, -2), None, qkvs,
        4 * values * patches, 8 * values,
    )  # fmt: skip
    yield Part(
        "temporal attention", units, few // 2, lambda qkv: kernels.attention(qkv, -3),
        lambda qkv: kernels.fused_attention(qkv, -3), qkvs, 4 * values * frames, 8 * values,
    )  # fmt: skip
    del qkvs

    yield Part(
        "skip fusion", units // 2, setting.shallow, lambda x, y: model.fuse_skip(0, x, y), None,
        tensors(2, *grid, width), 2 * tokens * 2 * width * width, 2 * (3 * values + 2 * width * width),
    )  # fmt: skip
    yield Part(
        "final linear", 1, 1, final.linear, None, tensors(1, *grid, width),
        2 * tokens * width * final.linear.out_features, 2 * values,
    )  # fmt: skip
    noise = torch.randn(batch // 2, *latents.shape[1:], device=device)
    yield Part(
        "guidance and DDIM", 1, 1, lambda x, n: 1.01 * x - 0.02 * (n + 7.0 * (x - n)), None, [(noise, noise + 1)], 0,
        12 * noise.numel(),
    )  # fmt: skip


def linear(name: str, full: int, reused: int, layer: torch.nn.Linear, inputs: list[tuple]) -> Part:
    rows, (outer, inner) = inputs[0][0].shape[0], layer.weight.shape
    moved = 2 * (rows * (inner + outer) + inner * outer)
    call = lambda x: F.linear(x, layer.weight, layer.bias)  # noqa: E731
    return Part(name, full, reused, call, None, inputs, 2 * rows * inner * outer, moved)
