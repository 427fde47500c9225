"""How many frames each clip has: counted once, kept in a file, counted again for what has changed."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..errors import UnreadableError, UserError
from ..files import written_whole
from .decoding import frame_files, open_source

__all__ = ["count_frames", "default_store"]

THREADS = 8
FORMAT = 1


def count_frames(root: Path, clips: Sequence[Path], store: Path | None) -> dict[Path, int | str]:
    """Frames of each clip, or why it cannot be read.

    Several processes may do so at once: the file is written whole, and keeps what others have put there.

    Args:
        root: Folder that the clips lie in; names in the file are relative to it.
        clips: Video files and folders of frames.
        store: File that keeps the counts; None: none. A clip is counted again if its size (a folder: number of
            pictures) or time of change differs.

    Raises:
        UserError: The file cannot be written.
    """
    known = _read(store)
    marks = {clip: _mark(clip) for clip in clips}
    keys = {clip: clip.relative_to(root).as_posix() for clip in clips}
    result = {clip: known[keys[clip]][1] for clip in clips if known.get(keys[clip], [None])[0] == marks[clip]}
    fresh = [clip for clip in clips if clip not in result]
    if fresh:
        with ThreadPoolExecutor(THREADS) as pool:
            counts = pool.map(_count, fresh)
            bar = tqdm(counts, total=len(fresh), desc="Counting frames", unit="clip", disable=None)
            result.update(zip(fresh, bar, strict=True))
        if store is not None:
            # Not why a clip cannot be read: it may be mended in place, or the disk be back the next time.
            counted = {keys[clip]: [marks[clip], result[clip]] for clip in clips if isinstance(result[clip], int)}
            broken = {keys[clip] for clip in clips} - set(counted)
            entries = {key: value for key, value in _read(store).items() if key not in broken} | counted
            try:
                with written_whole(store) as temporary:
                    temporary.write_text(json.dumps({"format": FORMAT, "clips": entries}), encoding="utf-8")
            except OSError as error:
                raise UserError(f"Cannot write {store} ({error.strerror}): set data.arguments.index.") from error
    return {clip: result[clip] for clip in clips}


def default_store(root: Path, folder: Path) -> Path:
    """The index of a set in a folder of results."""
    return folder / f"frames-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}.json"


def _read(store: Path | None) -> dict[str, list]:
    try:
        content = json.loads(store.read_text(encoding="utf-8")) if store is not None else {}
    except (OSError, ValueError):
        return {}
    return content["clips"] if isinstance(content, dict) and content.get("format") == FORMAT else {}


def _mark(clip: Path) -> list[int]:
    """What changes when the clip does."""
    try:
        status = clip.stat()
        size = len(frame_files(clip)) if clip.is_dir() else status.st_size
    except OSError:  # as counting will say
        return []
    return [size, status.st_mtime_ns]


def _count(clip: Path) -> int | str:
    try:
        source = open_source(clip)
        empty = [path for path in getattr(source, "files", []) if not path.stat().st_size]
        return f"{empty[0].name} is empty" if empty else len(source)
    except OSError as error:
        return error.strerror or str(error)
    except UnreadableError as error:
        return error.reason
