"""How close clips stay to others made from the same noise: PSNR, SSIM, LPIPS; and how steady they are in time."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ..errors import UserError

FRAMES_AT_ONCE = 64

__all__ = ["check_networks", "fidelity", "lpips", "psnr", "ssim", "temporal_consistency"]


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


def temporal_consistency(clips: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """SSIM of each frame with the next, averaged over each clip: 1 for a still, low for flicker.

    Args:
        clips: [B, T, C, H, W], T at least 2.
        data_range: As for `ssim`.

    Raises:
        ValueError: Clips of one frame.
    """
    if clips.dim() != 5 or clips.shape[1] < 2:
        raise ValueError(f"Clips {list(clips.shape)} have no two frames.")
    return ssim(clips[:, 1:], clips[:, :-1], data_range)


def lpips(clips: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Learned perceptual distance (Zhang et al. 2018, AlexNet), averaged over each clip's frames.

    Args:
        clips: [B, T, 3, H, W] or [B, 3, H, W] in [0, 1].
        references: The same shape.

    Returns:
        [B], 0 for equal clips.

    Raises:
        UserError: torchvision, which brings the network, or its weights are not there.
        ValueError: The shapes differ.
    """
    _check_pair(clips, references)
    pairs = zip(*(x.reshape(-1, *x.shape[-3:]).float().split(FRAMES_AT_ONCE) for x in (clips, references)), strict=True)
    with torch.no_grad():
        values = torch.cat([_lpips_network()(one, other, normalize=True).flatten() for one, other in pairs])
    return values.reshape(len(clips), -1).mean(dim=1)


@lru_cache(maxsize=1)
def _lpips_network() -> torch.nn.Module:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity("alex").net
    except (ImportError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"lpips needs torchvision and its AlexNet weights ({reason}): pip install torchvision, or leave lpips out."
        ) from error


def check_networks(metrics: Sequence[str]) -> None:
    """Read the networks that metrics need, so that one that is missing is told before any work.

    Raises:
        UserError: As `lpips`.
    """
    if "lpips" in metrics:
        _lpips_network()


def fidelity(clips: torch.Tensor, references: torch.Tensor, metrics: list[str]) -> dict[str, torch.Tensor]:
    """Metrics of pairs by name ("psnr", "ssim", "temporal", "lpips"); "temporal_real" is that of the references.

    Args:
        clips: [B, T, 3, H, W] in [0, 1].
        references: The same shape.
        metrics: Names; others are left out.

    Returns:
        Name -> [B].
    """
    values: dict[str, torch.Tensor] = {}
    if "psnr" in metrics:
        values["psnr"] = psnr(clips, references)
    if "ssim" in metrics:
        values["ssim"] = ssim(clips, references)
    if "lpips" in metrics:
        values["lpips"] = lpips(clips, references)
    if "temporal" in metrics:
        values["temporal"] = temporal_consistency(clips)
        values["temporal_real"] = temporal_consistency(references)
    return values


def _check_pair(clips: torch.Tensor, references: torch.Tensor) -> None:
    if clips.shape != references.shape or clips.dim() not in (4, 5):
        raise ValueError(
            f"Clips {list(clips.shape)} and references {list(references.shape)} must have one shape, "
            "[B, T, C, H, W] or [B, C, H, W]."
        )
