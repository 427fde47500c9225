"""Fetch and verify checkpoints, as `skipdit download` does: `python pretrained/download_ckpts.py --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from skipdit.cli import main  # noqa: E402

if __name__ == "__main__":
    words = sys.argv[1:]
    has_root = any(word == "--root" or word.startswith("--root=") for word in words)
    sys.exit(main(["download", *words, *([] if has_root else ["--root", str(ROOT)])]))
