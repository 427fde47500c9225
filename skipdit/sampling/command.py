"""`skipdit sample`: what can be set, and the command. The work is done in `generation`."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import describe, load_config
from ..errors import UserError
from .config import SampleConfig

__all__ = ["SampleConfig", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = describe(SampleConfig)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file, such as configs/digits/sample.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")


def run(args: argparse.Namespace) -> int:
    """Sample, write the files, and say where they are and what it cost."""
    with _told_once():
        config = load_config(SampleConfig, args.config, args.settings)
        from .planning import plan_samples  # imports torch, which takes seconds

        plan = plan_samples(config)
    from .generate import carry_out

    report = carry_out(plan)
    if _is_first():
        print(report.summary())
    return 0


def _is_first() -> bool:
    """Whether this is the only process or the first of several."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _told_once() -> Iterator[None]:
    """Let the first process alone tell a mistake that all of them meet; the launcher ends the others then."""
    try:
        yield
    except UserError:
        if not _is_first():
            time.sleep(60)  # leaving at once could make the launcher end the first one before it has told
            raise SystemExit(2) from None
        raise
