"""From an entry's source to files that can be fetched: listing repositories, mending share links."""

import fnmatch
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from .digest import Expected
from .http import Client, Retry, origin
from .schema import (
    ArchiveSource,
    DropboxSource,
    Entry,
    GoogleDriveSource,
    HubSource,
    ManualSource,
    ModelScopeSource,
    PypiSource,
    Source,
    UrlSource,
)
from .status import ByHand, Failed, FetchError, Gone, Mismatch

__all__ = ["HUB", "Remote", "Resolver", "hub_endpoint", "make_client"]

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Remote:
    """One file at its source.

    Attributes:
        method: "http", "google_drive" or "pypi".
        locator: The link, the file's id, or "package==version".
        name: Its path below the source (below the subfolder, if one was asked for).
        expected: What the registry or the source says of it.
        etag: What the hub's cache calls it.
        revision: The commit that it was listed at.
        others: Links to try if the first one is gone.
        announced: Size in bytes that a HEAD request gave, for the plan only.
        package: For pypi, the whole source.
    """

    method: str
    locator: str
    name: str
    expected: Expected = Expected()
    etag: str | None = None
    revision: str | None = None
    others: tuple[str, ...] = ()
    announced: int | None = None
    package: PypiSource | None = None

    @property
    def key(self) -> str:
        """Equal for files of equal content, as far as is known: fetched once."""
        return self.expected.sha256 or self.locator


