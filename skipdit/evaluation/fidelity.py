"""How close clips sampled with Skip-Cache stay to the same clips sampled without it: PSNR and SSIM."""

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

__all__ = ["psnr", "ssim"]


def psnr(clips: torch.Tensor, references: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each clip: 10 log10(data_range^2 / MSE over all its frames).

    Args:
        clips: [B, T, C, H, W], or [B, C, H, W] for pictures.
        references: The same shape.
        data_range: Distance between black and white: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.

    Returns:
        Decibels [B]; infinite for equal clips.

    Raises:
        ValueError: The shapes differ.
    """
    _check_pair(clips, references)
    axes = tuple(range(1, clips.dim()))
    pair = clips.double(), references.double()
    return peak_signal_noise_ratio(*pair, data_range, reduction="none", dim=axes).float()


def ssim(clips: torch.Tensor, references: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window, sigma 1.5), averaged over each clip's frames.

    Args:
        clips: [B, T, C, H, W], or [B, C, H, W] for pictures; sides of at least 6 pixels.
        references: The same shape.
        data_range: Distance between black and white: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.

    Returns:
        Values up to 1 (equal clips) [B].

    Raises:
        ValueError: The shapes differ.
    """
    _check_pair(clips, references)
    batch = clips.shape[0]
    # In float64: SSIM's variances are small differences of squares.
    pair = (x.double().reshape(-1, *x.shape[-3:]) for x in (clips, references))
    per_frame = structural_similarity_index_measure(*pair, sigma=1.5, reduction="none", data_range=data_range)
    return per_frame.reshape(batch, -1).mean(dim=1).float()


def _check_pair(clips: torch.Tensor, references: torch.Tensor) -> None:
    if clips.shape != references.shape or clips.dim() not in (4, 5):
        raise ValueError(
            f"Clips {list(clips.shape)} and references {list(references.shape)} must have one shape, "
            "[B, T, C, H, W] or [B, C, H, W]."
        )
