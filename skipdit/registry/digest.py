"""What is known of a file, and hashing: while it streams, or of a file that is there."""

import hashlib
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Expected", "Hasher", "hash_file", "page_or_pointer"]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Expected:
    """What is known beforehand: size in bytes, digests; git_sha1 is that of a git blob (small files)."""

    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    git_sha1: str | None = None

    @property
    def has_hash(self) -> bool:
        return bool(self.sha256 or self.md5 or self.git_sha1)

    def differences(self, size: int, digests: dict[str, str]) -> list[str]:
        """In words, where a file differs from this."""
        found = []
        if self.size is not None and size != self.size:
            found.append(f"{size} bytes instead of {self.size}")
        for name in ("sha256", "md5", "git_sha1"):
            wanted = getattr(self, name)
            if wanted and name in digests and digests[name] != wanted:
                found.append(f"{name} {digests[name]} instead of {wanted}")
        return found


class Hasher:
    """Digests of a stream, computed in a thread beside the transfer (hashlib lets other threads run).

    Args:
        expected: Which digests are needed besides sha256.
        backlog: Chunks that may wait: bounds the memory.
    """

    def __init__(self, expected: Expected, backlog: int = 16) -> None:
        self._hashes = {"sha256": hashlib.sha256()}
        if expected.md5:
            self._hashes["md5"] = hashlib.md5(usedforsecurity=False)
        if expected.git_sha1 and expected.size is not None:
            self._hashes["git_sha1"] = hashlib.sha1(b"blob %d\0" % expected.size, usedforsecurity=False)
        self._queue: queue.Queue[bytes | None] = queue.Queue(backlog)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def update(self, chunk: bytes) -> None:
        self._queue.put(chunk)

    def digests(self) -> dict[str, str]:
        """End the thread and give name -> hex digest."""
        self._queue.put(None)
        self._thread.join()
        return {name: item.hexdigest() for name, item in self._hashes.items()}

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None:
            for item in self._hashes.values():
                item.update(chunk)


def hash_file(path: Path, expected: Expected) -> dict[str, str]:
    """Digests of a file that is there."""
    hasher = Hasher(expected)
    feed(hasher, path)
    return hasher.digests()


def feed(hasher: Hasher, path: Path) -> int:
    """Put a file's content into a hasher; the number of bytes."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            total += len(chunk)
    return total


def page_or_pointer(head: bytes, name: str) -> str | None:
    """What a file is that only looks like a download: a web page or a git-lfs pointer; None if neither.

    Args:
        head: Its first bytes.
        name: Its name; a page is fine where a page was wanted.
    """
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer"
    is_page = start.startswith((b"<!doctype html", b"<html"))
    return "a web page" if is_page and not name.lower().endswith((".html", ".htm")) else None
