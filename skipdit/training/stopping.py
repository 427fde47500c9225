"""A cluster's SIGTERM or the user's Ctrl-C asks a run to save and leave."""

import signal

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, SIGTERM and SIGINT set `requested`; another one after that stops at once, unsaved."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
