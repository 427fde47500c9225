"""`skipdit train` and `train.py`: what can be set, and the command. The work is done in `loop`."""

import argparse
import dataclasses
import json
from collections.abc import Iterator

from ..config import load_config, setting_name
from ..errors import UserError
from .config import TrainConfig
from .loop import train

__all__ = ["add_arguments", "run"]

DEFAULT_CONFIG = "configs/digits/train.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `skipdit train`."""
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.epilog = "settings and their defaults:\n" + "\n".join(_describe(TrainConfig()))


def _describe(section: object, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _describe(value, f"{prefix}{field.name}.")
        else:
            text = json.dumps(value) if isinstance(value, bool | None) else value  # as YAML has it
            yield f"  {prefix}{setting_name(field.name)}={text}"


def run(args: argparse.Namespace) -> None:
    """Train; of several processes only the main one reports a mistake."""
    try:
        train(load_config(TrainConfig, args.config, args.overrides))
    except UserError:
        from accelerate import PartialState

        if PartialState().is_main_process:
            raise
        raise SystemExit(2) from None
