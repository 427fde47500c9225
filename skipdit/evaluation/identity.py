"""What clips depend on: fingerprints of files, how they were stored, and whether two sides may be compared."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.clips import Entry

__all__ = ["LOSSLESS", "codec_of", "describe_difference", "fingerprint", "hash_entries"]

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


def codec_of(entries: Sequence[Entry]) -> str:
    """What the frames are stored as: "lossless", or suffixes such as "avi+mp4"."""
    words = set()
    for entry in entries:
        file = _frames(entry.path)[0] if entry.path.is_dir() else entry.path
        suffix = file.suffix.lower()
        words.add(LOSSLESS if suffix in LOSSLESS_SUFFIXES else suffix.lstrip("."))
    return "+".join(sorted(words))


def hash_entries(root: Path, entries: Sequence[Entry]) -> str:
    """sha256 of names, lengths, sizes and both ends (64 KiB) of all files; of a folder, its first and last frame."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: entry.path.as_posix()):
        digest.update(f"{entry.path.relative_to(root).as_posix()}|{entry.frames}|{entry.class_label}\n".encode())
        files = _frames(entry.path) if entry.path.is_dir() else [entry.path]
        for file in dict.fromkeys((files[0], files[-1])):
            size = file.stat().st_size
            digest.update(f"{file.name}|{size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE))
                stream.seek(max(0, size - EDGE))
                digest.update(stream.read(EDGE))
    return digest.hexdigest()


def _frames(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if item.is_file() and not item.name.startswith("."))
