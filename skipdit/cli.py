"""The `skipdit` command. Only the chosen command's module is imported, so `--help` answers at once."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .config import nearest
from .errors import UserError

__all__ = ["main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "sample": (
        "skipdit.sampling.command",
        "sample clips or pictures from a model, with or without Skip-Cache",
    ),
    "demo": ("skipdit.demo", "sample the carried digits pipeline at several speeds and compare"),
    "train": ("skipdit.training.command", "train a model from a config (the same as train.py)"),
    "encode": ("skipdit.training.encoding", "write the latents of a data set ahead, for faster training"),
    "train-vae": ("skipdit.training.autoencoder", "train the small autoencoder of the digits pipeline"),
    "bench": ("skipdit.evaluation.bench.command", "measure full and reused steps and the speed-up by interval"),
    "evaluate": ("skipdit.evaluation.evaluate", "FVD, FID and relatives of two sets of clips; fidelity of pairs"),
    "compare": (
        "skipdit.evaluation.compare.command",
        "quality and time of cache settings, rival caches and fewer steps",
    ),
    "evaluate-digits": ("skipdit.evaluation.digits_report", "let a classifier read generated digits, by cache setting"),
    "download": ("skipdit.registry.command", "fetch and verify published checkpoints"),
    "convert": ("skipdit.convert", "turn published weights into a diffusers folder and back"),
}
"""Command -> (module with `add_arguments(parser)` and `run(args) -> int | None`, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; None: those of the shell.

    Returns:
        The exit status: what the command returned (None: 0), 2 after a UserError, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words) or 0
    except UserError as error:
        print(f"skipdit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("skipdit: stopped by Ctrl-C.", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int | None:
    if not words or words[0].startswith("-"):
        parser = _overview()
        parser.parse_args(words)
        parser.print_help(sys.stderr)
        return 2
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"No command {name!r}: {nearest(name, list(COMMANDS))}")
    module_name, help_line = COMMANDS[name]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"skipdit {name}",
        description=help_line[0].upper() + help_line[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    # "Intermixed", so that key=value words may stand before and after the flags.
    return module.run(parser.parse_intermixed_args(rest))


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="skipdit",
        usage="skipdit [--help] [--version] COMMAND ...",
        description="Diffusion transformers with long skips, and Skip-Cache: faster sampling by reuse.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n'skipdit COMMAND --help' explains one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"skipdit {__version__}")
    return parser
