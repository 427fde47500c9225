"""One lock per target, so that two calls do not fetch one file twice or into each other."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked"]


@contextmanager
def locked(target: Path, stopped: Callable[[], bool], waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of `target` (a hidden file beside it; the kernel drops it when a process dies).

    Args:
        target: What will be written.
        stopped: Asked while waiting; True ends the wait with KeyboardInterrupt.
        waiting: Called once if somebody else holds the lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    told = False
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        if _try_lock(descriptor) and _is_same(descriptor, path):
            break
        os.close(descriptor)
        if not told:
            waiting()
            told = True
        if stopped():
            raise KeyboardInterrupt
        time.sleep(0.1)
    try:
        yield
    finally:
        # Removed while still held: who waits sees another inode behind the name and starts again.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
