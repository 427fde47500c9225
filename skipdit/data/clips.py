"""Clips of real videos: files or folders of frames, with or without classes, alone or with joint images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import UserError
from .decoding import open_source, read_image
from .files import check_rejected, class_folders, find_clips, read_list
from .index import count_frames, default_store
from .transforms import fit, sides

__all__ = ["ClipDataset", "ClipDraw", "Entry", "check_counts", "draw_clip", "draw_image", "generator"]

CLASSES = ("folders", "none")


@dataclass(frozen=True)
class Entry:
    """One clip or picture.

    Attributes:
        path: A video file, a folder of frames, or a picture.
        class_label: From 0; None in a set without classes.
        frames: Of the whole file.
    """

    path: Path
    class_label: int | None
    frames: int = 1


@dataclass(frozen=True)
class ClipDraw:
    """What is random about an item: the frames it shows, and whether they are mirrored."""

    indices: list[int]
    flip: bool


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Randomness of one item of one epoch, whatever the number of workers or processes."""
    return np.random.default_rng((seed, epoch, index))


def draw_clip(rng: np.random.Generator, length: int, num_frames: int, frame_interval: int, may_flip: bool) -> ClipDraw:
    """Pick `num_frames * frame_interval` consecutive frames of `length` anywhere, then evenly spaced ones of them."""
    span = num_frames * frame_interval
    start = int(rng.integers(length - span + 1))  # the last start is as likely as the others
    indices = np.linspace(start, start + span - 1, num_frames, dtype=int).tolist()
    return ClipDraw(indices, bool(may_flip and rng.integers(2)))


def draw_image(rng: np.random.Generator, entries: Sequence[Entry], may_flip: bool) -> tuple[int, int, bool]:
    """Pick one frame of any clip: (entry, frame, mirrored)."""
    flip = bool(may_flip and rng.integers(2))
    index = int(rng.integers(len(entries)))
    return index, int(rng.integers(entries[index].frames)), flip


def check_counts(**values: tuple[int, int]) -> None:
    """Raise ValueError for a value below its least: name=(value, least)."""
    for name, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}.")


