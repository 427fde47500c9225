"""Pixels to what a network takes: resized, cropped, in [-1, 1]."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

__all__ = ["fit", "sides"]


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number.

    Raises:
        ValueError: It is neither.
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(isinstance(side, int) and side >= 1 for side in both):
        raise ValueError(f"size must be one side or (height, width), not {size}.")
    return both


def fit(frames: NDArray[np.uint8], size: tuple[int, int], flip: bool = False) -> torch.Tensor:
    """Resize so that the frame just covers the size (antialiased, bilinear), crop its centre, maybe mirror it.

    Args:
        frames: [n, H, W, 3].
        size: (height, width).
        flip: Mirror left and right.

    Returns:
        float32 [n, 3, height, width] in [-1, 1].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    height, width = pixels.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        target = [max(wanted, round(side * scale)) for wanted, side in zip(size, (height, width), strict=True)]
        pixels = F.interpolate(pixels, target, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape[-2:], size, strict=True))
    pixels = pixels[..., top : top + size[0], left : left + size[1]]
    if flip:
        pixels = pixels.flip(-1)
    return (pixels / 127.5 - 1).clamp(-1, 1).contiguous()
