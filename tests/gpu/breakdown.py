"""Where the time of a full forward goes: every part by itself at its real shape, times how often it runs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from skipdit import kernels
from skipdit.models import SkipBackbone
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
        inputs: Makes copies of the arguments.
        operations, moved: Operations of matrix units and bytes that must move, of one call.
    """

    name: str
    full: int
    reused: int
    call: Callable[..., object]
    fused: Callable[..., object] | None
    inputs: Callable[[], list[tuple]]
    operations: int
    moved: int


@torch.no_grad()
def breakdown(setting: Setting, device: torch.device, note: Record) -> None:
    """Seconds, operations and bytes of every part, plain and by kernels."""
    model = variant(build(setting, device), HALF)
    for clips in setting.clips:
        for part in parts(setting, model, device, 2 * clips):
            name = f"B{2 * clips} {part.name}"
            note.attempt(name, lambda p=part: part_way(p, "plain", p.call, setting, device), seconds=1)
            if part.fused is not None and runs_kernels(device):
                measure = lambda p=part: part_way(p, "kernel", p.fused, setting, device)  # noqa: E731
                note.attempt(f"{name}, kernel", measure, seconds=1)


def part_way(
    part: Part, way: str, call: Callable[..., object], setting: Setting, device: torch.device
) -> dict[str, Any]:
    numbers = {"full": part.full, "reused": part.reused, "operations": part.operations, "bytes": part.moved}
    return {**numbers, way: device_seconds(call, part.inputs(), device, setting.repeats)}


def parts(setting: Setting, model: SkipBackbone, device: torch.device, batch: int) -> Iterator[Part]:
    """The parts of a forward; `device_seconds` leaves the host's share out. Inputs are made when asked for."""
    yield from conditioning(setting, model, device, batch)
    yield from norms(setting, device, batch)
    yield from linears(setting, model, device, batch)
    yield from attentions(setting, device, batch)
    yield from ends(setting, model, device, batch)


def conditioning(setting: Setting, model: SkipBackbone, device: torch.device, batch: int) -> Iterator[Part]:
    """What depends on timestep and label alone."""
    s = setting.sizes
    width, depth, few = s["width"], s["depth"], blocks_of_reused(setting)
    yield Part(
        "timestep and labels", 1, 1, lambda t, y: model.t_embedder(t) + model.embed_labels(y, (batch,)), None,
        lambda: [inputs_of(setting, batch, device, HALF)[1:]], 2 * batch * (256 + width) * width,
        2 * (256 + width) * width,
    )  # fmt: skip
    yield Part(
        "adaLN vectors", depth, few, model.blocks[0].adaLN_modulation, None,
        lambda: tensors(device, 1, batch, 1, 1, width), 2 * batch * width * 6 * width, 12 * width * width,
    )  # fmt: skip


def norms(setting: Setting, device: torch.device, batch: int) -> Iterator[Part]:
    """Passes over the hidden states."""
    s = setting.sizes
    shape, depth, few = (batch, s["frames"], s["patches"], s["width"]), s["depth"], blocks_of_reused(setting)
    values = math.prod(shape)
    shift, scale, gate = tensors(device, 1, batch, 1, 1, 3 * s["width"])[0][0].chunk(3, dim=-1)

    def inputs() -> list[tuple]:
        return tensors(device, 2, *shape)

    yield Part(
        "LayerNorm + modulate", depth + 1, few + 1, lambda x, y: kernels.norm_modulate(x, shift, scale, NORM_EPS),
        lambda x, y: kernels.fused_norm_modulate(x, shift, scale, NORM_EPS), inputs, 0, 4 * values,
    )  # fmt: skip
    yield Part(
        "gate + residual + LayerNorm + modulate", depth, few,
        lambda x, y: kernels.gate_residual_norm(x, gate, y, shift, scale, NORM_EPS),
        lambda x, y: kernels.fused_gate_residual_norm(x, gate, y, shift, scale, NORM_EPS), inputs, 0, 8 * values,
    )  # fmt: skip
    yield Part(
        "gate + residual", depth, few, lambda x, y: kernels.gate_residual(x, gate, y),
        lambda x, y: kernels.fused_gate_residual(x, gate, y), inputs, 0, 6 * values,
    )  # fmt: skip


