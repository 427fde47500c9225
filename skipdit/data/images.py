"""Pictures in one folder a class, as ImageNet has them."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .clips import CLASSES, Entry, generator
from .decoding import read_image
from .files import class_folders, find_images
from .transforms import fit, sides

__all__ = ["ImageDataset"]


class ImageDataset(Dataset):
    """Pictures below a folder, resized to cover the size and cropped at the centre.

    Args:
        root: Folder of the set, `<root>/<class>/*.JPEG` (any depth below the class, any of the usual formats).
        size: Pixels of a side, or (height, width).
        flip: Mirror half of the pictures.
        classes: "folders": the class is the folder right below the root, numbered in sorted order; "none".
        seed: Of the random choices.
        max_bad_share: Share of unreadable pictures above which a training run stops, 0..1.

    Attributes:
        entries: The pictures; whether they can be read is seen when they are.
        class_names: In order; None without classes.

    Raises:
        UserError: The folder is not there or holds no pictures.
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | tuple[int, int] = 256,
        flip: bool = True,
        classes: str = "folders",
        seed: int = 0,
        max_bad_share: float = 0.05,
    ):
        if classes not in CLASSES:
            raise ValueError(f"classes must be one of {', '.join(CLASSES)}, not {classes!r}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], not {max_bad_share}.")
        self.root, self.size, self.flip, self.seed = Path(root), sides(size), flip, seed
        self.max_bad_share = max_bad_share
        paths = find_images(self.root)
        self.class_names = class_folders(self.root, paths) if classes == "folders" else None
        numbers = {name: number for number, name in enumerate(self.class_names or ())}
        self.entries = [Entry(path, numbers.get(path.relative_to(self.root).parts[0])) for path in paths]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """A picture with the random choice of an epoch.

        Returns:
            "video" float32 [3, H, W] in [-1, 1]; "class_label", an int (0 without classes).

        Raises:
            UnreadableError: The file cannot be decoded.
        """
        flip = bool(self.flip and generator(self.seed, epoch, index).integers(2))
        return {"video": self.frames(index, [0], flip)[0], "class_label": self.entries[index].class_label or 0}

    def frames(self, index: int, indices: list[int], flip: bool = False) -> torch.Tensor:
        """The picture as a clip of one frame: float32 [1, 3, H, W] in [-1, 1]."""
        return fit(read_image(self.entries[index].path)[None], self.size, flip)
