"""`python sample/sample.py [--config FILE] [key=value ...]`: the same as `skipdit sample`."""

import sys
from pathlib import Path

# From a checkout this works without installing the package, and through the links in class-to-video/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skipdit.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
