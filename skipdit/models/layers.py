"""The parts that DiT and Latte share: embeddings, attention, the adaLN-Zero block, the skip fusion, the final layer.

Parameter names are those of the published checkpoints, so that these load with ``strict=True``.
Axes in comments and docstrings: B batch, F frames, P patches of one frame, D hidden size, H heads.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

NORM_EPS = 1e-6


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

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, axis: int = -2) -> torch.Tensor:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        # each [..., axis, ..., H, d] -> [..., H, axis, d]
        query, key, value = (t.movedim(axis - 1, -2) for t in qkv.unbind(-3))
        batch_axes = query.shape[:-3]
        query, key, value = (t.flatten(0, -4) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.unflatten(0, batch_axes).movedim(-2, axis - 1)
        return self.proj(attended.flatten(-2))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear on the last axis."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift by the conditioning; both broadcast over the patch axis."""
    return hidden_states * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (Peebles & Xie 2022, section 3.2).

    Spatial and temporal blocks are the same class: `axis` says along which axis attention runs. The conditioning
    broadcasts against the hidden states, so one vector serves all patches (and frames) of a sample.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
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
        attended = self.attn(modulate(self.norm1(hidden_states), shift_a, scale_a), axis)
        hidden_states = hidden_states + gate_a * attended
        return hidden_states + gate_m * self.mlp(modulate(self.norm2(hidden_states), shift_m, scale_m))


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


class FinalLayer(nn.Module):
    """Tokens [..., P, D] -> [..., P, patch * patch * out_channels]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(hidden_states), shift, scale))
