"""Ways of sampling on the same noise, rivals and fewer steps among them: `skipdit compare`."""

from .command import compare
from .config import CompareConfig

__all__ = ["CompareConfig", "compare"]
