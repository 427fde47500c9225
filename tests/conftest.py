"""What all tests share: few threads, fixed seeds, no display, and where the shared data lies."""

import os
from pathlib import Path

# Before torch and matplotlib are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# One thread: at test sizes more of them only wait for each other, and sums keep one order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from the same random state, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of data that is shared but not part of the repository: SKIPDIT_SHARED, or `shared` beside it."""
    folder = Path(os.environ.get("SKIPDIT_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is not a folder (set SKIPDIT_SHARED)")
    return folder
