"""Carrying out a plan: downloads side by side, each under a lock, each entry recorded when it is whole."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .archive import extract, extract_all
from .digest import Expected, hash_file, page_or_pointer
from .http import Client
from .lock import locked
from .packages import fetch_drive, with_package
from .plan import PACKED_FORMATS, Place, Plan, Task, relative
from .records import FileRecord, Record, Records
from .schema import HUB_CACHE, ArchiveSource, Entry
from .state import check, missing_parts
from .status import ByHand, Failed, FetchError, Gone, Mismatch
from .transfer import as_fetch_error, fetch

__all__ = ["Outcome", "Watcher", "carry_out"]


class Watcher(Protocol):
    """Who is told how it goes."""

    def started(self, task: Task) -> Callable[[int, int | None], None]:
        """A task begins; gives the function to call with (bytes there, bytes in all)."""

    def ended(self, task: Task) -> None:
        """A task is over."""

    def said(self, text: str) -> None:
        """A line for the user."""


@dataclass
class Outcome:
    """How one entry came out.

    Attributes:
        files: What was put in place.
        first_hashes: Files for which no hash was known before: it is recorded now.
        error: Why it is not whole, or None.
    """

    entry: Entry
    files: list[FileRecord] = field(default_factory=list)
    first_hashes: list[FileRecord] = field(default_factory=list)
    revision: str | None = None
    error: FetchError | None = None


def carry_out(
    plan: Plan, root: Path, records: Records, client: Client, jobs: int, watcher: Watcher
) -> dict[str, Outcome]:
    """Fetch all tasks; a failure of one does not stop the others.

    Returns:
        Entry id -> outcome, for every entry of a task.
    """
    outcomes = {entry.id: Outcome(entry) for task in plan.tasks for entry in task.entries}
    worker = _Worker(root, records, client, watcher)
    pool = ThreadPoolExecutor(max(1, jobs))
    running = {pool.submit(worker.run, task): task for task in plan.tasks}
    try:
        for future in as_completed(running):
            task, error = running[future], future.exception()
            watcher.ended(task)
            if error is not None and not isinstance(error, FetchError):
                raise error
            for entry in task.entries:
                outcome = outcomes[entry.id]
                outcome.revision = task.remote.revision or outcome.revision
                if error is None:
                    _note(outcome, future.result(), root)
                elif outcome.error is None:
                    outcome.error = error
    except BaseException:
        client.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for outcome in outcomes.values():
        _finish(outcome, root, records)
    return outcomes


def _note(outcome: Outcome, got: list[tuple[Place, int, str]], root: Path) -> None:
    for place, size, sha256 in got:
        if place.entry.id == outcome.entry.id:
            record = FileRecord(relative(place, root), size, sha256)
            outcome.files.append(record)
            if not place.expected.has_hash:
                outcome.first_hashes.append(record)


def _finish(outcome: Outcome, root: Path, records: Records) -> None:
    """Record an entry that is whole; else say what it lacks."""
    entry = outcome.entry
    if outcome.error is not None:
        return
    if isinstance(entry.source, ArchiveSource) and entry.source.format in PACKED_FORMATS:
        outcome.error = _packed(entry, root, outcome.files)
    elif entry.is_folder and entry.path != HUB_CACHE and (lacks := missing_parts(entry, root / entry.path)):
        outcome.error = Failed(f"{entry.id}: fetched, but not whole: {'; '.join(lacks[:3])}.")
    if outcome.error is None or isinstance(outcome.error, ByHand):
        source = f"{entry.source.kind} {getattr(entry.source, 'repo', '') or getattr(entry.source, 'url', '')}"
        files = tuple(sorted(outcome.files, key=lambda item: item.path))
        records.put(Record(entry.id, source.strip(), outcome.revision, files))


def _packed(entry: Entry, root: Path, files: list[FileRecord]) -> FetchError:
    folder = root / entry.path
    first = sorted(files, key=lambda item: Path(item.path).suffix != ".zip")[0]
    if entry.source.format == "rar":
        tool, run = "unrar, or 7z (package p7zip-full)", f"unrar x {root / first.path} {folder}/"
    else:
        tool, run = "7z (package p7zip-full)", f"7z x -o{folder} {root / first.path}"
    return ByHand(f"{entry.id} is fetched and left packed: install {tool}, run '{run}', then '--verify {entry.id}'.")


@dataclass
class _Worker:
    root: Path
    records: Records
    client: Client
    watcher: Watcher

    def run(self, task: Task) -> list[tuple[Place, int, str]]:
        """Do one task; (place, size, sha256) of each file put in place."""
        progress = self.watcher.started(task)
        stopped = self.client.stop.is_set

        waited = []

        def waiting() -> None:
            waited.append(True)
            self.watcher.said(f"{task.at.name}: another call is fetching it; waiting for it to end.")

        try:
            with locked(task.at, stopped, waiting):
                if task.remote.package:
                    return self._from_package(task)
                if task.is_archive:
                    return self._from_archive(task, progress)
                return self._plain(task, progress, bool(waited))
        except KeyboardInterrupt as error:
            raise Failed("stopped") from error
        except OSError as error:
            raise as_fetch_error(error, task.at) from error

    def _plain(self, task: Task, progress: Callable, waited: bool) -> list[tuple[Place, int, str]]:
        first = task.places[0]
        source = next((place.target for place in task.places if self._is_good(place)), None)
        if source is None and waited and not first.expected.has_hash and first.target.is_file():
            source = first.target  # the other call has just fetched it
        if source is None:
            sha256 = self._fetch(task, first.expected, progress)
            source = task.at
        else:
            sha256 = first.expected.sha256 or hash_file(source, Expected())["sha256"]
        return [(place, *_put(source, place, sha256)) for place in task.places]

    def _is_good(self, place: Place) -> bool:
        """Whether another call, or an earlier part of a folder, put the very file there."""
        size = place.expected.size
        if not place.target.is_file() or not place.expected.has_hash:
            return False
        if size is not None and place.target.stat().st_size != size:
            return False
        digests = hash_file(place.target, place.expected)
        return not place.expected.differences(place.target.stat().st_size, digests)

    def _fetch(self, task: Task, expected: Expected, progress: Callable) -> str:
        remote = task.remote
        if remote.method == "google_drive":
            return fetch_drive(remote.locator, task.at, expected).digests["sha256"]
        links = [remote.locator, *remote.others]
        for number, link in enumerate(links, 1):
            try:
                return fetch(self.client, link, task.at, expected, progress).digests["sha256"]
            except Gone:
                if number == len(links):
                    raise
                self.watcher.said(f"{link} is gone; trying {links[number]}")
        raise AssertionError("a task has a link")

    def _from_package(self, task: Task) -> list[tuple[Place, int, str]]:
        got: list[tuple[Place, int, str]] = []
        with_package(task.remote.package, task.at.parent, lambda file: got.extend(_members(file, task.places)))
        return got

    def _from_archive(self, task: Task, progress: Callable) -> list[tuple[Place, int, str]]:
        """Fetch the archive, unpack what is wanted, and remove it."""
        if task.folder and check(task.folder[0], self.root, self.records).name == "there":
            return []
        if not task.folder and all(self._is_good(place) for place in task.places):
            return [(place, *_size_and_hash(place.target)) for place in task.places]
        if not task.at.is_file():
            self._fetch(task, task.remote.expected, progress)
        try:
            if task.folder:
                entry, folder = task.folder
                extract_all(task.at, folder, entry.source.members, entry.source.flatten)
                got = []
            else:
                got = _members(task.at, task.places)
        except (Failed, Mismatch) as error:
            # Not to be taken for good by the next call, and there to be looked at.
            bad = task.at.with_name(f"{task.remote.name}.bad")
            task.at.replace(bad)
            raise type(error)(f"{error} The archive is kept aside as {bad}.") from error
        task.at.unlink()
        return got


def _members(archive: Path, places: list[Place]) -> list[tuple[Place, int, str]]:
    by_name: dict[str, Place] = {}
    for place in places:
        by_name.setdefault(place.member, place)
    got = []

    def checked(name: str, file: Path) -> None:
        place = by_name[name]
        digests, size = hash_file(file, place.expected), file.stat().st_size
        wrong = place.expected.differences(size, digests)
        with file.open("rb") as opened:
            what = page_or_pointer(opened.read(512), place.target.name)
        if wrong or what:
            bad = place.target.with_name(place.target.name + ".bad")
            file.replace(bad)
            reason = ", ".join(wrong) or f"it is {what}"
            raise Mismatch(f"{archive.name}, member {name}: {reason}. Kept aside as {bad}.")
        got.append((place, size, digests["sha256"]))

    extract(archive, {name: place.target for name, place in by_name.items()}, checked)
    digests = {place.member: sha256 for place, _, sha256 in got}
    for place in places:
        if place is not by_name[place.member]:
            got.append((place, *_put(by_name[place.member].target, place, digests[place.member])))
    return got


def _size_and_hash(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hash_file(path, Expected())["sha256"]


def _put(source: Path, place: Place, sha256: str) -> tuple[int, str]:
    """Give a file its further names: a hard link where the file system allows it, else a copy."""
    if place.target != source:
        place.target.parent.mkdir(parents=True, exist_ok=True)
        beside = place.target.with_name(f".{place.target.name}.link")
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
        beside.replace(place.target)
    if place.pointer is not None:
        _point(place)
    return place.target.stat().st_size, sha256


def _point(place: Place) -> None:
    """Name a blob in a snapshot of the hub's cache, and the snapshot in refs, as huggingface_hub does."""
    pointer = place.pointer
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(os.path.relpath(place.target, pointer.parent))
    snapshots = next(parent for parent in pointer.parents if parent.name == "snapshots")
    commit = pointer.relative_to(snapshots).parts[0]
    refs = snapshots.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / getattr(place.entry.source, "revision", "main")).write_text(commit)
