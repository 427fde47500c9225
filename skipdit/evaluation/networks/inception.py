"""The Inception-v3 of 2015 whose pooled features FID and KID compare, as TorchScript, and the resize it was given.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017:
features are the last average pooling (2048 numbers). The graph of 2015 resizes by itself, without half-pixel centres
and without antialiasing; other resizes shift FID (Parmar et al., "On Aliased Resizing and Surprising Subtleties in
GAN Evaluation", CVPR 2022), so the same one is made here.
"""

import torch

__all__ = ["SIDE", "prepare", "resize_as_tensorflow"]

SIDE = 299


def resize_as_tensorflow(images: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear resize as TensorFlow 1 does by default: output pixel i reads at i * (old side / new side).

    Args:
        images: [B, C, H, W], floating point.
        side: The new height and width.

    Returns:
        [B, C, side, side].
    """
    for axis in (2, 3):
        low, high, share = _taps(images.shape[axis], side, images.device)
        share = share.to(images.dtype).reshape(-1, *[1] * (3 - axis))
        below = images.index_select(axis, low)
        images = below + (images.index_select(axis, high) - below) * share
    return images


def _taps(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each new pixel: the two old ones that it lies between, and how near it is to the second, in [0, 1)."""
    position = torch.arange(new, device=device, dtype=torch.float64) * (old / new)
    low = position.long()
    return low, (low + 1).clamp(max=old - 1), position - low


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Pictures as the network takes them.

    Args:
        images: uint8 [B, H, W, 3].

    Returns:
        float32 [B, 3, 299, 299], (value - 128) / 128, as the graph of 2015 has it: [-1, 0.992].
    """
    return (resize_as_tensorflow(images.permute(0, 3, 1, 2).float(), SIDE) - 128) / 128
