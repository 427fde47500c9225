"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one sentence that says what was wrong and what to do. The command line prints it without a
    traceback and exits with status 2.
    """
