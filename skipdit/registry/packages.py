"""Fetching through other programs: pip for package files, gdown for Google Drive."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .digest import Expected, hash_file, page_or_pointer
from .schema import PypiSource
from .status import ByHand, Failed, Mismatch
from .transfer import Fetched, part_path

__all__ = ["fetch_drive", "with_package"]


def with_package(source: PypiSource, beside: Path, use: Callable[[Path], None]) -> None:
    """Download a package file with pip, its hash checked by pip before anything looks inside, and use it.

    pip runs the build script of a source package to learn its metadata; the pinned hash says which script.

    Args:
        source: Package, version and sha256 of the package file.
        beside: Folder for the temporary folder.
        use: Called with the package file.

    Raises:
        Mismatch: pip found another hash.
        Failed: pip failed.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=beside) as name:
        folder = Path(name)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
        command += [
            "--disable-pip-version-check",
            "--no-input",
            "--dest",
            str(folder),
            "--requirement",
            str(wanted),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        text = (done.stderr + done.stdout).strip()
        if "DO NOT MATCH THE HASHES" in text:
            raise Mismatch(f"{source.package} {source.version}: the package file has another sha256 than pinned.")
        if done.returncode:
            last = next((line for line in reversed(text.splitlines()) if "rror" in line), text[-200:])
            raise Failed(f"pip could not download {source.package}=={source.version}: {last.strip()}")
        files = [item for item in folder.iterdir() if item != wanted]
        if len(files) != 1:
            raise Failed(f"pip downloaded {len(files)} files for {source.package}=={source.version}, not one.")
        use(files[0])


def fetch_drive(file_id: str, target: Path, expected: Expected) -> Fetched:
    """Fetch a file of Google Drive through gdown, verified and renamed as every other file is."""
    try:
        import gdown
    except ImportError as error:
        raise ByHand(f"{target}: it is on Google Drive: pip install gdown, then run again.") from error
    link = f"https://drive.google.com/file/d/{file_id}/view"
    part = part_path(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        got = gdown.download(id=file_id, output=str(part), quiet=True, resume=part.exists())
    except Exception as error:
        raise Failed(f"{link}: {str(error).strip()[:300]}") from error
    if got is None or not part.is_file():
        raise Failed(f"{link}: gdown gave no file (quota or permission): open the link in a browser.")
    with part.open("rb") as file:
        if what := page_or_pointer(file.read(512), target.name):
            part.unlink()
            raise Failed(f"{link} gave {what} instead of the file (quota or permission).")
    digests, size = hash_file(part, expected), part.stat().st_size
    if wrong := expected.differences(size, digests):
        bad = target.with_name(target.name + ".bad")
        part.replace(bad)
        raise Mismatch(f"{link}: {', '.join(wrong)}. Kept aside as {bad}.")
    part.replace(target)
    return Fetched(size, digests)
