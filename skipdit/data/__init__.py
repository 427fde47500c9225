"""Data sets: items are {"video": float32 [T, 3, H, W] in [-1, 1], "class_label": int}; pictures [3, H, W]."""

from .clips import ClipDataset
from .digits import DIGIT_NAMES, MovingDigits
from .images import ImageDataset
from .latents import LatentDataset

__all__ = ["DIGIT_NAMES", "ClipDataset", "ImageDataset", "LatentDataset", "MovingDigits"]
