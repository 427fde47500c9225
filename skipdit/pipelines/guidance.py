"""Classifier-free guidance."""

import torch

__all__ = ["guide"]


def guide(prediction: torch.Tensor, guidance_scale: float, channels: int) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on the first channels of a batch [cond, uncond].

    The other channels (a learned variance; the published image model's fourth latent channel) keep the conditional
    value.

    Args:
        prediction: [2B, 2C or C, ...].
        channels: How many channels are guided.

    Returns:
        [B, 2C or C, ...].
    """
    cond, uncond = prediction.chunk(2)
    guided = uncond[:, :channels] + guidance_scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, channels:]], dim=1)
