"""The two sides of a comparison: clips in the order in which they are looked at, and what they depend on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data import ClipDataset, ImageDataset, MovingDigits
from ..data.latents import hash_file
from ..data.transforms import fit
from ..errors import UnreadableError, UserError
from .arrays import array_shape, read_clips
from .identity import LOSSLESS, hash_entries, stored_as

__all__ = ["ArraySide", "DigitsSide", "FileSide", "Frames", "Side", "settings_of", "to_bytes"]

RESIZE = "bilinear, antialiased, centre crop"


@dataclass(frozen=True)
class Frames:
    """Which frames a clip shows.

    Attributes:
        count: Frames of a clip, T; None: all there are.
        interval: As in training: `count * stride` frames are evenly spaced over as many times the interval ...
        stride: ... of which every so many-th is taken, as a protocol says.
        made_at: Interval of the data that generated clips imitate.
    """

    count: int | None = 16
    interval: int = 1
    stride: int = 1
    made_at: int = 1

    def span(self, count: int) -> int:
        """Frames from the first to the last of the file that a clip of `count` frames covers."""
        return count * self.stride * self.interval

    def pick(self, start: int, count: int) -> list[int]:
        """Numbers of the frames of a clip that begins at `start`."""
        span = self.span(count)
        return np.linspace(start, start + span - 1, count * self.stride, dtype=int)[:: self.stride].tolist()

    def most(self, available: int) -> int:
        """Frames of the longest clip in so many."""
        return available // (self.stride * self.interval)

    @property
    def total_interval(self) -> int:
        return self.interval * self.stride * self.made_at


class Side(Protocol):
    """A set of clips.

    Attributes:
        settings: What both sides must share: num_frames, frame_interval, height, width, codec.
        identity: What else the clips depend on, in plain values, for a fingerprint; None: there is none.
        skipped: (name, reason) of clips that cannot be read; grows while they are.
        native: (height, width) before any resizing; None: not asked for.
    """

    settings: dict[str, Any]
    skipped: list[tuple[str, str]]
    native: tuple[int, int] | None

    @property
    def identity(self) -> dict[str, Any] | None: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        """Clips, uint8 [n, T, H, W, 3]."""
        ...


def settings_of(num_frames: int, frame_interval: int, size: Sequence[int], codec: str = LOSSLESS) -> dict[str, Any]:
    """`Side.settings`."""
    height, width = size
    return {
        "num_frames": num_frames,
        "frame_interval": frame_interval,
        "height": height,
        "width": width,
        "codec": codec,
    }


class FileSide:
    """Clips of videos or frame folders, or pictures (clips of one frame), read the way training reads them.

    Clips are drawn without repeats: every file once, in random order, before any file a second time with another
    start, as long as there are starts left.

    Args:
        data: The files, long enough for `frames`, with their size.
        count: Clips wanted; None: every file once.
        frames: Which of their frames; None: those that training takes.
        seed: Of the order and the starts.
        in_order: Every file once from its first frame, in the data's order, for metrics of pairs.
        native: Size of the frames as they are stored, if the caller knows it.
    """

    def __init__(
        self,
        data: ClipDataset | ImageDataset,
        count: int | None,
        frames: Frames | None = None,
        seed: int = 0,
        in_order: bool = False,
        native: tuple[int, int] | None = None,
    ):
        self.data, self.native, self.seed, self.in_order = data, native, seed, in_order
        self.frames = frames or Frames(getattr(data, "num_frames", 1), getattr(data, "frame_interval", 1))
        self.skipped = [(str(path), reason) for path, reason in getattr(data, "rejected", [])]
        self.draws = self._draw(count)
        codec = stored_as([data.entries[index] for index, _ in self.draws])
        self.settings = settings_of(self.frames.count, self.frames.total_interval, data.size, codec)

    def _draw(self, count: int | None) -> list[tuple[int, int]]:
        """(file, first frame) of each clip."""
        files = len(self.data)
        if self.in_order:
            return [(index, 0) for index in range(files)][:count]
        wanted = files if count is None else count
        order = np.random.default_rng((self.seed, 2, 0)).permutation(files).tolist()
        draws = [(index, self._starts(index, 1)[0]) for index in order[:wanted]]
        if len(draws) == wanted:
            return draws
        starts = [self._starts(index, wanted) for index in range(files)]
        for turn in range(1, max(map(len, starts))):
            order = np.random.default_rng((self.seed, 2, turn)).permutation(files).tolist()
            draws += [(index, starts[index][turn]) for index in order if turn < len(starts[index])]
            if len(draws) >= wanted:
                break
        return draws[:wanted]

    def _starts(self, index: int, most: int) -> list[int]:
        """Different first frames of clips of a file, in random order."""
        many = self.data.entries[index].frames - self.frames.span(self.frames.count) + 1
        return np.random.default_rng((self.seed, 1, index)).permutation(many)[:most].tolist()

    @cached_property
    def identity(self) -> dict[str, Any]:
        drawn = [(self.data.entries[index], self.frames.pick(start, self.frames.count)) for index, start in self.draws]
        return {"files": hash_entries(self.data.root, drawn), "resize": RESIZE, "frames": vars(self.frames)}

    def __len__(self) -> int:
        return len(self.draws)

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        for items in DataLoader(
            _Drawn(self.data, self.draws, self.frames), batch_size, num_workers=num_workers, collate_fn=list
        ):
            clips = [item for item in items if isinstance(item, torch.Tensor)]
            self.skipped += [item for item in items if not isinstance(item, torch.Tensor)]
            if clips:
                yield torch.stack(clips)


class _Drawn(Dataset):
    """Clip number i of a side, or why it cannot be read; decoded and resized by the loader's workers."""

    def __init__(self, data: ClipDataset | ImageDataset, draws: list[tuple[int, int]], frames: Frames):
        self.data, self.draws, self.frames = data, draws, frames

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, number: int) -> torch.Tensor | tuple[str, str]:
        index, start = self.draws[number]
        try:
            return to_bytes(self.data.frames(index, self.frames.pick(start, self.frames.count)))
        except UnreadableError as error:
            return str(self.data.entries[index].path), str(error)


