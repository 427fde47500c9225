"""A real HTTP server on 127.0.0.1 that can be told to misbehave, and an imitation of a hub's API on it."""

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

__all__ = ["Resource", "Server", "serving"]


@dataclass
class Resource:
    """What a path answers, and how badly.

    Attributes:
        body: The content, or the path of a big file.
        etag: Sent if set. last_modified: likewise.
        ranges: Whether Range is understood (206, 416, If-Range).
        cuts: One is taken for each request: bytes of the body before the connection is cut; None: no cut.
        reset: Cut with a TCP reset instead of an orderly close.
        answers: One is taken for each request before the body is given: (status, headers).
        trickle: (bytes, seconds): so many bytes at a time.
        length: A Content-Length that is not true.
        redirect: Answer with 302 to there.
        on_query: Bodies by the query's FilePath, as ModelScope serves them.
        on_request: Called with the resource before each answer; may change it.
    """

    body: bytes | Path = b""
    etag: str | None = '"one"'
    last_modified: str | None = None
    content_type: str = "application/octet-stream"
    ranges: bool = True
    cuts: list[int | None] = field(default_factory=list)
    reset: bool = False
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    trickle: tuple[int, float] | None = None
    length: int | None = None
    redirect: str | None = None
    on_query: dict[str, bytes] | None = None
    on_request: Callable[["Resource"], None] | None = None

    @property
    def size(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size


class Server(ThreadingHTTPServer):
    """The server; `resources` by path (without query), `requests` as (method, path, headers) in order."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.resources: dict[str, Resource] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news here."""

    def asked(self, path: str) -> list[dict[str, str]]:
        """Headers of the requests for a path."""
        return [headers for _, asked, headers in self.requests if asked.split("?")[0] == path]

    def add_hub_repo(
        self,
        repo: str,
        files: dict[str, bytes],
        commit: str = "a" * 40,
        kind: str = "models",
        lfs: bool = True,
    ) -> None:
        """A repository as a hub lists and serves it, at `main` and at its commit."""
        siblings = []
        prefix = "" if kind == "models" else f"{kind}/"
        for name, body in files.items():
            sha256 = hashlib.sha256(body).hexdigest()
            blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            row = {"rfilename": name, "size": len(body), "blobId": blob}
            if lfs:
                row["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": 134}
            siblings.append(row)
            self.resources[f"/{prefix}{repo}/resolve/{commit}/{name}"] = Resource(body, etag=f'"{sha256}"')
        info = json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})
        for revision in ("main", commit):
            self.resources[f"/api/{kind}/{repo}/revision/{revision}"] = Resource(
                info.encode(), content_type="application/json"
            )


@contextmanager
def serving() -> Iterator[Server]:
    """A running server; closed at the end."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_body: bool) -> None:
        with self.server.guard:
            self.server.requests.append((self.command, self.path, dict(self.headers)))
            resource = self.server.resources.get(self.path.split("?")[0])
            if resource is not None and resource.on_query:
                name = parse_qs(urlsplit(self.path).query).get("FilePath", [""])[0]
                resource = Resource(resource.on_query[name]) if name in resource.on_query else None
            if resource is not None and resource.on_request:
                resource.on_request(resource)
            early = resource.answers.pop(0) if resource is not None and resource.answers else None
            cut = resource.cuts.pop(0) if resource is not None and resource.cuts and not early else None
        if resource is None:
            self._plain(404, {})
        elif early:
            self._plain(*early)
        elif resource.redirect:
            self._plain(302, {"Location": resource.redirect})
        else:
            self._give(resource, cut, with_body)

    def _plain(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _give(self, resource: Resource, cut: int | None, with_body: bool) -> None:
        start, status = self._start(resource)
        size = resource.size
        if status == 416:
            self._plain(416, {"Content-Range": f"bytes */{size}"})
            return
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        for name, value in (("ETag", resource.etag), ("Last-Modified", resource.last_modified)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", resource.content_type)
        length = size - start if resource.length is None else resource.length
        self.send_header("Content-Length", str(length))
        if resource.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self._send(resource, start, size if cut is None else min(size, start + cut))
            if cut is not None or resource.length is not None:
                self._hang_up(resource.reset)

    def _start(self, resource: Resource) -> tuple[int, int]:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if not found or not resource.ranges:
            return 0, 200
        if condition and condition not in (resource.etag, resource.last_modified):
            return 0, 200
        start = int(found[1])
        return (start, 206) if start < resource.size else (start, 416)

    def _send(self, resource: Resource, start: int, end: int) -> None:
        if isinstance(resource.body, Path):
            with resource.body.open("rb") as file:
                self.wfile.flush()
                while start < end and (
                    sent := os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)
                ):
                    start += sent
            return
        step, pause = resource.trickle or (1 << 16, 0.0)
        for at in range(start, end, step):
            self.wfile.write(resource.body[at : min(at + step, end)])
            self.wfile.flush()
            if pause:
                time.sleep(pause)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
