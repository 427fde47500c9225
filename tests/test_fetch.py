"""One file over HTTP, from a server that misbehaves in every way that was thought of."""

import email.utils
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from http_server import Resource, Server, serving

from skipdit.registry.digest import Expected
from skipdit.registry.http import Client, origin
from skipdit.registry.lock import locked
from skipdit.registry.status import Failed, Gone, Mismatch, NoSpace
from skipdit.registry.transfer import fetch, part_path

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
UNKNOWN = Expected()
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client():
    return Client(idle=5.0, backoff=0.001, tries=4)


def get(server: Server, client: Client, folder: Path, resource: Resource, expected: Expected = UNKNOWN):
    server.resources["/w.pt"] = resource
    return fetch(client, f"{server.url}/w.pt", folder / "w.pt", expected)


def whole(folder: Path, body: bytes = BODY) -> bool:
    """The file is whole, and nothing else is left in the folder."""
    return sorted(item.name for item in folder.iterdir()) == ["w.pt"] and (folder / "w.pt").read_bytes() == body


def test_plain_download_gives_size_digests_and_etag(server, client, tmp_path):
    got = get(server, client, tmp_path, Resource(BODY), Expected(len(BODY), SHA256, MD5))
    assert (got.size, got.digests, got.etag) == (len(BODY), {"sha256": SHA256, "md5": MD5}, '"one"')
    assert whole(tmp_path)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_every_file_is_whole_after_cuts_at_random_bytes(server, client, tmp_path, reset):
    numbers = random.Random(1 + reset)
    resumed = 0
    for trial in range(100):
        body = numbers.randbytes(numbers.randint(1, 200_000))
        cuts = [numbers.randint(0, len(body)) for _ in range(numbers.randint(1, 3))]
        server.resources["/w.pt"] = Resource(body, etag=f'"{trial}"', cuts=cuts, reset=reset)
        server.requests.clear()
        got = fetch(client, f"{server.url}/w.pt", tmp_path / "w.pt", Expected())
        assert whole(tmp_path, body), f"trial {trial}, cuts {cuts}"
        assert got.digests["sha256"] == hashlib.sha256(body).hexdigest()
        resumed += any("Range" in headers for headers in server.asked("/w.pt"))
    assert resumed > 50


def test_a_server_without_ranges_starts_the_file_anew(server, client, tmp_path):
    get(server, client, tmp_path, Resource(BODY, ranges=False, cuts=[1000, 250_000]))
    assert whole(tmp_path)


def test_resumption_asks_for_the_rest_with_the_validator(server, client, tmp_path):
    get(server, client, tmp_path, Resource(BODY, etag='"v7"', cuts=[131_072]))
    second = server.asked("/w.pt")[1]
    assert second["If-Range"] == '"v7"'
    assert 0 < int(second["Range"].removeprefix("bytes=").removesuffix("-")) <= 131_072


def test_a_weak_etag_is_no_validator_but_the_date_is(server, client, tmp_path):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    get(server, client, tmp_path, Resource(BODY, etag='W/"v7"', last_modified=date, cuts=[100_000]))
    assert server.asked("/w.pt")[1]["If-Range"] == date
    assert whole(tmp_path)


def test_a_file_changed_between_tries_is_fetched_anew(server, client, tmp_path):
    other = bytes(reversed(BODY))

    def change(resource: Resource) -> None:
        if not resource.cuts:
            resource.body, resource.etag = other, '"two"'

    got = get(server, client, tmp_path, Resource(BODY, cuts=[200_000], on_request=change))
    assert "Range" in server.asked("/w.pt")[1]
    assert got.digests["sha256"] == hashlib.sha256(other).hexdigest()
    assert whole(tmp_path, other)


def test_a_part_of_another_version_without_validator_does_not_mix_in(server, client, tmp_path):
    """The hash is known, the server gives no validator: the mixed file is noticed and fetched anew."""
    part_path(tmp_path / "w.pt").write_bytes(b"old" * 1000)
    note = {"url": f"{server.url}/w.pt", "etag": None, "last_modified": None, "total": None, "pinned": SHA256}
    part_path(tmp_path / "w.pt").with_name(".w.pt.part.json").write_text(json.dumps(note))
    get(server, client, tmp_path, Resource(BODY, etag=None), Expected(sha256=SHA256))
    assert server.asked("/w.pt")[0]["Range"] == "bytes=3000-"
    assert whole(tmp_path)


