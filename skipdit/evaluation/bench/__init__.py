"""What steps cost and how much faster each interval is: `skipdit bench`."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
