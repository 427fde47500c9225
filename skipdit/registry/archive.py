"""Archives: members checked before anything is written, unpacked beside the target, then moved."""

import fnmatch
import lzma
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from .digest import CHUNK
from .status import ByHand, Failed, Mismatch, NoSpace

__all__ = ["Limits", "Member", "extract", "extract_all", "members_of", "refuse_packed"]

READ_ERRORS = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class Limits:
    """What an archive may grow to.

    Attributes:
        total: Bytes after unpacking.
        ratio: Unpacked bytes per packed byte, looked at beyond `ratio_from` bytes.
        members: Number of members.
    """

    total: int = 1 << 41
    ratio: float = 200.0
    ratio_from: int = 64 << 20
    members: int = 5_000_000


@dataclass(frozen=True)
class Member:
    """A file inside an archive."""

    name: str
    size: int


def members_of(path: Path, limits: Limits = Limits()) -> list[Member]:  # noqa: B008 (frozen)
    """The files of a zip or tar, or a refusal of the whole archive.

    Raises:
        Failed: It cannot be read, or it has a member that could write outside the target or is no plain file,
            two members that would land on one name (case and Unicode form ignored), or it is a bomb.
        ByHand: It is of a kind that needs a tool (rar, 7z, a volume of several).
    """
    refuse_packed(path)
    packed = max(path.stat().st_size, 1)
    found, seen, total = [], {}, 0
    with _reading(path):
        for name, size, what in _walk(path):
            _check_name(name, path)
            if what not in ("file", "folder"):
                raise Failed(f"{path.name}: member {name!r} is a {what}: the archive is refused.")
            if what == "folder":
                continue
            folded = _folded(name)
            if folded in seen:
                raise Failed(f"{path.name}: {name!r} and {seen[folded]!r} would be one file: refused.")
            seen[folded] = name
            total += size
            if total > limits.total or len(found) >= limits.members:
                raise Failed(f"{path.name} would unpack to more than {limits.total} bytes: refused.")
            if total > limits.ratio_from and total > limits.ratio * packed:
                raise Failed(f"{path.name} grows more than {limits.ratio:.0f} times on unpacking: refused.")
            found.append(Member(name, size))
    return found


def extract(path: Path, wanted: dict[str, Path], done: Callable[[str, Path], None]) -> None:
    """Unpack some members to files of any name.

    Args:
        path: The archive.
        wanted: Member -> target; all targets on one file system with the first one's folder.
        done: Called with (member, temporary file) before it is moved to its target; raises to refuse it.

    Raises:
        Failed: A member is not in the archive, or the archive is refused (see `members_of`).
    """
    sizes = {member.name: member.size for member in members_of(path)}
    if missing := sorted(set(wanted) - set(sizes)):
        raise Failed(f"{path.name} has no member {missing[0]!r}.")
    beside = next(iter(wanted.values())).parent
    beside.mkdir(parents=True, exist_ok=True)
    with _temporary(beside / f".unpacking-{path.name}", sum(sizes[name] for name in wanted)) as folder:
        ready = []
        for number, (name, target) in enumerate(wanted.items()):
            ready.append((folder / str(number), name, target))
        _unpack(path, {name: temporary for temporary, name, _ in ready}, sizes)
        for temporary, name, target in ready:
            done(name, temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)


def extract_all(
    path: Path,
    target: Path,
    patterns: tuple[str, ...] = (),
    flatten: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
) -> list[Member]:
    """Unpack an archive, or the members that match, into a folder.

    Args:
        path: The archive.
        target: The folder; what is in it stays, files of the same name are replaced.
        patterns: Members to take; empty: all.
        flatten: Drop the folders of members; two members of one name are refused.
        check: Called with the temporary folder before anything is moved; raises to refuse it.

    Returns:
        The members unpacked, with their names below `target`.
    """
    chosen = {}
    sizes = {}
    for member in members_of(path):
        if patterns and not any(fnmatch.fnmatch(member.name, pattern) for pattern in patterns):
            continue
        name = PurePosixPath(member.name).name if flatten else str(PurePosixPath(member.name))
        if _folded(name) in sizes:
            raise Failed(f"{path.name}: two members would be {name!r} after flattening: refused.")
        sizes[_folded(name)] = member.size
        chosen[member.name] = (name, member.size)
    if not chosen:
        raise Failed(f"{path.name} has no member that matches {', '.join(patterns) or 'anything'}.")
    target.mkdir(parents=True, exist_ok=True)
    with _temporary(target / f".unpacking-{path.name}", sum(size for _, size in chosen.values())) as folder:
        _unpack(
            path,
            {member: folder / name for member, (name, _) in chosen.items()},
            {member: size for member, (_, size) in chosen.items()},
        )
        check(folder)
        for name, _ in chosen.values():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(target / name)
    return [Member(name, size) for name, size in chosen.values()]


