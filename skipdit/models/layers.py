"""The parts that DiT and Latte share: embeddings, attention, the adaLN-Zero block, the skip fusion, the final layer.

Parameter names are those of the published checkpoints, so that these load with ``strict=True``.
Axes in comments and docstrings: B batch, F frames, P patches of one frame, D hidden size, H heads.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from ..kernels import (
    KERNELS,
    Float8Linear,
    attention,
    float8_available,
    fused_attention,
    fused_gate_residual,
    fused_gate_residual_norm,
    fused_linear_gelu,
    fused_norm_modulate,
    gate_residual,
    gate_residual_norm,
    norm_modulate,
)

NORM_EPS = 1e-6


def use_kernels(model: nn.Module, names: Collection[str] = KERNELS) -> None:
    """Let a model's layers use the kernels of `skipdit.kernels` where these run; an empty list turns them off.

    Args:
        model: A backbone, or a part of one.
        names: Some of "attention" (over at most 64 frames or patches, 16 in float32), "norm" (LayerNorm, modulation,
            gates and residuals), "mlp" (GELU in the matrix product, without gradients).

    Raises:
        ValueError: A name is not known.
    """
    if unknown := set(names) - set(KERNELS):
        raise ValueError(f"No kernel {sorted(unknown)[0]!r}: choose from {', '.join(KERNELS)}.")
    for module in model.modules():
        if isinstance(module, Attention | Mlp | Block | FinalLayer):
            module.kernels = tuple(names)


def use_float8(model: nn.Module, names: Collection[str] = ("attention", "mlp")) -> None:
    """Replace linear layers of a model's blocks by float8 ones, for good: faster inference, less exact.

    The layers that condition, embed and give the output stay as they are. The model is in its dtype and on its device
    already; it can be neither trained, saved nor cast afterwards.

    Args:
        model: A backbone, or a part of one.
        names: Some of "attention" (its two layers), "mlp" and "skips".

    Raises:
        ValueError: A name is not known, the device has no products of float8, or a size is no multiple of 16.
    """
    places = _float8_places(model, names)
    replaced = [Float8Linear(getattr(*place)) for place in places]  # all of them before the first takes its place
    for (module, layer), linear in zip(places, replaced, strict=True):
        setattr(module, layer, linear)


def check_float8(model: nn.Module, names: Collection[str]) -> None:
    """Raise ValueError, in one sentence, where `use_float8` would."""
    for place in _float8_places(model, names):
        Float8Linear.check_size(getattr(*place))


def _float8_places(model: nn.Module, names: Collection[str]) -> list[tuple[nn.Module, str]]:
    if unknown := set(names) - set(FLOAT8_LAYERS):
        raise ValueError(f"No float8 layers {sorted(unknown)[0]!r}: choose from {', '.join(FLOAT8_LAYERS)}.")
    can, reason = float8_available(next(model.parameters()).device)
    if not can:
        raise ValueError(f"Linear layers cannot run in float8: {reason}.")
    chosen = dict(FLOAT8_LAYERS[name] for name in names)
    return [(module, layer) for module in model.modules() for layer in chosen.get(type(module), ())]


def sincos_1d(dim: int, positions: torch.Tensor) -> torch.Tensor:
    """Fixed sine-cosine embedding of positions [N] -> [N, dim] in float64, sines first (Vaswani et al. 2017).

    Computed where the positions are: on the CPU, for not every device has float64.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim // 2))
    angles = positions.to(torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, height: int, width: int) -> torch.Tensor:
    """Fixed 2-D embedding [height * width, dim] in float64: the width coordinate fills the first half, as in MAE."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return torch.cat([sincos_1d(dim // 2, columns), sincos_1d(dim // 2, rows)], dim=1)


class TimestepEmbedder(nn.Module):
    """Timesteps [B] (0..999, fractions allowed) -> [B, D]: 256 sinusoids, cosines first, then Linear-SiLU-Linear."""

    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        half = self.frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep[:, None].float() * torch.exp(-math.log(10000) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class indices -> [..., D]. The table's last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, class_labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(class_labels)


class PatchEmbed(nn.Module):
    """Latents [N, C, height, width] -> patch tokens [N, P, D], P = (height / p) * (width / p)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention along one axis of [..., D]; every other axis counts as batch.

    The mixin only marks it as an attention layer, so that diffusers' attention caches find it.
    """

    processor = None  # diffusers' attention backends have nothing to set here
    kernels: tuple[str, ...] = ()

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, axis: int = -2) -> torch.Tensor:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        attend = fused_attention if "attention" in self.kernels else attention
        return self.proj(attend(qkv, axis))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear on the last axis."""

    kernels: tuple[str, ...] = ()

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if "mlp" in self.kernels and type(self.fc1) is nn.Linear:  # not one that LoRA or a quantiser has wrapped
            return self.fc2(fused_linear_gelu(hidden_states, self.fc1.weight, self.fc1.bias))
        return self.fc2(self.act(self.fc1(hidden_states)))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles & Xie 2022, section 3.2).

    Spatial and temporal blocks are the same class: `axis` says along which axis attention runs. The conditioning
    broadcasts against the hidden states, so one vector serves all patches (and frames) of a sample. The norms have no
    weights: adaLN gives them.
    """

    kernels: tuple[str, ...] = ()

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        axis: int = -2,
        position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, (F,) P, D], conditioning [B, (1 or F,) 1, D]; `position` is added to the input."""
        if position is not None:
            hidden_states = hidden_states + position
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(conditioning).chunk(6, dim=-1)
        if "norm" in self.kernels:
            norm, add_norm, add = fused_norm_modulate, fused_gate_residual_norm, fused_gate_residual
        else:
            norm, add_norm, add = norm_modulate, gate_residual_norm, gate_residual
        attended = self.attn(norm(hidden_states, shift_a, scale_a, NORM_EPS), axis)
        hidden_states, normed = add_norm(hidden_states, gate_a, attended, shift_m, scale_m, NORM_EPS)
        return add(hidden_states, gate_m, self.mlp(normed))


class SkipNorm(nn.LayerNorm):
    """Affine LayerNorm over the joined features, computed in float32 whatever the input's dtype."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(hidden_states.dtype)


class SkipLinear(nn.Module):
    """Joined features [..., 2D] -> [..., D]; a module of its own because checkpoints name it ``.linear``."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, joined: torch.Tensor) -> torch.Tensor:
        return self.linear(joined)


def join_skip(
    norm: SkipNorm, linear: SkipLinear, hidden_states: torch.Tensor, skip: torch.Tensor, residual: bool
) -> torch.Tensor:
    """Join a deep input with an early output, both [..., D]; `residual` adds the fusion to the input."""
    fused = linear(norm(torch.cat([hidden_states, skip], dim=-1)))
    return hidden_states + fused if residual else fused


class FinalLayer(nn.Module):
    """Tokens [..., P, D] -> [..., P, patch * patch * out_channels]."""

    kernels: tuple[str, ...] = ()

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        norm = fused_norm_modulate if "norm" in self.kernels else norm_modulate
        return self.linear(norm(hidden_states, shift, scale, NORM_EPS))


FLOAT8_LAYERS = {
    "attention": (Attention, ("qkv", "proj")),
    "mlp": (Mlp, ("fc1", "fc2")),
    "skips": (SkipLinear, ("linear",)),
}
