"""What was fetched, kept under `<root>/.skipdit/`: the hash of a first fetch is the measure of later ones."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import written_whole

__all__ = ["FileRecord", "Record", "Records"]


@dataclass(frozen=True)
class FileRecord:
    """One file: its path below the entry's base, size in bytes, sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What one fetch of an entry brought.

    Attributes:
        id: The entry.
        source: Where it came from, in words.
        revision: The commit of a hub, if any.
        files: Paths are below the root; for the hub's cache, below that cache.
        when: Date and time, UTC.
    """

    id: str
    source: str
    revision: str | None = None
    files: tuple[FileRecord, ...] = ()
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


class Records:
    """The records of one root."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ".skipdit" / "downloads"

    def get(self, entry_id: str) -> Record | None:
        """The record of an entry; None if there is none that can be read."""
        try:
            content = json.loads(self.path(entry_id).read_text(encoding="utf-8"))
            files = tuple(FileRecord(**item) for item in content.pop("files"))
            return Record(**content, files=files)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, record: Record) -> None:
        """Write a record whole."""
        path = self.path(record.id)
        self.folder.mkdir(parents=True, exist_ok=True)
        ignore = self.folder.parent / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")

    def path(self, entry_id: str) -> Path:
        """Where the record of an entry is kept."""
        return self.folder / f"{entry_id.replace('/', '--')}.json"
