"""Files of latents: which clips go into which, encoding them in batches, and writing each whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data import ClipDataset, ImageDataset
from ..data.latents import PARTS, hash_file
from ..errors import UnreadableError, UserError
from ..files import written_whole
from .data import encode

__all__ = ["Encoder", "ShardError", "check_share", "is_done", "name_of", "plan_shards", "read_about"]


class ShardError(UserError):
    """A mistake that one process alone meets, so that it must tell."""


class Span(NamedTuple):
    """Consecutive frames of one clip."""

    clip: int
    first: int
    stop: int


def plan_shards(dataset: ClipDataset | ImageDataset, most_frames: int) -> list[tuple[str, list[int]]]:
    """Files in order: name and clips, whatever the number of processes. Only a longer clip makes a larger file."""
    shards: list[list[int]] = [[]]
    frames = 0
    for index, entry in enumerate(dataset.entries):
        if shards[-1] and frames + entry.frames > most_frames:
            shards.append([])
            frames = 0
        shards[-1].append(index)
        frames += entry.frames
    return [(f"latents-{number:05d}.safetensors", indices) for number, indices in enumerate(shards)]


def plan_batches(dataset: ClipDataset | ImageDataset, clips: list[int], most_frames: int) -> Iterator[list[Span]]:
    """What is encoded at once: spans of the clips of one file, which fill every batch but the last."""
    batch, room = [], most_frames
    for clip in clips:
        first, frames = 0, dataset.entries[clip].frames
        while first < frames:
            stop = min(frames, first + room)
            batch.append(Span(clip, first, stop))
            room -= stop - first
            first = stop
            if not room:
                yield batch
                batch, room = [], most_frames
    if batch:
        yield batch


class SpanReader(Dataset):
    """Decodes batches of spans, in workers: the frames of those that can be read [n, 3, H, W], and why not, by span."""

    def __init__(self, dataset: ClipDataset | ImageDataset):
        self.dataset = dataset

    def __getitem__(self, batch: list[Span]) -> tuple[torch.Tensor, dict[Span, str]]:
        frames, reasons = [torch.empty(0, 3, *self.dataset.size)], {}
        for span in batch:
            try:
                frames.append(self.dataset.frames(span.clip, list(range(span.first, span.stop))))
            except UnreadableError as error:
                reasons[span] = str(error)
        return torch.cat(frames), reasons  # one tensor: each takes a file descriptor on its way from the worker


class Encoder:
    """Writes the shards of one process.

    Args:
        dataset: Its clips.
        vae: On its device.
        output: Folder of the shards.
        dtype: Of the files.
        flip: Write mirrored frames too.
        frames_at_once: Of a batch.
        num_workers: Decoding processes.
    """

    def __init__(
        self,
        dataset: ClipDataset | ImageDataset,
        vae: AutoencoderKL | AutoencoderTiny,
        output: Path,
        dtype: torch.dtype,
        flip: bool,
        frames_at_once: int,
        num_workers: int,
    ):
        self.dataset, self.vae, self.output, self.dtype = dataset, vae, output, dtype
        self.prefixes = ("", "flip.") if flip else ("",)
        self.frames_at_once, self.num_workers = frames_at_once, num_workers
        self.unreadable: list[str] = []

    def bytes_of_frame(self) -> int:
        """What the latents of one frame take in the files."""
        mean, _ = encode(self.vae, torch.zeros(1, 3, *self.dataset.size), 1)
        return mean.numel() * self.dtype.itemsize * len(PARTS) * len(self.prefixes)

    def write(self, shards: list[tuple[str, list[int]]], shows: bool) -> None:
        """Encode and write these; `shows`: with a progress bar.

        Raises:
            ShardError: A full disk, too many unreadable clips, latents that the dtype cannot hold.
        """
        plans = [(name, clips, list(plan_batches(self.dataset, clips, self.frames_at_once))) for name, clips in shards]
        batches = [batch for *_, plan in plans for batch in plan]
        reader = SpanReader(self.dataset)
        decoded = iter(DataLoader(reader, batch_size=None, sampler=batches, num_workers=self.num_workers))
        total = sum(self.dataset.entries[clip].frames for _, clips, _ in plans for clip in clips)
        with tqdm(total=total, desc="Encoding", unit="frame", disable=None if shows else True) as bar:
            for name, clips, plan in plans:
                self._write_shard(self.output / name, clips, plan, decoded, bar)

    def _write_shard(self, shard: Path, clips: list[int], plan: list[list[Span]], decoded: Iterator, bar: tqdm) -> None:
        pieces: dict[str, dict[int, list[torch.Tensor]]] = {}  # part -> clip -> its spans
        reasons: dict[int, str] = {}
        for batch in plan:
            frames, failed = next(decoded)
            for span, reason in failed.items():
                self._leave_out(span.clip, reason, reasons)
            readable = [span for span in batch if span not in failed]
            if readable:
                sizes = [span.stop - span.first for span in readable]
                for part, value in self._latents(frames, readable).items():
                    for span, piece in zip(readable, value.split(sizes), strict=True):
                        pieces.setdefault(part, {}).setdefault(span.clip, []).append(piece)
            bar.update(sum(span.stop - span.first for span in batch))
        kept = [clip for clip in clips if clip not in reasons]
        tensors = {
            part: torch.cat([piece for clip in kept for piece in of[clip]]) for part, of in pieces.items() if kept
        }
        unreadable = [{"path": name_of(self.dataset, clip), "reason": reason} for clip, reason in reasons.items()]
        _write_whole(shard, tensors, {"clips": list(self._rows(shard.name, kept)), "unreadable": unreadable})

    def _latents(self, frames: torch.Tensor, batch: list[Span]) -> dict[str, torch.Tensor]:
        """Parts of frames [n, 3, H, W], each [n, C, h, w]."""
        latents = {}
        for prefix in self.prefixes:
            both = encode(self.vae, frames.flip(-1) if prefix else frames, self.frames_at_once)
            latents |= {prefix + part: value.to(self.dtype) for part, value in zip(PARTS, both, strict=True)}
        if not all(value.isfinite().all() for value in latents.values()):
            raise ShardError(
                f"Latents of {self.dataset.entries[batch[0].clip].path}, or of a clip soon after it, are not finite in "
                f"{str(self.dtype).removeprefix('torch.')}: set dtype=float32, or check the autoencoder."
            )
        return {part: value.cpu() for part, value in latents.items()}

    def _leave_out(self, clip: int, reason: str, reasons: dict[int, str]) -> None:
        if clip in reasons:
            return
        reasons[clip] = reason
        self.unreadable.append(reason)
        tqdm.write(f"{reason}; it is left out.")
        check_share(self.unreadable, self.dataset)

    def _rows(self, shard: str, clips: list[int]) -> Iterator[dict[str, Any]]:
        row = 0
        for clip in clips:
            entry = self.dataset.entries[clip]
            about = {"path": name_of(self.dataset, clip), "frames": entry.frames, "class_label": entry.class_label}
            yield {**about, "shard": shard, "row": row}
            row += entry.frames


def name_of(dataset: ClipDataset | ImageDataset, clip: int) -> str:
    """A clip's path below the root."""
    return dataset.entries[clip].path.relative_to(dataset.root).as_posix()


