"""Does a generated clip show the digit that was asked for? A classifier trained on real clips reads it."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from ..data import DIGIT_NAMES, MovingDigits

__all__ = ["NO_DIGIT", "DigitClassifier", "generated_accuracy"]

NO_DIGIT = -1
"""What a clip without ink is read as: no class, so it never counts as right."""

_BACKGROUND = 0.1  # ink below this counts as black, so that faint noise does not pull the centre of mass
_PATCH = 10  # side of the patch that the network reads, in averages of 2x2 samples
_PATCH_SHARE = 20 / 32  # of the canvas's shorter side, which is what MovingDigits gives a digit


class DigitClassifier:
    """Reads clips of moving digits: frames by a small network, a clip by its mean log-probabilities.

    A frame's digit is found by its centre of mass, so place and motion do not matter.

    Example:
        >>> classifier = DigitClassifier.fit_on_real()
        >>> classifier.predict(pipe(class_labels=[3, 7], output_type="pt").frames)
        tensor([3, 7])
    """

    def __init__(self, network, size: tuple[int, int]):
        self._network = network  # a fitted scikit-learn classifier with `predict_proba`
        self.size = size

    @classmethod
    def fit_on_real(
        cls, size: int | tuple[int, int] = 32, num_examples: int = 8000, seed: int = 0
    ) -> "DigitClassifier":
        """Trains on frames of real clips of the train split; takes about three seconds on one core.

        Args:
            size: side of the canvas in pixels, or (height, width): that of the clips to be read.
            num_examples: frames, each with its own digit and place.
            seed: of the frames and of the network; the same seed gives the same classifier.
        """
        from sklearn.neural_network import MLPClassifier

        frames = MovingDigits(num_frames=1, size=size, length=num_examples, seed=seed)
        items = [frames[i] for i in range(len(frames))]
        patches, _ = _patches((torch.stack([item["video"] for item in items]) + 1) / 2)
        labels = [item["class_label"] for item in items]
        network = MLPClassifier((128,), alpha=1e-3, batch_size=100, max_iter=25, tol=0, random_state=seed)
        return cls(_fitted(network, patches[:, 0], labels), (frames.height, frames.width))

    def predict(self, clips: torch.Tensor) -> torch.Tensor:
        """Reads clips [B, T, 3, H, W], in [0, 1] or uint8.

        Returns:
            Classes, int64 [B]; NO_DIGIT for a blank clip.

        Raises:
            ValueError: another shape, another frame size than that of the training, or values out of range.
        """
        clips = _in_unit_range(clips, self.size)
        if not clips.numel():
            return torch.full((len(clips),), NO_DIGIT)
        patches, blank = _patches(clips)
        frames = self._network.predict_proba(patches.reshape(-1, patches.shape[-1]))
        scores = np.log(frames.clip(1e-6)).reshape(*patches.shape[:2], -1).mean(1)
        classes = torch.from_numpy(self._network.classes_[scores.argmax(1)].astype(np.int64))
        return classes.masked_fill(blank, NO_DIGIT)

    def accuracy(self, clips: torch.Tensor, labels: Sequence[int] | torch.Tensor) -> float:
        """Returns the share of clips, as `predict` takes them, that are read as their labels [B]."""
        return (self.predict(clips) == torch.as_tensor(labels)).double().mean().item()


def generated_accuracy(clips: torch.Tensor, labels: Sequence[int] | torch.Tensor, seed: int = 0) -> dict:
    """Reads generated clips with a classifier trained on real ones.

    Args:
        clips: [B, T, 3, H, W], in [0, 1] or uint8.
        labels: the classes that were asked for, [B].
        seed: of the classifier.

    Returns:
        `accuracy` in [0, 1]; `per_class`: the same by digit name, of the classes asked for; `clips`: B.

    Raises:
        ValueError: as `DigitClassifier.predict`; or not one label for each clip.
    """
    labels = torch.as_tensor(labels)
    if labels.shape != clips.shape[:1] or not len(labels):
        raise ValueError(f"One label for each clip is needed, not {tuple(labels.shape)} for {len(clips)} clips.")
    right = _classifier(tuple(clips.shape[-2:]), seed).predict(clips) == labels
    return {
        "accuracy": right.double().mean().item(),
        "per_class": {DIGIT_NAMES[i]: right[labels == i].double().mean().item() for i in labels.unique()},
        "clips": len(labels),
    }


@lru_cache(maxsize=4)
def _classifier(size: tuple[int, int], seed: int) -> DigitClassifier:
    return DigitClassifier.fit_on_real(size=size, seed=seed)


def _fitted(network, patches: np.ndarray, labels: list[int]):
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of passes is meant
        return network.fit(patches, labels)


def _in_unit_range(clips: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if clips.ndim != 5 or clips.shape[2] != 3 or tuple(clips.shape[3:]) != size:
        raise ValueError(f"Clips must be [B, T, 3, {size[0]}, {size[1]}], not {list(clips.shape)}.")
    if clips.dtype == torch.uint8:
        return clips.float() / 255
    clips = clips.float()
    if clips.numel() and not (clips.min() >= -1e-3 and clips.max() <= 1 + 1e-3):
        raise ValueError(f"Clips must be in [0, 1], not [{clips.min():.2f}, {clips.max():.2f}].")
    return clips


def _patches(clips: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Cuts out the digit of each frame of clips [B, T, 3, H, W] in [0, 1].

    Returns:
        Patches [B, T, _PATCH**2] in [0, 1] around the ink's centre of mass; which clips are blank, [B].
    """
    batch, frames, _, height, width = clips.shape
    ink = clips.mean(2).flatten(0, 1)
    solid = ink * (ink > _BACKGROUND)
    mass = solid.sum((1, 2))
    # Centres in the coordinates of grid_sample: -1 and 1 are the canvas's edges.
    y = (torch.arange(height, device=ink.device) + 0.5) * 2 / height - 1
    x = (torch.arange(width, device=ink.device) + 0.5) * 2 / width - 1
    center_y = (solid.sum(2) @ y) / mass.clamp(min=1e-6)
    center_x = (solid.sum(1) @ x) / mass.clamp(min=1e-6)
    side = _PATCH_SHARE * min(height, width)
    zero = torch.zeros_like(mass)
    window = torch.stack(
        [
            torch.stack([zero + side / width, zero, center_x], 1),
            torch.stack([zero, zero + side / height, center_y], 1),
        ],
        1,
    )
    grid = F.affine_grid(window, [len(ink), 1, 2 * _PATCH, 2 * _PATCH], align_corners=False)
    patches = F.avg_pool2d(F.grid_sample(ink[:, None], grid, align_corners=False), 2)
    blank = (mass.view(batch, frames) == 0).all(1).cpu()
    return patches.reshape(batch, frames, -1).cpu().numpy(), blank
