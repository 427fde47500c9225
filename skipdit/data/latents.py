"""Latents written ahead: whole clips as an autoencoder sees them, so that training decodes and encodes nothing."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UnreadableError, UserError
from .clips import Entry, check_counts, draw_clip, draw_image, generator
from .files import check_rejected

__all__ = ["FORMAT", "INDEX", "PARTS", "LatentDataset", "hash_file", "hash_weights", "read_index", "verify"]

INDEX = "index.json"
FORMAT = 1
PARTS = ("mean", "std")


class LatentDataset(Dataset):
    """Latents of clips or pictures, from a folder that `skipdit encode` wrote.

    All frames of each clip are there, so the temporal crop is as random as from the videos: the same (seed, epoch,
    index) picks the same frames and flip as in `ClipDataset`. A read touches only the bytes from the first to the last
    frame of the crop.

    Args:
        folder: With index.json and the shards.
        num_frames: Frames of an item, T; not read for pictures.
        frame_interval: Every how many-th frame is taken.
        flip: Mirror half of the clips; the folder must hold mirrored latents (`flip=true` when they were written).
        images: Independent frames of random clips appended to each item, each with its own class label.
        seed: Of the random choices.
        max_bad_share: Share of unreadable clips above which a training run stops, 0..1.

    Attributes:
        entries: The clips that are long enough.
        rejected: (path, reason) of the others, which the log names.
        class_names: In order; None without classes.
        size: (height, width) in pixels of the frames that were encoded.
        vae_hash: Of the autoencoder that wrote them (`hash_weights`).

    Raises:
        UserError: The folder is not complete, or lacks what is asked for.
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        folder: str | Path,
        num_frames: int = 16,
        frame_interval: int = 1,
        flip: bool = True,
        images: int = 0,
        seed: int = 0,
        max_bad_share: float = 0.05,
    ):
        check_counts(num_frames=(num_frames, 1), frame_interval=(frame_interval, 1), images=(images, 0), seed=(seed, 0))
        self.folder, self.num_frames, self.frame_interval = Path(folder), num_frames, frame_interval
        self.flip, self.seed, self.max_bad_share = flip, seed, max_bad_share
        index = read_index(self.folder)
        if flip and not index["flip"]:
            raise UserError(
                f"{folder} holds no mirrored latents: set data.arguments.flip=false, or write them with flip=true."
            )
        self.class_names, self.vae_hash, self.is_video = index["class_names"], index["vae_hash"], index["is_video"]
        self.size = tuple(index["size"])
        if images and not self.is_video:
            raise UserError(f"{folder} holds pictures: joint images (data.arguments.images) go with clips.")
        self.images = images
        span = num_frames * frame_interval if self.is_video else 1
        self.entries: list[Entry] = []
        self.rejected: list[tuple[Path, str]] = []
        self._places: list[tuple[str, int]] = []  # shard, and row of the clip's first frame
        for clip in index["clips"]:
            path, frames = Path(clip["path"]), clip["frames"]
            if frames < span:
                self.rejected.append((path, f"too short, {frames} of {span} frames"))
                continue
            self.entries.append(Entry(path, clip["class_label"], frames))
            self._places.append((clip["shard"], clip["row"]))
        if not self.entries:
            raise UserError(f"No clip in {folder} has {span} frames: lower num_frames or frame_interval.")
        check_rejected(self.rejected, 0, len(index["clips"]), self.max_bad_share)
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """A clip with the random choices of an epoch.

        Returns:
            "mean" and "std" of the posterior, unscaled float32 [C, T + images, h, w] (a picture: [C, h, w]);
            "class_label", an int (0 without classes), with joint images int64 [1 + images].

        Raises:
            UnreadableError: The shard is damaged.
        """
        entry, rng = self.entries[index], generator(self.seed, epoch, index)
        label = entry.class_label or 0
        if not self.is_video:
            latents = self._read(index, [0], bool(self.flip and rng.integers(2)))
            return {**{part: value[:, 0] for part, value in latents.items()}, "class_label": label}
        drawn = draw_clip(rng, entry.frames, self.num_frames, self.frame_interval, self.flip)
        latents = self._read(index, drawn.indices, drawn.flip)
        if not self.images:
            return {**latents, "class_label": label}
        drawn_images = [draw_image(rng, self.entries, self.flip) for _ in range(self.images)]
        pictures = [self._read(other, [frame], flip) for other, frame, flip in drawn_images]
        labels = [label, *(self.entries[other].class_label or 0 for other, _, _ in drawn_images)]
        joined = {part: torch.cat([latents[part], *(picture[part] for picture in pictures)], 1) for part in PARTS}
        return {**joined, "class_label": torch.tensor(labels)}

    def _read(self, index: int, frames: list[int], flip: bool) -> dict[str, torch.Tensor]:
        """Mean and deviation of these frames, each [C, n, h, w]."""
        shard, row = self._places[index]
        first, stop = min(frames), max(frames) + 1
        picks = [frame - first for frame in frames]
        prefix = "flip." if flip else ""
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.folder / shard, framework="pt")
            file = self._open[shard]
            rows = {part: file.get_slice(prefix + part)[row + first : row + stop] for part in PARTS}
        except (SafetensorError, OSError) as error:
            raise UnreadableError(self.folder / shard, str(error).split("\n")[0][:160]) from error
        return {part: value[picks].float().transpose(0, 1).contiguous() for part, value in rows.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # files are opened anew in a worker


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder of latents holds.

    Raises:
        UserError: It is no such folder, or not complete.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no complete latents (no {INDEX}): write them with 'skipdit encode output={folder}', or "
            "run that again to complete them."
        ) from error
    except ValueError as error:
        raise UserError(f"{folder / INDEX} is damaged: run 'skipdit encode' again to write it anew.") from error
    if index.get("format") != FORMAT:
        raise UserError(f"{folder} has latents of format {index.get('format')}; this version reads format {FORMAT}.")
    for shard, about in index["shards"].items():
        path = folder / shard
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            raise UserError(f"{path} is missing or cut short: run 'skipdit encode' again to complete {folder}.")
    return index


def verify(folder: Path) -> list[str]:
    """Shards whose content is not what was written, by SHA-256."""
    shards = tqdm(read_index(folder)["shards"].items(), desc="Verifying", unit="shard", disable=None)
    return [shard for shard, about in shards if hash_file(folder / shard) != about["sha256"]]


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and values in float32: the same wherever and in whatever order they are stored."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()
