"""Writing files so that a reader never sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

__all__ = ["check_writable", "written_whole"]


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is written there takes its place when the block ends well.

    The temporary name keeps the suffix, since writers of media choose the format by it. It may become a file
    or a folder; a folder replaces an older one of that name. If the block raises, `path` is as it was.

    Example:
        >>> with written_whole("table.csv") as temporary:
        ...     temporary.write_text("a,b")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = holder / path.name
        yield temporary
        _make_readable(temporary)
        if path.is_dir():
            _replace_folder(temporary, path, holder / "replaced")
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _replace_folder(new: Path, path: Path, aside: Path) -> None:
    path.rename(aside)
    try:
        os.replace(new, path)
    except OSError:
        aside.rename(path)
        raise


def _make_readable(path: Path) -> None:
    """Ordinary permissions: safetensors creates files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        item.chmod((0o777 if item.is_dir() else 0o666) & ~mask)


def check_writable(folder: str | Path) -> Path:
    """Create an output folder and see that it takes files, before any work is spent.

    Raises:
        UserError: It cannot be created or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}): choose another output folder.") from error
    return folder