def test_a_trickle_is_followed_to_its_end(server, client, tmp_path):
    body = BODY[:2000]
    get(server, client, tmp_path, Resource(body, trickle=(50, 0.005)))
    assert len(server.requests) == 1
    assert whole(tmp_path, body)


def test_silence_counts_as_a_cut(server, tmp_path):
    resource = Resource(BODY[:4000], trickle=(2000, 1.0))
    resource.on_request = lambda item: setattr(item, "trickle", item.trickle if len(server.requests) == 1 else None)
    get(server, Client(idle=0.3, backoff=0.001), tmp_path, resource)
    assert [headers.get("Range") for headers in server.asked("/w.pt")] == [None, "bytes=2000-"]
    assert whole(tmp_path, BODY[:4000])


@pytest.mark.parametrize(
    "resource, what",
    [
        (Resource(b"<!DOCTYPE html><p>Sign in", content_type="text/html; charset=utf-8"), "a web page"),
        (Resource(b"\n <HTML><body>quota", content_type="application/octet-stream"), "a web page"),
        (
            Resource(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
            "a git-lfs pointer",
        ),
    ],
    ids=["announced page", "hidden page", "pointer"],
)
def test_what_only_looks_like_a_file_is_recognised(server, client, tmp_path, resource, what):
    with pytest.raises(Failed, match=what):
        get(server, client, tmp_path, resource)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_honoured(server, client, tmp_path, status):
    begin = time.monotonic()
    get(server, client, tmp_path, Resource(BODY, answers=[(status, {"Retry-After": "1"})]))
    assert 1.0 <= time.monotonic() - begin < 3.0
    assert whole(tmp_path)


def test_retry_after_as_a_date_is_honoured(server, client, tmp_path):
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    begin = time.monotonic()
    get(server, client, tmp_path, Resource(BODY, answers=[(503, {"Retry-After": date})]))
    assert 0.9 <= time.monotonic() - begin < 4.0


def test_a_wait_that_is_too_long_is_told_instead(server, client, tmp_path):
    with pytest.raises(Failed, match="asks to wait 86400 s"):
        get(server, client, tmp_path, Resource(BODY, answers=[(429, {"Retry-After": "86400"})]))


def test_tries_end(server, client, tmp_path):
    with pytest.raises(Failed, match=r"HTTP 500 \(4 tries\)"):
        get(server, client, tmp_path, Resource(BODY, answers=[(500, {})] * 9))
    assert len(server.requests) == 4


def test_what_is_not_there_is_asked_for_once(server, client, tmp_path):
    with pytest.raises(Gone, match="HTTP 404"):
        fetch(client, f"{server.url}/none.pt", tmp_path / "w.pt", Expected())
    assert len(server.requests) == 1


def test_a_token_stays_with_its_host(server, tmp_path):
    with serving() as elsewhere:
        elsewhere.resources["/cdn"] = Resource(BODY)
        client = Client(token="secret", token_origin=origin(server.url), backoff=0.001)
        get(server, client, tmp_path, Resource(redirect=f"{elsewhere.url}/cdn"))
        assert server.asked("/w.pt")[0]["Authorization"] == "Bearer secret"
        assert "Authorization" not in elsewhere.asked("/cdn")[0]
    assert whole(tmp_path)


def test_credentials_of_netrc_are_not_sent(server, client, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "here").mkdir()
    get(server, client, tmp_path / "here", Resource(BODY))
    assert "Authorization" not in server.asked("/w.pt")[0]


def test_a_proxy_of_the_environment_is_used(server, client, tmp_path, monkeypatch):
    """The server stands in for a proxy: it is asked with the whole link of a host that does not exist."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.resources["http://weights.invalid/w.pt"] = Resource(BODY)
    fetch(client, "http://weights.invalid/w.pt", tmp_path / "w.pt", Expected(sha256=SHA256))
    assert whole(tmp_path)


def test_a_content_length_too_great_is_seen_through(server, client, tmp_path):
    """The rest is asked for, the server says that there is none: all is here."""
    resource = Resource(BODY, length=len(BODY) + 5000)
    got = get(server, client, tmp_path, resource)
    assert got.digests["sha256"] == SHA256
    assert whole(tmp_path)


def test_a_content_length_too_small_is_a_mismatch(server, client, tmp_path):
    with pytest.raises(Mismatch, match="offers 1000 bytes, 300000 were expected"):
        get(server, client, tmp_path, Resource(BODY, length=1000), Expected(len(BODY), SHA256))
    with pytest.raises(Mismatch, match="sha256"):
        get(server, client, tmp_path, Resource(BODY, length=1000), Expected(sha256=SHA256))
    assert [item.name for item in tmp_path.iterdir()] == ["w.pt.bad"]


def test_a_wrong_hash_is_kept_aside_and_named(server, client, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"what was there before")
    with pytest.raises(Mismatch) as caught:
        get(server, client, tmp_path, Resource(BODY), Expected(len(BODY), md5="0" * 32))
    assert f"md5 {MD5} instead of {'0' * 32}" in str(caught.value)
    assert str(tmp_path / "w.pt.bad") in str(caught.value)
    assert (tmp_path / "w.pt.bad").read_bytes() == BODY
    assert (tmp_path / "w.pt").read_bytes() == b"what was there before"


def test_a_part_is_gone_on_with_by_the_next_call(server, client, tmp_path):
    with pytest.raises(Failed):
        get(server, client, tmp_path, Resource(BODY, cuts=[100_000, 0, 0, 0, 0, 0]))
    assert part_path(tmp_path / "w.pt").stat().st_size == 100_000
    assert not (tmp_path / "w.pt").exists()
    server.requests.clear()
    get(server, client, tmp_path, Resource(BODY))
    assert server.asked("/w.pt")[0]["Range"] == "bytes=100000-"
    assert whole(tmp_path)


CHILD = """
import sys
from pathlib import Path
from skipdit.registry.digest import Expected
from skipdit.registry.http import Client
from skipdit.registry.lock import locked
from skipdit.registry.transfer import fetch
target = Path(sys.argv[2])
with locked(target, lambda: False, lambda: print("waiting", flush=True)):
    if not target.exists():
        fetch(Client(backoff=0.01), sys.argv[1], target, Expected(sha256=sys.argv[3]))
        print("fetched", flush=True)
"""


def child(server: Server, target: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, f"{server.url}/w.pt", str(target), SHA256]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_kill_in_the_middle_and_run_again(server, tmp_path):
    server.resources["/w.pt"] = Resource(BODY, trickle=(20_000, 0.1))
    part = part_path(tmp_path / "w.pt")
    process = child(server, tmp_path / "w.pt")
    wait_for(lambda: part.exists() and part.stat().st_size >= 40_000)
    process.kill()
    process.communicate()
    assert not (tmp_path / "w.pt").exists()
    server.resources["/w.pt"].trickle = None
    server.requests.clear()
    again = child(server, tmp_path / "w.pt")
    assert again.communicate()[0] == "fetched\n"
    assert int(server.asked("/w.pt")[0]["Range"][6:-1]) >= 40_000
    assert whole(tmp_path)


def test_two_calls_for_one_file_fetch_it_once(server, tmp_path):
    server.resources["/w.pt"] = Resource(BODY, trickle=(20_000, 0.05))
    first = child(server, tmp_path / "w.pt")
    wait_for(lambda: server.asked("/w.pt"))
    second = child(server, tmp_path / "w.pt")
    assert first.communicate()[0] == "fetched\n"
    assert second.communicate()[0] == "waiting\n"
    assert len(server.asked("/w.pt")) == 1
    assert whole(tmp_path)


def test_the_lock_lets_one_in_at_a_time(tmp_path):
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with locked(tmp_path / "w.pt", lambda: False):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_the_part_is_kept(server, tmp_path):
    """On a file system of 1 MB of its own (a user namespace's tmpfs)."""
    server.resources["/w.pt"] = Resource(BODY * 10)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from skipdit.registry.digest import Expected\nfrom skipdit.registry.http import Client\n"
        "from skipdit.registry.status import NoSpace\nfrom skipdit.registry.transfer import fetch\n"
        "folder = Path(sys.argv[2])\n"
        "try: fetch(Client(), sys.argv[1], folder / 'w.pt', Expected())\n"
        "except NoSpace as error: print(error, [item.name for item in sorted(folder.iterdir())])"
    )
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}" || exit 77; exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    command += [sys.executable, "-c", code, f"{server.url}/w.pt", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no tmpfs may be mounted here")
    assert "the disk is full" in done.stdout, done.stderr
    assert "['.w.pt.part', '.w.pt.part.json']" in done.stdout
    assert NoSpace.status == 4


def test_a_mirror_takes_the_place_of_a_prefix(server, tmp_path):
    client = Client(rewrites=[("https://weights.invalid/a/", f"{server.url}/b/")])
    server.resources["/b/w.pt"] = Resource(BODY)
    fetch(client, "https://weights.invalid/a/w.pt", tmp_path / "w.pt", Expected(sha256=SHA256))
    assert whole(tmp_path)
