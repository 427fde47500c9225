"""How many frames each clip has: counted once, kept in a file, counted again for what has changed."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..errors import UnreadableError
from ..files import written_whole
from .decoding import frame_files, open_source

__all__ = ["count_frames"]

THREADS = 8
FORMAT = 1


def count_frames(root: Path, clips: Sequence[Path], cache_dir: Path | None) -> dict[Path, int | str]:
    """Frames of each clip, or why it cannot be read.

    Args:
        root: Folder that the clips lie in; names in the file are relative to it.
        clips: Video files and folders of frames.
        cache_dir: Where the counts are kept ("frames-<hash of root>.json"); None: nowhere. A clip is counted again if
            its size or time of change differs.
    """
    store = None
    if cache_dir is not None:
        name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
        store = Path(cache_dir) / f"frames-{name}.json"
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
            entries = {**known, **{keys[clip]: [marks[clip], result[clip]] for clip in clips}}
            with written_whole(store) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "clips": entries}), encoding="utf-8")
    return {clip: result[clip] for clip in clips}


def _read(store: Path | None) -> dict[str, list]:
    try:
        content = json.loads(store.read_text(encoding="utf-8")) if store is not None else {}
    except (OSError, ValueError):
        return {}
    return content["clips"] if content.get("format") == FORMAT else {}


def _mark(clip: Path) -> list[int]:
    """What changes when the clip does."""
    status = clip.stat()
    size = len(frame_files(clip)) if clip.is_dir() else status.st_size
    return [size, status.st_mtime_ns]


def _count(clip: Path) -> int | str:
    try:
        return len(open_source(clip))
    except UnreadableError as error:
        return error.reason
