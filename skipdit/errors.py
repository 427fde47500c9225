"""The one exception that means "the user can mend this"."""

from pathlib import Path


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one sentence that says what was wrong and what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class UnreadableError(ValueError):
    """A file of a data set that cannot be read: corrupt, truncated, empty, too short.

    Args:
        path: The file or folder.
        reason: What is wrong with it, without a full stop.
    """

    def __init__(self, path: Path | str, reason: str):
        super().__init__(path, reason)  # so that it can be pickled by a worker
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path} cannot be read ({self.reason})"
