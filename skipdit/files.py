"""Writing files so that a reader never sees half of one."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from .errors import UserError

__all__ = ["LONGEST_WAIT", "check_writable", "only_call", "remove_unfinished", "written_whole"]

UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")
"""What `written_whole` calls the folder that it writes in."""


LONGEST_WAIT = timedelta(days=7)
"""How long one of several processes may wait for the others, whose shares of work can take longer."""


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


@contextmanager
def only_call(command: str, folder: Path) -> Iterator[None]:
    """Keep other calls out of a folder; the kernel drops the lock when this process dies.

    Raises:
        UserError: Another call holds it.
    """
    file, owner = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666), os.getpid()
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another skipdit {command} is writing to {folder}: let it finish, or choose another output."
            ) from error
        except OSError:
            pass  # a file system without locks
        _locks.add(file)
        yield
    finally:
        if os.getpid() == owner:
            _locks.discard(file)
            os.close(file)


_locks: set[int] = set()


def _let_go() -> None:
    """In a forked child, such as a data worker: it may outlive this process, whose lock it would go on holding."""
    for file in _locks:
        os.close(file)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed calls of `written_whole` left in a folder and below; nobody may be writing there."""
    for parent, inner, _ in os.walk(folder):
        for name in [name for name in inner if UNFINISHED.fullmatch(name)]:
            shutil.rmtree(Path(parent) / name, ignore_errors=True)
            inner.remove(name)
