"""Moving handwritten digits: a small real data set that needs no download.

scikit-learn carries 1797 handwritten digits of 8x8 pixels (UCI optdigits). A clip shows one of them drifting
over a black canvas and bouncing off the walls, after Moving MNIST (Srivastava et al., 2015); its class is the
digit.
"""

from functools import lru_cache
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["DIGIT_NAMES", "DigitClip", "MovingDigits"]

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

_SOURCE_SIDE = 8  # pixels of a scikit-learn digit
_FOOTPRINT = _SOURCE_SIDE + 1  # with half a pixel on each side, over which interpolation fades the ink
_SPLITS = ("train", "test")
_TEST_EVERY = 5  # every fifth image of each class is held out


class DigitClip(TypedDict):
    """One item: `video` float32 [T, 3, H, W] in [-1, 1] and its `class_label` in 0..9."""

    video: torch.Tensor
    class_label: int


@lru_cache(maxsize=len(_SPLITS))
def digit_images(split: str) -> tuple[np.ndarray, ...]:
    """Returns the images of one split, for each class an array float32 [N, 8, 8] with ink in [0, 1]."""
    from sklearn.datasets import load_digits  # here, for it takes a second to import

    source = load_digits()
    images = (source.images / 16.0).astype(np.float32)
    by_class = [images[source.target == digit] for digit in range(len(DIGIT_NAMES))]
    held_out = [np.arange(len(group)) % _TEST_EVERY == _TEST_EVERY - 1 for group in by_class]
    return tuple(group[mask if split == "test" else ~mask] for group, mask in zip(by_class, held_out, strict=True))


class MovingDigits(Dataset):
    """Clips of one handwritten digit each, moving at constant speed and bouncing off the walls.

    Class, image, start and velocity of item i are drawn from (seed, split, i) alone, so items are the same
    whatever the order or the number of workers. Classes are drawn uniformly, then an image of that class.

    Args:
        num_frames: frames of a clip, T.
        size: canvas side in pixels, or (height, width).
        length: number of clips.
        seed: any non-negative integer; another seed gives other clips.
        split: "train" or "test"; the two share no digit image.
        digit_size: side in pixels of the square that holds the whole digit; None for 20 on a canvas of 32, in
            proportion to the canvas's shorter side.
        speed: lowest and highest speed in pixels per frame; None for 0.5 to 1.5 on a canvas of 32, in
            proportion.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> MovingDigits(length=10)[0]["video"].shape
        torch.Size([16, 3, 32, 32])
    """

    def __init__(
        self,
        num_frames: int = 16,
        size: int | tuple[int, int] = 32,
        length: int = 100_000,
        seed: int = 0,
        split: str = "train",
        digit_size: float | None = None,
        speed: tuple[float, float] | None = None,
    ):
        self.class_names = list(DIGIT_NAMES)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2:
            raise ValueError(f"size must be one side or (height, width), not {size}.")
        self.height, self.width = sides
        shorter = min(self.height, self.width)
        self.num_frames, self.length, self.seed, self.split = num_frames, length, seed, split
        self.digit_size = round(shorter * 20 / 32) if digit_size is None else digit_size
        self.speed = (shorter * 0.5 / 32, shorter * 1.5 / 32) if speed is None else speed
        self._check()

    def _check(self) -> None:
        for name, lowest in (("num_frames", 1), ("length", 0), ("height", 8), ("width", 8), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {getattr(self, name)}.")
        if self.split not in _SPLITS:
            raise ValueError(f"split must be 'train' or 'test', not {self.split!r}.")
        if not 4 <= self.digit_size <= min(self.height, self.width):
            raise ValueError(
                f"digit_size must be at least 4 and fit the canvas of {self.height}x{self.width} pixels, "
                f"not {self.digit_size}."
            )
        if not 0 <= self.speed[0] <= self.speed[1]:
            raise ValueError(f"speed must be (lowest, highest) with 0 <= lowest <= highest, not {self.speed}.")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> DigitClip:
        if not -self.length <= index < self.length:
            raise IndexError(f"There is no item {index}: the data set has {self.length}.")
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), index % self.length))
        label = int(rng.integers(len(DIGIT_NAMES)))
        images = digit_images(self.split)[label]
        image = images[rng.integers(len(images))]
        frames = self._render(image, *self._path(rng))
        video = torch.from_numpy(frames * 2 - 1)[:, None].expand(-1, 3, -1, -1)
        return {"video": video.contiguous(), "class_label": label}

    def _path(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws a path; returns the digit's top and left edge in each frame, in pixels, each [T]."""
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*self.speed)
        free = np.array([self.height - self.digit_size, self.width - self.digit_size], np.float64)
        start = rng.uniform(0, 1, 2) * free
        velocity = speed * np.array([np.sin(angle), np.cos(angle)])
        straight = start + np.arange(self.num_frames)[:, None] * velocity
        # A bounce is the straight path folded back into the free space: a triangle wave of period 2 * free.
        period = np.maximum(2 * free, 1e-9)
        top, left = (free - np.abs(straight % period - free)).T
        return top, left

    def _render(self, image: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Draws image [8, 8] from corners (top, left), each [T], on; returns ink [T, H, W] in [0, 1]."""
        scale = self.digit_size / _FOOTPRINT
        rows = _interpolation(top, self.height, scale)
        columns = _interpolation(left, self.width, scale)
        return np.clip(rows @ image @ columns.transpose(0, 2, 1), 0, 1)


def _interpolation(offset: np.ndarray, canvas: int, scale: float) -> np.ndarray:
    """Returns the weights [T, canvas, 8] of the source pixels in each canvas pixel, along one axis.

    Cubic convolution (Keys, 1981), evaluated at the exact offset: the digit moves by fractions of a pixel
    without changing shape. Below one canvas pixel per source pixel the kernel is widened, against aliasing.
    """
    canvas_centers = np.arange(canvas, dtype=np.float32) + 0.5
    positions = (canvas_centers - offset.astype(np.float32)[:, None]) / np.float32(scale)
    source_centers = np.arange(_SOURCE_SIDE, dtype=np.float32) + (_FOOTPRINT - _SOURCE_SIDE + 1) / 2
    width = max(1.0, 1 / scale)
    x = np.abs(positions[..., None] - source_centers) / np.float32(width)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0)).astype(np.float32) / np.float32(width)