def linears(setting: Setting, model: SkipBackbone, device: torch.device, batch: int) -> Iterator[Part]:
    """The four linear layers of a block."""
    s, block = setting.sizes, model.blocks[0]
    rows, width, hidden = batch * s["frames"] * s["patches"], s["width"], s["hidden"]
    depth, few, fc1 = s["depth"], blocks_of_reused(setting), block.mlp.fc1

    def inputs() -> list[tuple]:
        return tensors(device, 1, rows, width)

    yield linear("qkv linear", depth, few, block.attn.qkv, rows, inputs)
    yield linear("projection linear", depth, few, block.attn.proj, rows, inputs)
    yield Part(
        "MLP first linear + GELU", depth, few, lambda x: kernels.linear_gelu(x, fc1.weight, fc1.bias),
        lambda x: kernels.fused_linear_gelu(x, fc1.weight, fc1.bias), inputs, 2 * rows * width * hidden,
        2 * (rows * width + rows * hidden + width * hidden),
    )  # fmt: skip
    yield linear("MLP second linear", depth, few, block.mlp.fc2, rows, lambda: tensors(device, 1, rows, hidden))


def linear(
    name: str, full: int, reused: int, layer: torch.nn.Linear, rows: int, inputs: Callable[[], list[tuple]]
) -> Part:
    outer, inner = layer.weight.shape
    moved = 2 * (rows * (inner + outer) + inner * outer)
    call = lambda x: F.linear(x, layer.weight, layer.bias)  # noqa: E731
    return Part(name, full, reused, call, None, inputs, 2 * rows * inner * outer, moved)


def attentions(setting: Setting, device: torch.device, batch: int) -> Iterator[Part]:
    """Along both axes, without the linear layers around them."""
    s = setting.sizes
    frames, patches, width, heads = s["frames"], s["patches"], s["width"], s["heads"]
    values, units, few = batch * frames * patches * width, s["depth"] // 2, blocks_of_reused(setting)

    def inputs() -> list[tuple]:
        return tensors(device, 1, batch, frames, patches, 3, heads, width // heads)

    yield Part(
        "spatial attention", units, few // 2, lambda qkv: kernels.attention(qkv, -2), None, inputs,
        4 * values * patches, 8 * values,
    )  # fmt: skip
    yield Part(
        "temporal attention", units, few // 2, lambda qkv: kernels.attention(qkv, -3),
        lambda qkv: kernels.fused_attention(qkv, -3), inputs, 4 * values * frames, 8 * values,
    )  # fmt: skip


def ends(setting: Setting, model: SkipBackbone, device: torch.device, batch: int) -> Iterator[Part]:
    """What comes before, between and after the blocks, and the sampler's own step."""
    s, final = setting.sizes, model.final_layer.linear
    grid, width = (batch, s["frames"], s["patches"]), s["width"]
    tokens = math.prod(grid)
    over = dict(setting.overrides)
    in_patch = model.config.in_channels * model.config.patch_size**2
    sample = (model.config.in_channels, over["num_frames"], over["sample_size"], over["sample_size"])
    yield Part(
        "patch embedding", 1, 1, model.x_embedder, None,
        lambda: [(inputs_of(setting, batch, device, HALF)[0].transpose(1, 2).flatten(0, 1),)],
        2 * tokens * in_patch * width, 2 * tokens * width,
    )  # fmt: skip
    yield Part(
        "skip fusion", s["depth"] // 4, setting.shallow, lambda x, y: model.fuse_skip(0, x, y), None,
        lambda: tensors(device, 2, *grid, width), 2 * tokens * 2 * width * width,
        2 * (3 * tokens * width + 2 * width * width),
    )  # fmt: skip
    yield Part(
        "final linear", 1, 1, final, None, lambda: tensors(device, 1, *grid, width),
        2 * tokens * width * final.out_features, 2 * tokens * width,
    )  # fmt: skip
    yield Part(
        "guidance and DDIM", 1, 1, lambda x, n: 1.01 * x - 0.02 * (n + 7.0 * (x - n)), None,
        lambda: [tuple(torch.randn(batch // 2, *sample, device=device) for _ in range(2))], 0,
        12 * (batch // 2) * math.prod(sample),
    )  # fmt: skip


def blocks_of_reused(setting: Setting) -> int:
    return 4 * setting.shallow


def tensors(device: torch.device, count: int, *shape: int) -> list[tuple]:
    """Two copies of the arguments, so many random tensors of a shape."""
    return [tuple(torch.randn(shape, device=device).to(HALF) for _ in range(count)) for _ in range(2)]