def refuse_packed(path: Path) -> None:
    """Name the tool for what Python cannot unpack.

    Raises:
        ByHand: A rar, a 7z, or one volume of a multi-volume zip.
    """
    with path.open("rb") as file:
        head = file.read(8)
    target = path.parent
    if head.startswith(b"Rar!"):
        tool = "unrar, 7z or bsdtar (packages unrar, p7zip-full, libarchive-tools)"
        raise ByHand(f"{path} is a rar: install {tool}, then run: unrar x {path} {target}/")
    if head.startswith(b"7z\xbc\xaf\x27\x1c"):
        raise ByHand(f"{path} is a 7z: install p7zip-full, then run: 7z x -o{target} {path}")
    volumes = sorted(path.parent.glob(f"{path.stem}.z[0-9][0-9]"))
    if volumes or re.fullmatch(r"\.z\d\d", path.suffix) or _spans_disks(path):
        whole = path.with_suffix(".zip")
        raise ByHand(
            f"{whole} is one of several volumes: install 7z (package p7zip-full), then run: 7z x -o{target} {whole}"
        )


def _spans_disks(path: Path) -> bool:
    """Whether the end record of a zip names another disk than 0 (APPNOTE 4.3.16)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65557))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    return at >= 0 and tail[at + 4 : at + 6] not in (b"\0\0", b"\xff\xff")


def _walk(path: Path) -> Iterator[tuple[str, int, str]]:
    """(name, size, "file" | "folder" | what it is instead) of each member."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                yield (
                    item.orig_filename if "\\" in item.orig_filename else item.filename,
                    item.file_size,
                    _zip_kind(item),
                )
        return
    with tarfile.open(path, "r:*") as archive:
        for item in archive:
            # A sparse member's header names the size it unfolds to.
            yield item.name, item.size, _tar_kind(item)


def _zip_kind(item: zipfile.ZipInfo) -> str:
    mode = item.external_attr >> 16
    if item.flag_bits & 1:
        return "file that is encrypted"
    if item.is_dir():
        return "folder"
    if stat.S_IFMT(mode) in (0, stat.S_IFREG):
        return "file"
    return "link" if stat.S_ISLNK(mode) else "device or pipe"


def _tar_kind(item: tarfile.TarInfo) -> str:
    if item.isreg():
        return "file"
    if item.isdir():
        return "folder"
    return "link" if item.issym() or item.islnk() else "device or pipe"


def _check_name(name: str, path: Path) -> None:
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise Failed(f"{path.name}: member {name!r} has an absolute path: the archive is refused.")
    if ".." in parts or "\\" in name or "\0" in name or not name.strip("./ "):
        raise Failed(f"{path.name}: member {name!r} could leave the folder: the archive is refused.")


def _folded(name: str) -> str:
    plain = str(PurePosixPath(name))
    return unicodedata.normalize("NFC", plain).casefold()


def _unpack(path: Path, places: dict[str, Path], sizes: dict[str, int]) -> None:
    with _reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name, place in places.items():
                    with archive.open(name) as source:
                        _write(source, place, sizes[name])
            return
        with tarfile.open(path, "r:*") as archive:
            for item in archive:
                if item.name in places and item.isreg():
                    source = archive.extractfile(item)
                    _write(source, places[item.name], sizes[item.name])


def _write(source: IO[bytes], place: Path, size: int) -> None:
    """Copy a member, but never more than it announced."""
    place.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with place.open("wb") as file:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left != 0:
        raise Mismatch(f"{place.name}: the member is not of the size that the archive announces.")


@contextmanager
def _temporary(folder: Path, needed: int) -> Iterator[Path]:
    """An empty folder, removed at the end; what a killed call left there is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise NoSpace(f"{folder.parent}: unpacking needs {needed} bytes, {free} are free.")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Failed(f"{path.name} cannot be read as an archive ({str(error)[:120]}).") from error
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise Failed(f"{path.name} cannot be read as an archive ({str(error)[:120]}).") from error
