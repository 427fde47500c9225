"""Showing how downloads go: bars on a terminal, lines elsewhere."""

import sys
import threading
from collections.abc import Callable

from tqdm import tqdm

from .plan import Task
from .report import words

__all__ = ["Bars", "Lines"]


class Lines:
    """A line when a download begins and one when it ends; for logs."""

    def started(self, task: Task) -> Callable[[int, int | None], None]:
        size = task.bytes_to_fetch()
        self.said(f"fetching {task.remote.name}" + (f" ({words(size)})" if size is not None else ""))
        return lambda done, total: None

    def ended(self, task: Task) -> None:
        self.said(f"ended {task.remote.name}")

    def said(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bars:
    """One bar a file, and one of all below them."""

    def __init__(self, total: int) -> None:
        self._style = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "file": sys.stderr}
        self._all = tqdm(total=total or None, desc="all", **self._style)
        self._bars: dict[int, tqdm] = {}
        self._lock = threading.Lock()

    def started(self, task: Task) -> Callable[[int, int | None], None]:
        with self._lock:
            bar = tqdm(desc=task.remote.name[-28:], total=task.remote.expected.size, leave=False, **self._style)
            self._bars[id(task)] = bar

        def progress(done: int, total: int | None) -> None:
            with self._lock:
                step = done - bar.n
                bar.total = total or bar.total
                # The first step after a resumption is what was there before: no part of this call's work.
                if bar.n == 0 and step > 1 << 21:
                    bar.initial = step
                    bar.n = done
                    return
                bar.update(step)
                self._all.update(step)

        return progress

    def ended(self, task: Task) -> None:
        with self._lock:
            if bar := self._bars.pop(id(task), None):
                bar.close()

    def said(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._all.close()
