"""The two sides of a comparison: clips in the order in which they are looked at, and what they depend on."""

from collections.abc import Iterator, Sequence
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
from .identity import LOSSLESS, codec_of, hash_entries

__all__ = ["ArraySide", "DigitsSide", "FileSide", "Side", "settings_of", "to_bytes"]

RESIZE = "bilinear, antialiased, centre crop"


class Side(Protocol):
    """A set of clips.

    Attributes:
        settings: What both sides must share: num_frames, frame_interval, height, width, codec.
        identity: What else the clips depend on, in plain values, for a fingerprint; None: there is none.
        skipped: (name, reason) of clips that cannot be read; grows while they are.
    """

    settings: dict[str, Any]
    identity: dict[str, Any] | None
    skipped: list[tuple[str, str]]

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
        data: Which files, and what a clip of them is.
        count: Clips wanted; None: every file once.
        seed: Of the order and the starts.
        in_order: Every file once from its first frame, in sorted order, for metrics of pairs.
        made_at: Frame interval of the data that generated clips imitate.
    """

    def __init__(
        self,
        data: ClipDataset | ImageDataset,
        count: int | None,
        seed: int = 0,
        in_order: bool = False,
        made_at: int = 1,
    ):
        self.data, self.skipped = data, [(str(path), reason) for path, reason in getattr(data, "rejected", [])]
        self.num_frames = getattr(data, "num_frames", 1)
        self.span = self.num_frames * getattr(data, "frame_interval", 1)
        self.draws = self._draw(count, seed, in_order)
        interval = getattr(data, "frame_interval", 1) * made_at
        self.settings = settings_of(self.num_frames, interval, data.size, codec_of(data.entries))
        self.identity = {"files": hash_entries(data.root, data.entries), "resize": RESIZE}
        self.identity |= {"seed": seed, "in_order": in_order, "clips": len(self.draws)}

    def _draw(self, count: int | None, seed: int, in_order: bool) -> list[tuple[int, int]]:
        """(file, first frame) of each clip."""
        files = len(self.data)
        if in_order:
            return [(index, 0) for index in range(files)][:count]
        wanted = files if count is None else count
        turns = -(-wanted // files)
        starts = []
        for index, entry in enumerate(self.data.entries):
            order = np.random.default_rng((seed, 1, index)).permutation(entry.frames - self.span + 1)
            starts.append(order[: max(turns, wanted - files + 1)].tolist())
        draws: list[tuple[int, int]] = []
        for turn in range(max(map(len, starts))):
            order = np.random.default_rng((seed, 2, turn)).permutation(files).tolist()
            draws += [(index, starts[index][turn]) for index in order if turn < len(starts[index])]
            if len(draws) >= wanted:
                break
        return draws[:wanted]

    def __len__(self) -> int:
        return len(self.draws)

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        drawn = _Drawn(self.data, self.draws, self.num_frames, self.span)
        for items in DataLoader(drawn, batch_size, num_workers=num_workers, collate_fn=list):
            clips = [item for item in items if isinstance(item, torch.Tensor)]
            self.skipped += [item for item in items if not isinstance(item, torch.Tensor)]
            if clips:
                yield torch.stack(clips)


class _Drawn(Dataset):
    """Clip number i of a side, or why it cannot be read; decoded and resized by the loader's workers."""

    def __init__(self, data: ClipDataset | ImageDataset, draws: list[tuple[int, int]], num_frames: int, span: int):
        self.data, self.draws, self.num_frames, self.span = data, draws, num_frames, span

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, number: int) -> torch.Tensor | tuple[str, str]:
        index, start = self.draws[number]
        # As training picks them: evenly spaced over the span.
        indices = np.linspace(start, start + self.span - 1, self.num_frames, dtype=int).tolist()
        try:
            return to_bytes(self.data.frames(index, indices))
        except UnreadableError as error:
            return str(self.data.entries[index].path), str(error)


class DigitsSide:
    """Moving digits, made on the spot.

    Args:
        count: Clips.
        num_frames, size: Of a clip, in frames and pixels (height, width).
        seed: Of the clips.
        split: Of scikit-learn's digits, "train" or "test".
    """

    def __init__(self, count: int, num_frames: int, size: tuple[int, int], seed: int = 0, split: str = "train"):
        self.data = MovingDigits(num_frames=num_frames, size=size, length=count, seed=seed, split=split)
        self.skipped: list[tuple[str, str]] = []
        self.settings = settings_of(num_frames, 1, size)
        self.identity = {"files": f"moving digits, {split}", "seed": seed, "clips": count}

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        for first in range(0, len(self.data), batch_size):
            indices = range(first, min(first + batch_size, len(self.data)))
            yield torch.stack([to_bytes(self.data[index]["video"]) for index in indices])


class ArraySide:
    """Clips of array files (`arrays`), in their order.

    Args:
        paths: Files, read one after the other.
        count: Clips wanted; None: all.
        num_frames: Frames of a clip, T; the first so many are taken; None: all.
        stride: Every how many-th frame is taken.
        size: (height, width) to resize to; None: their own.
        made_at: Frame interval of the data that generated clips imitate.

    Raises:
        UserError: A file that is not such an array, clips of several sizes, or too few frames.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        count: int | None = None,
        num_frames: int | None = None,
        stride: int = 1,
        size: tuple[int, int] | None = None,
        made_at: int = 1,
    ):
        self.paths, self.stride = list(paths), stride
        self.skipped: list[tuple[str, str]] = []
        shapes = [array_shape(path) for path in self.paths]
        for path, shape in zip(self.paths, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                both = f"{list(shape[1:])}, {self.paths[0]} {list(shapes[0][1:])}"
                raise UserError(f"{path} holds clips {both}: one side needs clips of one size; evaluate them apart.")
        own = 1 if len(shapes[0]) == 4 else shapes[0][1]
        self.num_frames = -(-own // stride) if num_frames is None else num_frames
        if self.num_frames > -(-own // stride):
            wanted = f"{self.num_frames} frames" + (f", every {stride}th" if stride > 1 else "")
            raise UserError(f"{self.paths[0]} holds clips of {own} frames: too few for {wanted}.")
        self.native = tuple(shapes[0][-3:-1])
        self.size = self.native if size is None else size
        available = sum(shape[0] for shape in shapes)
        self.count = available if count is None else min(count, available)
        self.settings = settings_of(self.num_frames, stride * made_at, self.size)
        hashes = [hash_file(path) for path in self.paths]
        self.identity = {"files": hashes, "resize": RESIZE, "native": list(self.native), "clips": self.count}

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        left = self.count
        for path in self.paths:
            for batch in read_clips(path, batch_size):
                batch = batch[:left]
                left -= len(batch)
                batch = batch[:, None] if batch.dim() == 4 else batch
                yield self._fitted(batch[:, :: self.stride][:, : self.num_frames])
                if not left:
                    return

    def _fitted(self, batch: torch.Tensor) -> torch.Tensor:
        if self.size == self.native:
            return batch
        return to_bytes(fit(batch.flatten(0, 1).numpy(), self.size)).unflatten(0, batch.shape[:2])


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] in [-1, 1] -> uint8 [T, H, W, 3], rounded."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