def hub_endpoint() -> str:
    """Address of the hub: HF_ENDPOINT or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def make_client(mirrors: list[str], **settings: Any) -> tuple[Client, str]:
    """A client and the hub's address.

    Args:
        mirrors: "URL" takes the hub's place, "PREFIX=URL" replaces the beginning of links. A mirror of the
            hub gets no token: that belongs to HF_ENDPOINT's host.
        settings: Passed on to `Client`.
    """
    from huggingface_hub import get_token

    endpoint, rewrites = hub_endpoint(), []
    for mirror in mirrors:
        prefix, _, target = mirror.rpartition("=")
        if prefix:
            rewrites.append((prefix, target))
        else:
            endpoint = mirror.rstrip("/")
    return Client(token=get_token(), token_origin=origin(hub_endpoint()), rewrites=rewrites, **settings), endpoint


@dataclass
class Resolver:
    """Lists what sources hold; each repository is asked for once.

    Attributes:
        client: For sizes of plain links.
        endpoint: Address of the hub.
        pinned: Entry id -> commit recorded at its first fetch, for entries that name a branch.
    """

    client: Client
    endpoint: str
    pinned: Callable[[str], str | None] = lambda entry_id: None
    _listings: dict[tuple, Any] = field(default_factory=dict)

    def resolve(self, entry: Entry) -> list[Remote]:
        """The files of an entry, from its source or else from the first mirror that has it.

        Raises:
            ByHand: The entry is manual.
            Failed, Gone: The source cannot be read.
        """
        source = entry.source
        try:
            remotes = self._of(source, entry)
        except Gone as gone:
            for mirror in source.mirrors:
                try:
                    return self._of(mirror, entry)
                except FetchError:
                    continue
            raise gone
        links = [self.link(mirror) for mirror in source.mirrors if isinstance(mirror, UrlSource)]
        if len(remotes) == 1 and links:
            remotes = [replace(remotes[0], others=tuple(links))]
        return remotes

    def _of(self, source: Source, entry: Entry) -> list[Remote]:
        if isinstance(source, ManualSource):
            raise ByHand(f"{entry.id}: {source.how} Path: {entry.path}")
        if isinstance(source, ArchiveSource):
            # The entry's hashes are those of a member: nothing is known of the archive itself.
            return self._of(source.archive, replace(entry, bytes=None, md5=None, sha256=None, size=None))
        known = Expected(entry.bytes, entry.sha256, entry.md5)
        if isinstance(source, HubSource):
            return self._hub(source, entry, known)
        if isinstance(source, UrlSource):
            link = self.link(source)
            announced = self._announced(link) if known.size is None and entry.size is None else None
            return [Remote("http", link, Path(urlsplit(link).path).name, known, announced=announced)]
        if isinstance(source, GoogleDriveSource):
            return [Remote("google_drive", source.file_id, Path(entry.path).name, known)]
        if isinstance(source, PypiSource):
            name = f"{source.package}=={source.version}"
            return [Remote("pypi", name, Path(source.member).name, known, package=source)]
        return self._modelscope(source)

    def _announced(self, link: str) -> int | None:
        """Size of a link that nothing else tells; None if the server does not say, which is no failure."""
        try:
            with self.client.open(link, method="HEAD") as response:
                length = response.headers.get("Content-Length", "")
        except (FetchError, Retry):
            return None
        is_page = response.headers.get("Content-Type", "").startswith("text/html")
        return int(length) if length.isdigit() and not is_page else None

    @staticmethod
    def link(source: UrlSource) -> str:
        """The link to the file itself: Dropbox's share links get dl=1, the rest of their query is kept."""
        if not isinstance(source, DropboxSource):
            return source.url
        parts = urlsplit(source.url)
        query = [item for item in parse_qsl(parts.query) if item[0] not in ("dl", "raw")] + [("dl", "1")]
        return urlunsplit(parts._replace(query=urlencode(query)))

    def _hub(self, source: HubSource, entry: Entry, known: Expected) -> list[Remote]:
        from huggingface_hub import hf_hub_url

        revision = source.revision
        is_pinned = re.fullmatch(r"[0-9a-f]{40}", revision) is not None
        if not is_pinned and (recorded := self.pinned(entry.id)):
            revision, is_pinned = recorded, True

        def remote(name: str, shown: str, expected: Expected, etag: str | None, commit: str) -> Remote:
            link = hf_hub_url(source.repo, name, repo_type=source.repo_type, revision=commit)
            link = self.endpoint + "/" + link.split("/", 3)[3]
            return Remote("http", link, shown, expected, etag, commit)

        if source.file and is_pinned and known.has_hash and known.size is not None:
            return [remote(source.file, Path(source.file).name, known, known.sha256, revision)]
        commit, listing = self._list_hub(source.repo, source.repo_type, revision)
        found = []
        for name, expected, etag in listing:
            if shown := _chosen(name, source):
                if source.file:
                    expected = _merge(known, expected, f"{entry.id} ({source.repo} at {commit})")
                found.append(remote(name, shown, expected, etag, commit))
        if not found:
            raise Gone(f"{entry.id}: {source.repo} at {revision} has none of the files asked for.")
        plain = {item for item in source.files if not re.search(r"[*?\[]", item)}
        if missing := sorted(plain - {item.name for item in found}):
            raise Gone(f"{entry.id}: {source.repo} at {revision} has no {missing[0]}.")
        return found

    def _list_hub(self, repo: str, repo_type: str, revision: str) -> tuple[str, list[tuple]]:
        key = (repo, repo_type, revision)
        if key not in self._listings:
            info = self.client.persist(lambda: self._ask_hub(repo, repo_type, revision))
            rows = []
            for item in info.siblings:
                sha256 = item.lfs.sha256 if item.lfs else None
                git_sha1 = None if item.lfs else item.blob_id
                rows.append((item.rfilename, Expected(item.size, sha256, None, git_sha1), sha256 or item.blob_id))
            self._listings[key] = (info.sha, rows)
        return self._listings[key]

    def _ask_hub(self, repo: str, repo_type: str, revision: str) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        own_host = origin(self.endpoint) == self.client.token_origin
        api = HfApi(endpoint=self.endpoint, token=(self.client.token or False) if own_host else False)
        try:
            return api.repo_info(
                repo, repo_type=repo_type, revision=revision, files_metadata=True, timeout=self.client.idle
            )
        except GatedRepoError as error:
            raise Failed(f"{repo}: accept its terms at {HUB}/{repo}, then set HF_TOKEN.") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise Gone(f"{repo} at {revision}: the hub has no such repository or revision.") from error
        except OfflineModeIsEnabled as error:
            raise Failed(f"{repo}: HF_HUB_OFFLINE is set.") from error
        except HfHubHTTPError as error:
            code = error.response.status_code if error.response is not None else 0
            after = error.response.headers.get("Retry-After", "") if error.response is not None else ""
            if code == 429 or code >= 500:
                raise Retry(f"{repo}: HTTP {code}", float(after) if after.isdigit() else None) from error
            kind = Gone if code in (404, 410) else Failed
            raise kind(f"{repo} at {revision}: HTTP {code} from the hub.") from error
        except Exception as error:
            # The HTTP library below huggingface_hub differs between its versions: all else is the network's.
            raise Retry(f"{self.endpoint}, {repo}: {type(error).__name__}: {str(error)[:120]}") from error

    @staticmethod
    def _modelscope(source: ModelScopeSource) -> list[Remote]:
        try:
            from modelscope.hub.file_download import get_file_download_url

            endpoint = os.environ.get("MODELSCOPE_ENDPOINT")
            rows = _list_modelscope(source, endpoint)
        except ImportError as error:
            raise ByHand(f"{source.repo} is on ModelScope: pip install modelscope, then run again.") from error
        except Exception as error:
            raise Failed(f"ModelScope, {source.repo}: {type(error).__name__}: {str(error)[:160]}") from error
        found = []
        for path, size, sha256 in rows:
            if shown := _chosen(path, source):
                link = get_file_download_url(source.repo, path, source.revision, endpoint)
                found.append(Remote("http", link, shown, Expected(size, sha256), revision=source.revision))
        if not found:
            raise Gone(f"{source.repo} at {source.revision} has none of the files asked for.")
        return found


