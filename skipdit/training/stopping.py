"""A cluster's SIGTERM or the user's Ctrl-C asks a run to save and leave."""

import os
import signal
import time

__all__ = ["StopRequest"]

PATIENCE = 2.0  # seconds
"""Launchers pass on signals that the process group got as well, so one stop may arrive twice at once."""


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM or SIGINT (while entered), or by its launcher's end.

    `accelerate launch` of one process does not pass SIGTERM on: it ends, and the training would go on unseen.
    A second Ctrl-C, some seconds after the first, stops at once and unsaved.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by accelerate's launchers
        self._launcher = os.getppid() if launched else None

    @property
    def requested(self) -> bool:
        """Whether to stop after the current step."""
        return self._asked_at is not None or self._launcher not in (None, os.getppid())

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif number == signal.SIGINT and now - self._asked_at > PATIENCE:
            raise KeyboardInterrupt
