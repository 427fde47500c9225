"""One HTTP client: redirects followed by hand, so that a token stays with its host; waits as servers ask."""

import email.utils
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from .. import __version__
from .status import Failed, FetchError, Gone

__all__ = ["Client", "Retry", "origin"]

Result = TypeVar("Result")
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 509, 520, 522, 524)
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)


class Retry(Exception):
    """Try again, after `after` seconds if the server said so; if all tries fail, raise `final`."""

    def __init__(self, reason: str, after: float | None = None, final: FetchError | None = None) -> None:
        super().__init__(reason)
        self.after = after
        self.final = final


class _NoAuth(requests.auth.AuthBase):
    """Keeps requests from adding credentials of ~/.netrc."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


@dataclass
class Client:
    """Requests with the project's manners. Proxies come from the environment (HTTPS_PROXY, NO_PROXY ...).

    Attributes:
        token: Sent to `token_origin` only, never along a redirect to another host.
        token_origin: (scheme, host, port).
        rewrites: (prefix, replacement) pairs applied to every link, for mirrors.
        idle: Seconds of silence after which a connection counts as cut.
        tries: Tries in a row that bring no new byte before giving up.
        longest_wait: A Retry-After beyond this many seconds is not waited for.
        stop: Set to end all transfers (Ctrl-C).
    """

    token: str | None = None
    token_origin: tuple | None = None
    rewrites: Sequence[tuple[str, str]] = ()
    idle: float = 60.0
    tries: int = 6
    longest_wait: float = 600.0
    backoff: float = 1.0
    stop: threading.Event = field(default_factory=threading.Event)
    _local: threading.local = field(default_factory=threading.local, repr=False)

    def open(self, url: str, headers: dict[str, str] | None = None, method: str = "GET") -> requests.Response:
        """Send a request and follow redirects; the body is not read yet.

        Raises:
            Retry: The network failed, or the server asks for another try.
            Gone: 404 or 410.
            Failed: Another refusal.
        """
        url = self.rewrite(url)
        for _ in range(10):
            response = self._send(url, headers or {}, method)
            if response.status_code not in REDIRECTS or "Location" not in response.headers:
                return self._checked(response, url)
            target = urljoin(url, response.headers["Location"])
            response.close()
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                raise Failed(f"{url} leads to {target}, which is not encrypted: not followed.")
            url = target
        raise Failed(f"{url}: more than 10 redirects.")

    def rewrite(self, url: str) -> str:
        """The link after the mirrors' rules."""
        for prefix, replacement in self.rewrites:
            if url.startswith(prefix):
                return replacement + url[len(prefix) :]
        return url

    def persist(self, action: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
        """Call `action` until it ends without Retry, waiting longer each time.

        Args:
            action: Raises Retry for what may pass.
            progress: A number that grows when something was gained: then the count of tries starts again.
        """
        failures, best = 0, progress()
        while True:
            try:
                return action()
            except Retry as reason:
                if progress() > best:
                    failures, best = 0, progress()
                failures += 1
                if failures >= self.tries:
                    raise reason.final or Failed(f"{reason} ({failures} tries)") from reason
                self._wait(reason, failures)

    def _wait(self, reason: Retry, failures: int) -> None:
        seconds = self.backoff * min(2 ** (failures - 1), 60) * random.uniform(0.75, 1.25)
        if reason.after is not None:
            seconds = reason.after
        if seconds > self.longest_wait:
            raise Failed(f"{reason}; the server asks to wait {seconds:.0f} s: try again then.")
        if self.stop.wait(seconds):
            raise Failed("stopped")

    def _send(self, url: str, headers: dict[str, str], method: str) -> requests.Response:
        headers = {"User-Agent": f"skipdit/{__version__}", "Accept-Encoding": "identity", **headers}
        if self.token and origin(url) == self.token_origin:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            return self._session().request(
                method,
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(min(15.0, self.idle), self.idle),
                auth=_NoAuth(),
            )
        except requests.exceptions.SSLError as error:
            raise Failed(
                f"{url}: the certificate cannot be verified ({_cause(error)}). If your network has an "
                "authority of its own, name its file in REQUESTS_CA_BUNDLE; verification stays on."
            ) from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise Failed(f"{url} is no link that can be followed ({error}).") from error
        except NETWORK_ERRORS as error:
            raise Retry(f"{url}: {_cause(error)}") from error

    def _checked(self, response: requests.Response, url: str) -> requests.Response:
        code = response.status_code
        if code in (200, 206, 416):
            return response
        after = _retry_after(response.headers.get("Retry-After"))
        response.close()
        if code in TRANSIENT:
            raise Retry(f"{url}: HTTP {code}", after)
        if code in (404, 410):
            raise Gone(f"{url}: HTTP {code}, there is no such file.")
        if code in (401, 403):
            raise Failed(
                f"{url}: HTTP {code}, access refused: accept the terms on its page if there are any, and set "
                "HF_TOKEN for files of the hub."
            )
        raise Failed(f"{url}: HTTP {code} {response.reason}.")

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session


def origin(url: str) -> tuple[str, str | None, int]:
    """(scheme, host, port) of a link."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while True:
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(inner, BaseException) or inner is error:
            return str(error).strip().split("\n")[0][:200] or type(error).__name__
        error = inner
