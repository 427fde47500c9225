"""`skipdit bench`: what steps cost and how much faster each interval is, against the operations counted."""

import argparse
import shlex
from typing import Any

__all__ = ["add_arguments", "run"]

# Option, type, default, help. A list: any number of values.
OPTIONS: tuple[tuple[str, type, Any, str], ...] = (
    (
        "--model",
        str,
        "pretrained/digits",
        "a preset such as Latte-XL/2-skip, or the folder of a saved model or pipeline",
    ),
    ("--batch-size", int, 1, "clips or pictures at once; guidance doubles what the network sees"),
    ("--num-frames", int, None, "frames of a clip (the model's own; 16 for a preset)"),
    ("--size", int, None, "side in pixels (the model's own; 256 for a preset)"),
    ("--intervals", int, [2, 3, 4, 5, 6], "intervals N of Skip-Cache"),
    ("--shallow", int, None, "units that run at each end of a reused step (the task's published setting)"),
    ("--forecast", int, 0, "order of the forecast of the reused tensor: 0 holds it, 1 a line, 2 a parabola"),
    ("--sampler", str, "ddim", "ddim, ddpm, dpm++ or unipc"),
    ("--steps", int, 50, "sampler steps"),
    ("--device", str, "auto", "auto, cpu, cuda or cuda:1"),
    ("--dtype", str, "fp32", "fp32, bf16 or fp16"),
    ("--repeats", int, 10, "timed pairs of a full and a reused step"),
    ("--rounds", int, 3, "timed samplings at each interval"),
    ("--threads", int, None, "CPU threads (torch's choice)"),
    ("--output", str, "outputs/bench", "folder for bench.md, bench.json and bench.png"),
)
FLAGS: tuple[tuple[str, str], ...] = (
    ("--compile", "measure torch.compile beside eager mode, in turns"),
    ("--against-plain", "measure pipe.compile() beside the plain path, in turns"),
    ("--breakdown", "also where the time of a step goes, part by part, and what the hardware would allow"),
    ("--no-guidance", "one pass a step; a class-conditional model is measured with guidance otherwise"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    for option, kind, default, words in OPTIONS:
        several = {"nargs": "+"} if isinstance(default, list) else {}
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        described = words if default is None else f"{words} ({shown})"
        parser.add_argument(option, type=kind, default=default, help=described, **several)
    for option, words in FLAGS:
        parser.add_argument(option, action="store_true", help=words)


def run(args: argparse.Namespace) -> int:
    """Check, measure, write the files and print the tables.

    Raises:
        UserError: An option does not fit, or the device runs out of memory.
    """
    from .breakdown import measure_breakdown
    from .measure import measure
    from .plan import make_plan
    from .report import make_report, to_markdown, write_report

    plan = make_plan(args)
    results = measure(plan, tell=lambda line: print(line, flush=True))
    breakdown = measure_breakdown(plan) if plan.breakdown else None
    report = make_report(plan, results, command_line(args), breakdown)
    write_report(report, plan.output)
    print(f"\n{to_markdown(report)}\nTables, figures and the plot are in {plan.output.resolve()}")
    return 0


def command_line(args: argparse.Namespace) -> str:
    """The command that gives these arguments, without the defaults and without the output folder."""
    words = ["skipdit", "bench"]
    for option, _, default, _ in OPTIONS:
        value = getattr(args, option[2:].replace("-", "_"))
        if value != default and option != "--output":
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    words += [option for option, _ in FLAGS if getattr(args, option[2:].replace("-", "_"))]
    return shlex.join(words)
