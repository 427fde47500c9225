"""`accelerate launch train.py [--config FILE] [key=value ...]`: the same as `skipdit train`."""

import sys

from skipdit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
