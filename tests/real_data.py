"""Where real samples of the public sets lie, for tests that skip without them."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("SKIPDIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SKIP_REASON = "needs the real samples: set SKIPDIT_SHARED to the folder that holds data/ and weights/"


def real(name: str) -> Path:
    """A folder of the samples; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(SKIP_REASON)
    return path
