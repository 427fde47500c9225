"""Data sets: items are {"video": float32 [T, 3, H, W] in [-1, 1], "class_label": int}."""

from .digits import DIGIT_NAMES, MovingDigits

__all__ = ["DIGIT_NAMES", "MovingDigits"]