class DigitsSide:
    """Moving digits, made on the spot.

    Args:
        data: All there are, with the settings that training or the caller gave them.
        count: The first so many of them; None: all.
    """

    def __init__(self, data: MovingDigits, count: int | None = None):
        self.data, self.count = data, len(data) if count is None else min(count, len(data))
        self.skipped: list[tuple[str, str]] = []
        self.native = None
        self.settings = settings_of(data.num_frames, 1, (data.height, data.width))
        drawn = {name: getattr(data, name) for name in ("seed", "digit_size", "speed")}
        self.identity = {"files": f"moving digits, {data.split}", **drawn, "clips": self.count}

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        for first in range(0, self.count, batch_size):
            indices = range(first, min(first + batch_size, self.count))
            yield torch.stack([to_bytes(self.data[index]["video"]) for index in indices])


class ArraySide:
    """Clips of array files (`arrays`).

    Args:
        paths: Files, read one after the other.
        count: Clips wanted; None: all. Fewer than there are: a random choice.
        frames: Which of their frames.
        size: (height, width) to resize to; None: their own.
        seed: Of the choice.
        in_order: The first clips instead, for pairs.

    Raises:
        UserError: A file that is not such an array, clips of several sizes, or too few frames.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        count: int | None = None,
        frames: Frames | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        in_order: bool = False,
    ):
        self.paths, self.frames = list(paths), frames or Frames(None)
        self.skipped: list[tuple[str, str]] = []
        shapes = [array_shape(path) for path in self.paths]
        for path, shape in zip(self.paths, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                both = f"{list(shape[1:])}, {self.paths[0]} {list(shapes[0][1:])}"
                raise UserError(f"{path} holds clips {both}: one side needs clips of one size; evaluate them apart.")
        own = 1 if len(shapes[0]) == 4 else shapes[0][1]
        most = self.frames.most(own)
        self.num_frames = most if self.frames.count is None else self.frames.count
        if not 0 < self.num_frames <= most:
            raise UserError(
                f"{self.paths[0]} holds clips of {own} frames: too few for {max(1, self.num_frames)} at interval "
                f"{self.frames.interval * self.frames.stride}."
            )
        self.native = tuple(shapes[0][-3:-1])
        self.size = self.native if size is None else size
        available = sum(shape[0] for shape in shapes)
        self.chosen = np.arange(available)
        if count is not None and count < available:
            rng = np.random.default_rng((seed, 3))
            self.chosen = self.chosen[:count] if in_order else np.sort(rng.permutation(available)[:count])
        self.settings = settings_of(self.num_frames, self.frames.total_interval, self.size)

    @cached_property
    def identity(self) -> dict[str, Any]:
        files = [hash_file(path) for path in self.paths]
        return {"files": files, "resize": RESIZE, "frames": vars(self.frames), "clips": self.chosen.tolist()}

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        wanted, seen = set(self.chosen.tolist()), 0
        picks = self.frames.pick(0, self.num_frames)
        for path in self.paths:
            for batch in read_clips(path, batch_size):
                rows = [row for row in range(len(batch)) if seen + row in wanted]
                seen += len(batch)
                batch = batch[:, None] if batch.dim() == 4 else batch
                if rows:
                    yield fit_batch(batch[rows][:, picks], self.size)


def fit_batch(clips: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [n, T, H, W, 3] resized and cropped as data are; unchanged if they have the size."""
    if tuple(clips.shape[2:4]) == tuple(size):
        return clips
    return to_bytes(fit(clips.flatten(0, 1).numpy(), size)).unflatten(0, clips.shape[:2])


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] in [-1, 1] -> uint8 [T, H, W, 3], rounded."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
