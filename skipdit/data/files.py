"""Finding the clips and pictures below a folder, and what to do about the ones that cannot be read."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .decoding import IMAGE_SUFFIXES, VIDEO_SUFFIXES

__all__ = ["check_rejected", "class_folders", "find_clips", "find_images", "read_list"]

SHOWN = 10
log = logging.getLogger("skipdit.data")


def find_clips(root: Path) -> list[Path]:
    """Video files and folders of frames anywhere below the root, sorted.

    Raises:
        UserError: The root is not there, or there are none.
    """
    clips = []
    for folder, names in _walk(root):
        suffixes = {name: Path(name).suffix.lower() for name in names}
        clips += [folder / name for name, suffix in suffixes.items() if suffix in VIDEO_SUFFIXES]
        if any(suffix in IMAGE_SUFFIXES for suffix in suffixes.values()):
            clips.append(folder)
    if not clips:
        raise UserError(f"{root} holds neither video files nor folders of frames: is it the folder of the data?")
    return sorted(clips)


def find_images(root: Path) -> list[Path]:
    """Pictures anywhere below the root, sorted.

    Raises:
        UserError: The root is not there, or there are none.
    """
    images = [folder / name for folder, names in _walk(root) for name in names]
    images = sorted(path for path in images if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{root} holds no pictures: is it the folder of the data?")
    return images


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: set data.arguments.root to that of the data.")
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(folder), [name for name in names if not name.startswith(".")]


def class_folders(root: Path, paths: Sequence[Path]) -> list[str]:
    """Names of the folders right below the root, sorted: the classes.

    Raises:
        UserError: A path lies in none of them.
    """
    for path in paths:
        if path == root:
            raise UserError(f"{root} holds pictures beside its class folders: move them away.")
        if len(path.relative_to(root).parts) < 2:
            raise UserError(
                f"{path} lies in no class folder of {root}: sort the files into one folder a class, or set "
                "data.arguments.classes=none for a set without classes."
            )
    return sorted({path.relative_to(root).parts[0] for path in paths})


def read_list(path: Path, root: Path) -> list[Path]:
    """Files that a split list names, a line each ("Class/v_x.avi" or "Class/v_x.avi 1", any line ends).

    Raises:
        UserError: The list is not there or empty, or names files that are not.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: split must name a list of files, or be null for all.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: it must name a file a line, relative to {root}.") from error
    names = [_without_label(line) for line in lines]
    if not names:
        raise UserError(f"{path} is empty: it must name a file a line, relative to {root}.")
    missing = [name for name in names if _leads_out(name) or not (root / name).exists()]
    if missing:
        raise UserError(
            f"{path} names {len(missing)} of {len(names)} files that are not below {root} ({_some(missing)}): check "
            "the folder of the data, or remove them from the list."
        )
    return [root / name for name in names]


def _without_label(line: str) -> str:
    name, _, label = line.rpartition(" ")
    return name if name and label.isdecimal() else line


def _leads_out(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def check_rejected(rejected: Sequence[tuple[Path, str]], damaged: int, total: int, max_bad_share: float) -> None:
    """Name the files that are left out, once, and say how many they are.

    Args:
        rejected: All of them, with the reason.
        damaged: How many of them are not merely too short.
        total: Files there are.
        max_bad_share: Of damaged ones, 0..1.

    Raises:
        UserError: The damaged ones are more than the share allows, or no file is left.
    """
    if damaged > max_bad_share * total or len(rejected) == total:
        listed = "; ".join(f"{path}: {reason}" for path, reason in rejected[:SHOWN])
        more = f"; and {len(rejected) - SHOWN} more" if len(rejected) > SHOWN else ""
        limit = f", more than max_bad_share={max_bad_share:g} allows" if len(rejected) < total else ""
        raise UserError(f"{len(rejected)} of {total} clips cannot be used{limit} ({listed}{more}).")
    for path, reason in rejected:
        log.warning("%s is left out: %s", path, reason)
    if rejected:
        log.warning("%d of %d clips are left out.", len(rejected), total)


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
