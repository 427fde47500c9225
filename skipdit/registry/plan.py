"""The plan: what is to be fetched, once each, where it goes, how much room it takes, under which terms."""

import hashlib
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .digest import Expected
from .records import Record, Records
from .schema import HUB_CACHE, ArchiveSource, Entry, parse_size
from .sources import Remote, Resolver
from .state import State, base_folder, check, hub_cache
from .status import FetchError, NoSpace
from .transfer import part_path

__all__ = ["Place", "Plan", "Task", "check_space", "make_plan", "relative"]

PACKED_FORMATS = ("rar", "multi-volume-zip")


@dataclass(frozen=True)
class Place:
    """One file on disk that a task brings.

    Attributes:
        entry: Whose file it is.
        target: Where it goes.
        expected: What is known of it.
        member: Its name in the archive or package; None: it is what was fetched.
        pointer: In the hub's cache, the name in the snapshot that links to the target.
    """

    entry: Entry
    target: Path
    expected: Expected
    member: str | None = None
    pointer: Path | None = None


@dataclass
class Task:
    """One download and all that comes from it.

    Attributes:
        remote: What is fetched.
        at: Where it is fetched to.
        places: The files it brings; empty if `folder` says that an archive is unpacked whole.
        folder: (entry, folder) of an archive to unpack.
    """

    remote: Remote
    at: Path
    places: list[Place] = field(default_factory=list)
    folder: tuple[Entry, Path] | None = None
    estimate: int | None = None

    @property
    def entries(self) -> list[Entry]:
        owners = [place.entry for place in self.places] + ([self.folder[0]] if self.folder else [])
        return list({entry.id: entry for entry in owners}.values())

    @property
    def is_archive(self) -> bool:
        return self.folder is not None or any(place.member for place in self.places)

    def bytes_to_fetch(self) -> int | None:
        """Bytes still to come, less what an interrupted download left; None if unknown."""
        known = (self.remote.expected.size, self.remote.announced, self.estimate)
        size = next((size for size in known if size is not None), None)
        part = part_path(self.at)
        here = part.stat().st_size if part.exists() else 0
        return None if size is None else max(0, size - here)

    def bytes_to_unpack(self) -> int:
        """Bytes that unpacking adds, as far as is known."""
        if self.folder:
            source = self.folder[0].source
            packed = self.remote.expected.size or self.remote.announced or self.estimate or 0
            known = isinstance(source, ArchiveSource) and source.unpacked
            return (parse_size(source.unpacked, self.folder[0].units) or 0) if known else packed
        sizes = [place.expected.size or place.entry.size_estimate or 0 for place in self.places if place.member]
        return sum(sizes)


@dataclass
class Plan:
    """What a call would do.

    Attributes:
        there: Entries that need nothing, with their state.
        tasks: What is to be fetched.
        problems: Entry id -> why it cannot be fetched.
    """

    there: dict[str, State] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    problems: dict[str, FetchError] = field(default_factory=dict)

    def bytes_to_fetch(self) -> tuple[int, int]:
        """(bytes as far as known or estimated, number of tasks of unknown size)."""
        sizes = [task.bytes_to_fetch() for task in self.tasks]
        return sum(size for size in sizes if size is not None), sizes.count(None)

    def needs(self) -> dict[Path, int]:
        """Folder on each file system that is written to -> bytes needed there."""
        by_device: dict[int, tuple[Path, int]] = {}
        for task in self.tasks:
            folder = _existing(task.at.parent)
            device = folder.stat().st_dev
            known, so_far = by_device.get(device, (folder, 0))
            need = (task.bytes_to_fetch() or 0) + task.bytes_to_unpack()
            by_device[device] = (known, so_far + need)
        return dict(by_device.values())


def make_plan(
    entries: list[Entry],
    root: Path,
    records: Records,
    resolver: Resolver | None,
    jobs: int,
    level: str = "size",
) -> Plan:
    """Look at the disk, ask the sources for what is not there, and merge what is asked for twice.

    Args:
        entries: What is wanted.
        root: What their paths are relative to.
        records: What earlier fetches noted.
        resolver: None: the network is not used, what is missing becomes a problem.
        jobs: Sources asked at a time.
        level: How entries that are there are checked, "size" or "hash".

    Raises:
        UserError: Two entries would put different files at one path.
    """
    plan = Plan()
    wanted = []
    for entry in entries:
        state = check(entry, root, records, level)
        if state.name == "there":
            plan.there[entry.id] = state
        else:
            wanted.append(entry)
    if resolver is None:
        return plan
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        answers = list(pool.map(lambda entry: _ask(resolver, entry), wanted))
    tasks: dict[tuple, Task] = {}
    for entry, answer in zip(wanted, answers, strict=True):
        if isinstance(answer, FetchError):
            plan.problems[entry.id] = answer
        else:
            _add(tasks, entry, answer, root, records.get(entry.id))
    plan.tasks = list(tasks.values())
    _refuse_collisions(plan.tasks)
    return plan


