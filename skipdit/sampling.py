"""`skipdit sample`: what can be set, and the command. The work is done in `generation`."""

import argparse
from pathlib import Path

from .config import describe, load_config
from .sampling_config import SampleConfig

__all__ = ["SampleConfig", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = describe(SampleConfig)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file, such as configs/digits/sample.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")


def run(args: argparse.Namespace) -> int:
    """Sample, write the files, and say where they are and what it cost."""
    config = load_config(SampleConfig, args.config, args.settings)
    from .generation import generate  # imports torch, which takes seconds

    print(generate(config).summary())
    return 0