def _list_modelscope(source: ModelScopeSource, endpoint: str | None) -> list[tuple[str, int | None, str | None]]:
    """(path, size, sha256) of each file: the package's newer half tells the hash, its older half may not."""
    try:
        from modelscope_hub import HubApi
    except ImportError:
        from modelscope.hub.api import HubApi as OldApi

        rows = OldApi(endpoint=endpoint).get_model_files(source.repo, revision=source.revision, recursive=True)
        return [(row["Path"], row.get("Size"), row.get("Sha256")) for row in rows if row.get("Type") != "tree"]
    files = HubApi(endpoint=endpoint).list_repo_files(source.repo, "model", revision=source.revision)
    return [(item.path, item.size, item.sha256) for item in files if getattr(item, "type", "blob") != "tree"]


def _chosen(name: str, source: HubSource | ModelScopeSource) -> str | None:
    """The name below the entry's folder of a file that is wanted, else None."""
    if file := getattr(source, "file", None):
        return Path(name).name if name == file else None
    folder = getattr(source, "subfolder", None)
    if folder:
        if not name.startswith(folder.rstrip("/") + "/"):
            return None
        name = name[len(folder.rstrip("/")) + 1 :]
    if ".." in Path(name).parts or name.startswith("/"):
        raise Failed(f"{source.repo} lists {name!r}, which would leave the folder: refused.")
    wanted = not source.files or any(fnmatch.fnmatchcase(name, pattern) for pattern in source.files)
    ignored = any(fnmatch.fnmatchcase(name, pattern) for pattern in source.ignore)
    return name if wanted and not ignored else None


def _merge(known: Expected, listed: Expected, where: str) -> Expected:
    """What the registry and the hub say together; a contradiction is told before anything is fetched."""
    for name in ("size", "sha256"):
        ours, theirs = getattr(known, name), getattr(listed, name)
        if ours is not None and theirs is not None and ours != theirs:
            raise Mismatch(f"{where}: the registry says {name} {ours}, the hub {theirs}: nothing was fetched.")
    return Expected(
        known.size if known.size is not None else listed.size,
        known.sha256 or listed.sha256,
        known.md5,
        listed.git_sha1,
    )