class ClipDataset(Dataset):
    """Clips below a folder: UCF101's class folders or split lists, any tree of videos or of frame folders.

    The frames of each clip are counted once and kept in `cache_dir`. Clips that are damaged, empty or too short are
    left out, counted and named in the log. More than `max_bad_share` of damaged ones stop everything, as does an empty
    rest.

    Args:
        root: Folder of the set.
        num_frames: Frames of an item, T.
        frame_interval: Every how many-th frame is taken.
        size: Pixels of a side, or (height, width).
        flip: Mirror half of the clips.
        classes: "folders": the class is the folder right below the root, numbered in sorted order; "none".
        split: A list of files relative to the root, such as UCF101's trainlist01.txt; None: all.
        images: Independent frames of random clips appended to each item, each with its own class label.
        image_list: Where these come from instead: a list of pictures ("v_Archery_g01_c01/000012.jpg") below
            `image_root`; in a set with classes a picture's class is the second "_" field of its video's name.
        image_root: Folder of that list's pictures; None: the root.
        seed: Of the random choices.
        max_bad_share: Of damaged clips, 0..1; those that are merely too short do not count.
        index: File that keeps the frame counts; None: one in `cache_dir`.
        cache_dir: Folder for the frame counts (a training run gives its own); None: they are not kept.

    Attributes:
        entries: The clips that can be used.
        class_names: In order; None without classes.
        rejected: (path, reason) of the others.

    Raises:
        UserError: The folder or a list is not there, empty, or names what does not exist; too many bad clips.
        ValueError: An argument out of its range.

    Example:
        >>> ClipDataset("data/UCF101", frame_interval=3)[0]["video"].shape
        torch.Size([16, 3, 256, 256])
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int = 16,
        frame_interval: int = 1,
        size: int | tuple[int, int] = 256,
        flip: bool = True,
        classes: str = "folders",
        split: str | Path | None = None,
        images: int = 0,
        image_list: str | Path | None = None,
        image_root: str | Path | None = None,
        seed: int = 0,
        max_bad_share: float = 0.05,
        index: str | Path | None = None,
        cache_dir: str | Path | None = None,
    ):
        check_counts(num_frames=(num_frames, 1), frame_interval=(frame_interval, 1), images=(images, 0), seed=(seed, 0))
        if classes not in CLASSES:
            raise ValueError(f"classes must be one of {', '.join(CLASSES)}, not {classes!r}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], not {max_bad_share}.")
        if image_list is not None and not images:
            raise ValueError("image_list needs images, the number of joint frames.")
        if image_root is not None and image_list is None:
            raise ValueError("image_root needs image_list, the list of pictures below it.")
        self.root, self.num_frames, self.frame_interval = Path(root), num_frames, frame_interval
        self.size, self.flip, self.seed, self.images = sides(size), flip, seed, images
        self.max_bad_share = max_bad_share
        clips = find_clips(self.root)
        self.class_names = class_folders(self.root, clips) if classes == "folders" else None
        if split is not None:
            clips = read_list(Path(split), self.root)
        if index is None and cache_dir is not None:
            index = default_store(self.root, Path(cache_dir))
        self._index(clips, None if index is None else Path(index))
        self._pictures = self._read_pictures(image_list, image_root)

    def _index(self, clips: list[Path], store: Path | None) -> None:
        self.entries: list[Entry] = []
        self.rejected: list[tuple[Path, str]] = []
        damaged = 0
        span = self.num_frames * self.frame_interval
        counts = count_frames(self.root, clips, store)
        for path, frames in counts.items():
            if isinstance(frames, str):
                self.rejected.append((path, frames))
                damaged += 1
            elif frames < span:
                self.rejected.append((path, f"too short, {frames} of {span} frames"))
            else:
                self.entries.append(Entry(path, self._class_of(path), frames))
        check_rejected(self.rejected, damaged, len(clips), self.max_bad_share)

    def _class_of(self, path: Path) -> int | None:
        return None if self.class_names is None else self.class_names.index(path.relative_to(self.root).parts[0])

    def _read_pictures(self, image_list: str | Path | None, image_root: str | Path | None) -> list[Entry]:
        if image_list is None:
            return []
        paths = read_list(Path(image_list), self.root if image_root is None else Path(image_root))
        return [Entry(path, self._class_of_video(path.parent.name, path)) for path in paths]

    def _class_of_video(self, name: str, path: Path) -> int | None:
        if self.class_names is None:
            return None
        fields = name.split("_")
        # UCF101 has v_HandStandPushups_g01_c01 in the folder HandstandPushups.
        numbers = {name.casefold(): number for number, name in enumerate(self.class_names)}
        if len(fields) < 2 or fields[1].casefold() not in numbers:
            raise UserError(
                f"The class of {path} is not known: no class folder is called as the second '_' field of {name!r}."
            )
        return numbers[fields[1].casefold()]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """A clip with the random choices of an epoch.

        Returns:
            "video" float32 [T + images, 3, H, W] in [-1, 1]; "class_label", an int (0 without classes), with joint
            images int64 [1 + images].

        Raises:
            UnreadableError: A file cannot be decoded.
        """
        entry, rng = self.entries[index], generator(self.seed, epoch, index)
        drawn = draw_clip(rng, entry.frames, self.num_frames, self.frame_interval, self.flip)
        video = self.frames(index, drawn.indices, drawn.flip)
        label = entry.class_label or 0
        if not self.images:
            return {"video": video, "class_label": label}
        drawn_images = [self._image(rng) for _ in range(self.images)]
        labels = torch.tensor([label, *(label for _, label in drawn_images)])
        return {"video": torch.cat([video, *(picture for picture, _ in drawn_images)]), "class_label": labels}

    def frames(self, index: int, indices: list[int], flip: bool = False) -> torch.Tensor:
        """These frames of a clip, resized and cropped: float32 [n, 3, H, W] in [-1, 1].

        Raises:
            UnreadableError: They cannot be decoded.
        """
        return fit(open_source(self.entries[index].path).read(indices), self.size, flip)

    def _image(self, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        """One independent frame [1, 3, H, W] and its class."""
        entries = self._pictures or self.entries
        index, frame, flip = draw_image(rng, entries, self.flip)
        path = entries[index].path
        pixels = read_image(path)[None] if self._pictures else open_source(path).read([frame])
        return fit(pixels, self.size, flip), entries[index].class_label or 0
