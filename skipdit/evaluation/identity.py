"""What clips depend on: fingerprints of files, how they were stored, and whether two sides may be compared."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.clips import Entry
from ..data.decoding import frame_files

__all__ = ["LOSSLESS", "describe_difference", "fingerprint", "hash_entries", "stored_as"]

EDGE = 1 << 16
LOSSLESS = "lossless"
LOSSLESS_SUFFIXES = {".png", ".bmp", ".tif", ".tiff"}
SHARED = {"num_frames": "frames of a clip", "frame_interval": "frame interval", "height": "height", "width": "width"}


def describe_difference(real: dict[str, Any], generated: dict[str, Any]) -> str:
    """What of the two sides' settings differs so that no figure would mean anything; empty if nothing does.

    Generated clips that were stored without loss may be compared with real ones of any codec: those have been through
    theirs before the model saw them. A second, lossy coding of the generated ones is a difference of its own.
    """
    found = [
        f"{word} {real[key]} (real) and {generated[key]} (generated)"
        for key, word in SHARED.items()
        if real[key] != generated[key]
    ]
    if generated["codec"] not in (LOSSLESS, real["codec"]):
        found.append(f"codec {real['codec']} (real) and {generated['codec']} (generated)")
    return "; ".join(found)


def fingerprint(values: dict[str, Any]) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def stored_as(entries: Sequence[Entry]) -> str:
    """ "lossless", or the suffixes of the files, such as "avi+mp4": what is known of the codec without decoding."""
    words = set()
    for entry in entries:
        file = frame_files(entry.path)[0] if entry.path.is_dir() else entry.path
        suffix = file.suffix.lower().replace(".jpeg", ".jpg")
        words.add(LOSSLESS if suffix in LOSSLESS_SUFFIXES else suffix.lstrip("."))
    return "+".join(sorted(words))


def hash_entries(root: Path, drawn: Sequence[tuple[Entry, Sequence[int]]]) -> str:
    """sha256 of clips in their order: name, frame numbers, size and both ends (64 KiB) of each file that is read.

    Args:
        root: Names are relative to it.
        drawn: Files or folders of frames, and which of their frames.
    """
    digest = hashlib.sha256()
    for entry, indices in drawn:
        digest.update(f"{entry.path.relative_to(root).as_posix()}|{list(indices)}\n".encode())
        files = [entry.path]
        if entry.path.is_dir():
            frames = frame_files(entry.path)
            files = [frames[index] for index in indices]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}|{size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE))
                stream.seek(max(0, size - EDGE))
                digest.update(stream.read(EDGE))
    return digest.hexdigest()