def _ask(resolver: Resolver, entry: Entry) -> list[Remote] | FetchError:
    try:
        return resolver.resolve(entry)
    except FetchError as error:
        return error


def _add(tasks: dict[tuple, Task], entry: Entry, remotes: list[Remote], root: Path, record: Record | None) -> None:
    source = entry.source
    goal = root / entry.path
    packed = isinstance(source, ArchiveSource) and source.format in PACKED_FORMATS
    noted = {item.path: Expected(item.size, item.sha256) for item in record.files} if record else {}
    for remote in remotes:
        if isinstance(source, ArchiveSource) and not packed:
            folder = goal if entry.is_folder else goal.parent
            task = _task(tasks, ("archive", remote.locator, str(folder)), remote, _beside(folder, remote))
            if source.member:
                expected = Expected(entry.bytes, entry.sha256, entry.md5)
                if not expected.has_hash:
                    expected = noted.get(entry.path, expected)
                task.places.append(Place(entry, goal, expected, source.member))
            else:
                task.folder = (entry, goal)
                task.estimate = entry.size_estimate
            continue
        if remote.package:
            task = _task(tasks, ("pypi", remote.locator, str(goal)), remote, goal)
            task.places.append(Place(entry, goal, remote.expected, remote.package.member))
            continue
        target, pointer = (goal / remote.name if entry.is_folder else goal), None
        if entry.path == HUB_CACHE:
            target, pointer = _in_cache(source, remote)
        expected = remote.expected
        if not expected.has_hash and pointer is None:
            # The first fetch noted a hash: it is the measure now.
            expected = noted.get(str(target.relative_to(root)), expected)
        task = _task(tasks, ("file", remote.key), remote, target)
        task.places.append(Place(entry, target, expected, None, pointer))
        if not entry.is_folder:
            task.estimate = entry.size_estimate


def _task(tasks: dict[tuple, Task], key: tuple, remote: Remote, at: Path) -> Task:
    if key not in tasks:
        tasks[key] = Task(remote, at)
    return tasks[key]


def _beside(folder: Path, remote: Remote) -> Path:
    """Where an archive lies until it is unpacked: hidden, on the target's file system, one name a link."""
    mark = hashlib.sha256(remote.locator.encode()).hexdigest()[:8]
    return folder / f".{mark}-{remote.name}"


def _in_cache(source: object, remote: Remote) -> tuple[Path, Path]:
    """The blob and the snapshot's name of a file in the cache of huggingface_hub."""
    from huggingface_hub.file_download import repo_folder_name

    folder = hub_cache() / repo_folder_name(repo_id=source.repo, repo_type=source.repo_type)
    return folder / "blobs" / str(remote.etag), folder / "snapshots" / str(remote.revision) / remote.name


def _refuse_collisions(tasks: list[Task]) -> None:
    """Two sources for one path (also by case or Unicode form): refused before anything is fetched."""
    seen: dict[str, tuple[Place, Task]] = {}
    for task in tasks:
        for place in list(task.places):
            name = unicodedata.normalize("NFC", str(place.pointer or place.target)).casefold()
            other, owner = seen.setdefault(name, (place, task))
            if other is not place and owner is not task:
                raise UserError(
                    f"{place.entry.id} and {other.entry.id} would both write {place.target} from different "
                    "files: fetch one of them with another --root, or leave the file out ('ignore')."
                )
            if other is not place and str(other.target) != str(place.target):
                raise UserError(f"{other.target} and {place.target} differ only in case: leave one out with 'ignore'.")


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def check_space(plan: Plan) -> None:
    """See that each file system has room for the downloads and for unpacking them.

    Raises:
        NoSpace: One has not.
    """
    for folder, need in plan.needs().items():
        free = shutil.disk_usage(folder).free
        if need > free:
            raise NoSpace(
                f"{folder}: {need} bytes are needed for download and unpacking, {free} are free: make "
                "room, or choose another --root."
            )


def relative(place: Place, root: Path) -> str:
    """A place's path as a record notes it."""
    return str((place.pointer or place.target).relative_to(base_folder(place.entry, root)))
