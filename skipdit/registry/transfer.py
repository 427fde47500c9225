"""One file over HTTP: resumed after a cut, hashed while it streams, written beside and renamed."""

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from .digest import CHUNK, Expected, Hasher, feed, page_or_pointer
from .http import NETWORK_ERRORS, Client, Retry
from .status import Failed, FetchError, Mismatch, NoSpace

__all__ = ["Fetched", "as_fetch_error", "fetch", "part_path"]


@dataclass(frozen=True)
class Fetched:
    """A whole file: its size, its digests by name, the ETag it came with."""

    size: int
    digests: dict[str, str]
    etag: str | None = None


def part_path(target: Path) -> Path:
    """Where the bytes of an unfinished download lie."""
    return target.parent / f".{target.name}.part"


def fetch(
    client: Client,
    url: str,
    target: Path,
    expected: Expected,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Fetched:
    """Fetch `url` to `target`; the caller holds the target's lock.

    Args:
        client: How to ask.
        url: Link to the file itself.
        target: Appears whole or not at all.
        expected: What is known beforehand.
        progress: Called with (bytes there, bytes in all or None).

    Raises:
        Failed, Gone: The source does not give the file; what came stays in the part file for the next call.
        Mismatch: Size or hash is wrong; the file is kept as `<name>.bad`.
        NoSpace: The disk is full; the part file stays.
    """
    try:
        return _Transfer(client, url, target, expected, progress).run()
    except OSError as error:
        raise as_fetch_error(error, target) from error


def as_fetch_error(error: OSError, target: Path) -> FetchError:
    """What the operating system refused, in words: a full disk, a quota, missing permission."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"{target}: the disk is full ({error.strerror}); make room and run the same command again, "
            "it goes on from where it stopped."
        )
    return Failed(f"{error.filename or target}: {error.strerror or error}.")


class _Transfer:
    """State of one transfer: the part file, and beside it what the server said of it (validators, total)."""

    def __init__(
        self,
        client: Client,
        url: str,
        target: Path,
        expected: Expected,
        progress: Callable[[int, int | None], None],
    ) -> None:
        self.client, self.url, self.target, self.expected, self.progress = (
            client,
            url,
            target,
            expected,
            progress,
        )
        self.part = part_path(target)
        self.note = self.part.with_name(self.part.name + ".json")
        self.resumed = False
        self.total: int | None = None

    def run(self) -> Fetched:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        fetched = self.client.persist(self._once, self._have)
        wrong = self.expected.differences(fetched.size, fetched.digests)
        if wrong and self.resumed:
            # A part left by another version of the file, without a validator to tell: begin again, once.
            self._forget()
            self.resumed = False
            fetched = self.client.persist(self._once, self._have)
            wrong = self.expected.differences(fetched.size, fetched.digests)
        if wrong:
            self._set_aside(wrong)
        os.replace(self.part, self.target)
        self.note.unlink(missing_ok=True)
        return fetched

    def _set_aside(self, wrong: list[str]) -> None:
        bad = self.target.with_name(self.target.name + ".bad")
        os.replace(self.part, bad)
        self.note.unlink(missing_ok=True)
        raise Mismatch(f"{self.url}: {', '.join(wrong)}. Kept aside as {bad}; nothing was put at {self.target}.")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _once(self) -> Fetched:
        """One request: the whole file, or the rest of it."""
        have, known = self._resumable()
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator := _validator(known):
                headers["If-Range"] = validator
        response = self.client.open(self.url, headers)
        with response:
            if response.status_code == 416:
                return self._beyond_the_end(response, have)
            if have and response.status_code == 206 and self._continues(response, have, known):
                return self._receive(response, have)
            if response.status_code == 206:
                self._forget()
                raise Retry(f"{self.url}: the server answered with another part than asked for")
            # 200: no ranges here, or the file has changed since: begin again.
            return self._receive(response, 0)

    def _resumable(self) -> tuple[int, dict[str, Any]]:
        """Bytes that may be kept and what was noted of them; (0, {}) to begin again."""
        have = self._have()
        try:
            known = json.loads(self.note.read_text())
        except (FileNotFoundError, ValueError):
            known = {}
        pinned = self.expected.sha256 or self.expected.md5 or self.expected.git_sha1
        same = (known.get("pinned") == pinned) if pinned else (known.get("url") == self.url and _validator(known))
        if not have or not known or not same or (known.get("total") is not None and have > known["total"]):
            return 0, {}
        return have, known if known.get("url") == self.url else {}

    def _continues(self, response: requests.Response, have: int, known: dict[str, Any]) -> bool:
        """Whether a 206 is the rest of the very file that the part file began."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            return False
        total = None if found[3] == "*" else int(found[3])
        etag = response.headers.get("ETag")
        if known.get("etag") and etag and etag != known["etag"]:
            return False
        return not (known.get("total") and total) or known["total"] == total or not known.get("etag")

    def _beyond_the_end(self, response: requests.Response, have: int) -> Fetched:
        """416: all of the file is here already (the length announced first was wrong), or it has shrunk."""
        found = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
        if found and int(found[1]) == have:
            hasher = Hasher(self.expected)
            feed(hasher, self.part)
            return Fetched(have, hasher.digests(), response.headers.get("ETag"))
        self._forget()
        raise Retry(f"{self.url}: the file has changed at the source")

    def _receive(self, response: requests.Response, start: int) -> Fetched:
        self._check_head(response)
        length = response.headers.get("Content-Length", "")
        self.total = start + int(length) if length.isdigit() else None
        if self.expected.size is not None and self.total not in (None, self.expected.size):
            what = f"{self.url}: the server offers {self.total} bytes, {self.expected.size} were expected"
            raise Retry(what, final=Mismatch(f"{what}: nothing was kept; the file at the source may have changed."))
        hasher = Hasher(self.expected)
        try:
            with self.part.open("r+b" if start else "wb") as file:
                if start:
                    self.resumed = True
                    feed(hasher, self.part)
                    file.seek(start)
                else:
                    self._write_note(response)
                size = self._stream(response, file, hasher, start)
        finally:
            digests = hasher.digests()
        if self.total is not None and size != self.total:
            raise Retry(f"{self.url}: cut after {size} of {self.total} bytes")
        return Fetched(size, digests, response.headers.get("ETag"))

    def _stream(self, response: requests.Response, file: Any, hasher: Hasher, size: int) -> int:
        try:
            while chunk := response.raw.read1(CHUNK, decode_content=False):
                if size == 0:
                    self._check_first_bytes(chunk)
                file.write(chunk)
                hasher.update(chunk)
                size += len(chunk)
                self.progress(size, self.total)
                if self.client.stop.is_set():
                    raise Failed(f"{self.url}: stopped after {size} bytes; the next call goes on from there")
        except NETWORK_ERRORS as error:
            raise Retry(f"{self.url}: the connection broke after {size} bytes") from error
        return size

    def _check_head(self, response: requests.Response) -> None:
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml") and not self.target.name.endswith((".html", ".htm")):
            raise Failed(_page_message(self.url, "a web page"))
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise Failed(f"{self.url}: sent compressed although that was not asked for.")

    def _check_first_bytes(self, chunk: bytes) -> None:
        if what := page_or_pointer(chunk, self.target.name):
            self._forget()
            raise Failed(_page_message(self.url, what))

    def _write_note(self, response: requests.Response) -> None:
        note = {
            "url": self.url,
            "etag": response.headers.get("ETag"),
            "last_modified": response.headers.get("Last-Modified"),
            "total": self.total,
            "pinned": self.expected.sha256 or self.expected.md5 or self.expected.git_sha1,
        }
        self.note.write_text(json.dumps(note))


def _validator(known: dict[str, Any]) -> str | None:
    """What If-Range may carry: a strong ETag, else the date (RFC 9110, section 13.1.5)."""
    etag = known.get("etag")
    if etag and not etag.startswith("W/"):
        return etag
    return known.get("last_modified")


def _page_message(url: str, what: str) -> str:
    why = "a login, terms to accept, or a quota page" if what == "a web page" else "its content is stored elsewhere"
    return f"{url} gave {what} instead of the file ({why}): open the link in a browser to see."
