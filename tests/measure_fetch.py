"""Speed against curl and peak memory for one large file over the loopback address; run by hand.

    python tests/measure_fetch.py --gib 2 --pairs 5 --folder /dev/shm

Each pair fetches the same file with curl and with `fetch` (sha256 included), each in a process of
its own.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from http_server import Resource, Server

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
FETCH = """
import resource, sys, time
from pathlib import Path
from skipdit.registry.digest import Expected
from skipdit.registry.http import Client
from skipdit.registry.transfer import fetch
begin = time.perf_counter()
fetch(Client(), sys.argv[1], Path(sys.argv[2]), Expected(size=int(sys.argv[3])))
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def serve(path: Path) -> None:
    """Serve one file until the parent goes away."""
    server = Server()
    server.resources["/big.pt"] = Resource(path)
    print(server.url, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    folder = Path(tempfile.mkdtemp(prefix="measure-fetch-", dir=args.folder))
    try:
        measure(folder, int(args.gib * 2**30), args.pairs)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, size: int, pairs: int) -> None:
    """Print a line a pair and the medians."""
    with (folder / "source").open("wb") as file:
        file.truncate(size)
    command = [sys.executable, __file__, "--serve", str(folder / "source")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    url = server.stdout.readline().strip() + "/big.pt"
    try:
        rows = [one_pair(url, folder, size) for _ in range(pairs)]
    finally:
        server.stdin.close()
        server.wait()
    curl, both, ours, memory = (statistics.median(column) for column in zip(*rows, strict=True))
    print("medians:", row_words(curl, both, ours, memory))
    print(f"fetch / curl {ours / curl:.2f}, fetch / (curl and sha256sum) {ours / both:.2f}")


def row_words(curl: float, both: float, ours: float, memory: float) -> str:
    """One measurement in words."""
    return f"curl {curl:.2f} s, with sha256sum {both:.2f} s, fetch {ours:.2f} s, its peak {memory:.0f} MiB"


def one_pair(url: str, folder: Path, size: int) -> tuple[float, float, float, float]:
    """(seconds of curl, of curl and sha256sum, of fetch, peak MiB of fetch)."""
    target = folder / "target.pt"
    begin = time.perf_counter()
    subprocess.run(["curl", "--silent", "--fail", "--output", str(target), url], check=True)
    curl = time.perf_counter() - begin
    subprocess.run(["sha256sum", str(target)], check=True, stdout=subprocess.DEVNULL)
    curl_and_hash = time.perf_counter() - begin
    assert target.stat().st_size == size
    target.unlink()
    command = [sys.executable, "-c", FETCH, url, str(target), str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    ours, memory = map(float, done.stdout.split())
    target.unlink()
    print(row_words(curl, curl_and_hash, ours, memory), flush=True)
    return curl, curl_and_hash, ours, memory


if __name__ == "__main__":
    main()