def check_share(reasons: list[str], dataset: ClipDataset | ImageDataset) -> None:
    """Raise ShardError if more clips are unreadable than the data set allows, or all."""
    bad, total = len(reasons), len(dataset)
    if bad > dataset.max_bad_share * total or bad == total:
        raise ShardError(
            f"{bad} of {total} clips cannot be read, more than data.arguments.max_bad_share="
            f"{dataset.max_bad_share:g} allows ({'; '.join(reasons[:10])}): repair them or allow more, then run the "
            "same command again."
        )


def read_about(shard: Path) -> dict[str, Any]:
    """What lies beside a shard: its clips with the row of their first frame, what was unreadable, sha256, bytes."""
    return json.loads(shard.with_suffix(".json").read_text(encoding="utf-8"))


def is_done(shard: Path) -> bool:
    """Whether a shard is whole; one with unreadable clips is not, for they may have been repaired."""
    try:
        about = read_about(shard)
        return shard.stat().st_size == about["bytes"] and not about["unreadable"]
    except (OSError, ValueError):
        return False


def _write_whole(shard: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """A shard and then what lies beside it, each whole or not at all."""
    try:
        with written_whole(shard) as temporary:
            save_file(tensors, temporary)
            about |= {"sha256": hash_file(temporary), "bytes": temporary.stat().st_size}
        with written_whole(shard.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ShardError(
            f"{shard} could not be written ({str(error).splitlines()[0]}): finished shards are kept; make room, then "
            "run the same command again."
        ) from error
