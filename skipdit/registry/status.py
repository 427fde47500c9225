"""How a fetch can end: the exit statuses and the exceptions that carry them."""

from enum import IntEnum

__all__ = [
    "ByHand",
    "Failed",
    "FetchError",
    "Gone",
    "Mismatch",
    "MissingOffline",
    "NoSpace",
    "Status",
    "worst",
]


class Status(IntEnum):
    """Exit status of `skipdit download`; where several apply, the most serious one counts (see `worst`)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MISMATCH = 3
    NO_SPACE = 4
    MISSING = 5
    BY_HAND = 6


SERIOUS_FIRST = (Status.MISMATCH, Status.NO_SPACE, Status.FAILED, Status.MISSING, Status.BY_HAND, Status.OK)


def worst(statuses: list[Status]) -> Status:
    """The most serious of some statuses: mismatch, no space, failed, missing, by hand, ok."""
    return next((status for status in SERIOUS_FIRST if status in statuses), Status.OK)


class FetchError(Exception):
    """Something was not fetched; the message says what and what to do."""

    status = Status.FAILED


class Failed(FetchError):
    """The source could not be read."""


class Gone(Failed):
    """The source says that there is no such file: a mirror may have it."""


class Mismatch(FetchError):
    """What came is not what was announced."""

    status = Status.MISMATCH


class NoSpace(FetchError):
    """The disk is or would be full."""

    status = Status.NO_SPACE


class MissingOffline(FetchError):
    """Needed, not there, and not to be fetched now."""

    status = Status.MISSING


class ByHand(FetchError):
    """Left for a person: terms to accept, a tool to install."""

    status = Status.BY_HAND
