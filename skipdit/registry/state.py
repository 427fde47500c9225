"""What is there, missing or damaged."""

import fnmatch
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .digest import Expected, hash_file, page_or_pointer
from .records import Record, Records
from .schema import HUB_CACHE, ArchiveSource, Entry, HubSource, ManualSource, ModelScopeSource

__all__ = ["State", "base_folder", "check", "hub_cache", "known_files", "missing_parts", "size_on_disk"]


@dataclass(frozen=True)
class State:
    """How an entry stands.

    Attributes:
        name: "there", "missing" or "damaged".
        detail: What is known, or what is wrong.
        size: Bytes on disk.
    """

    name: str
    detail: str = ""
    size: int = 0


def hub_cache() -> Path:
    """Folder of huggingface_hub's cache, as its documented variables say."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "hub"


def base_folder(entry: Entry, root: Path) -> Path:
    """What the paths of an entry's record are relative to."""
    return hub_cache() if entry.path == HUB_CACHE else root


def check(entry: Entry, root: Path, records: Records, level: str = "size") -> State:
    """Look at an entry on disk, without the network.

    Args:
        entry: The entry.
        root: What its path is relative to.
        records: What earlier fetches noted.
        level: "size": sizes, layout, pages and pointers in place of weights; "hash": digests too.
    """
    record = records.get(entry.id)
    base = base_folder(entry, root)
    if not entry.is_folder:
        return _check_file(entry, root / entry.path, record, level)
    if record is None and entry.path == HUB_CACHE:
        return State("missing")
    problems, size = _check_recorded(record, base, level) if record else ([], 0)
    folder = root / entry.path
    if entry.path != HUB_CACHE:
        if not folder.is_dir() or not any(item for item in folder.iterdir() if not item.name.startswith(".")):
            return State("missing")
        problems += missing_parts(entry, folder)
        size = size or size_on_disk(folder)
    if problems:
        absent = all(problem.endswith("is not there") for problem in problems)
        return State("missing" if absent else "damaged", "; ".join(problems[:3]), size)
    if record is None and not _has_measure(entry):
        if isinstance(entry.source, ManualSource):
            return State("there", "put there by hand, not checked", size)
        return State("missing", "the folder is there, but no record of a fetch says that it is whole", size)
    return State("there", _measure(level, record), size)


def _has_measure(entry: Entry) -> bool:
    return bool(entry.requires or entry.counts or known_files(entry))


def known_files(entry: Entry) -> list[str]:
    """Files of a folder that the registry names, without patterns."""
    source = entry.source
    if not isinstance(source, HubSource | ModelScopeSource):
        return []
    return [name for name in source.files if not any(sign in name for sign in "*?[")]


def _measure(level: str, record: Record | None) -> str:
    if record is None:
        return "layout agrees; no record of a fetch"
    return "hashes agree" if level == "hash" and record.files else "sizes agree"


def _check_file(entry: Entry, path: Path, record: Record | None, level: str) -> State:
    if not path.is_file():
        return State("missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        if what := page_or_pointer(file.read(512), path.name):
            return State("damaged", f"it is {what}", size)
    noted = record.files[0] if record and len(record.files) == 1 else None
    expected = Expected(
        entry.bytes if entry.bytes is not None else (noted.size if noted else None),
        entry.sha256 or (noted.sha256 if noted else None),
        entry.md5,
    )
    digests = hash_file(path, expected) if level == "hash" and expected.has_hash else {}
    if wrong := expected.differences(size, digests):
        return State("damaged", ", ".join(wrong), size)
    if size == 0:
        return State("damaged", "it is empty", 0)
    if level == "hash":
        return State("there", "hash agrees" if expected.has_hash else "no hash is known: not checked", size)
    return State("there", "size agrees" if expected.size is not None else "size unknown", size)


def _check_recorded(record: Record, base: Path, level: str) -> tuple[list[str], int]:
    problems, total = [], 0
    for item in record.files:
        path = base / item.path
        if not path.is_file():
            problems.append(f"{item.path} is not there")
            continue
        size = path.stat().st_size
        total += size
        digests = hash_file(path, Expected(sha256=item.sha256)) if level == "hash" else {}
        wrong = Expected(item.size, item.sha256).differences(size, digests)
        problems += [f"{item.path}: {', '.join(wrong)}"] if wrong else []
    return problems, total


def missing_parts(entry: Entry, folder: Path) -> list[str]:
    """What a folder lacks: files that the registry names, shards that an index names, files of a data set."""
    problems = [f"{name} is not there" for name in known_files(entry) if not (folder / name).is_file()]
    problems += [f"{pattern} is not there" for pattern in entry.requires if not any(folder.glob(pattern))]
    for pattern, least in entry.counts.items():
        count = sum(1 for item in folder.glob(pattern) if item.is_file() and not _is_packed(item))
        if count < least:
            packed = isinstance(entry.source, ArchiveSource) and any(_is_packed(i) for i in folder.iterdir())
            hint = " (fetched, but still packed)" if packed else ""
            problems.append(f"{count} files match {pattern}, at least {least} were expected{hint}")
    for index in sorted(folder.glob("*.index.json")) + sorted(folder.glob("*/*.index.json")):
        problems += [f"{shard} is not there" for shard in _missing_shards(index)]
    return problems


def _is_packed(path: Path) -> bool:
    return path.suffix in (".zip", ".rar") or fnmatch.fnmatch(path.suffix, ".z[0-9][0-9]")


def _missing_shards(index: Path) -> list[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return []
    return sorted(shard for shard in shards if not (index.parent / str(shard)).is_file())


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
