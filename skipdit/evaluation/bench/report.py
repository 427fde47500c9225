"""What `skipdit bench` found: as figures for programs, as tables for people and as a plot."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import written_whole
from ...operations import speedup_bound
from ..machine import hardware, software
from .measure import ModeResult, Timing
from .parts import breakdown_figures, breakdown_table, plain_figures, plain_table
from .plan import BenchPlan

if TYPE_CHECKING:
    from .breakdown import Breakdown

__all__ = ["AIM", "make_report", "to_markdown", "write_report"]

AIM = 1.3
"""A reused step should cost at most this many times its share of the operations."""


def make_report(
    plan: BenchPlan, results: dict[str, ModeResult], command: str, breakdown: "Breakdown | None" = None
) -> dict[str, Any]:
    """All figures, unrounded, in plain types.

    Args:
        plan: What was measured.
        results: Mode -> times.
        command: What reproduces it.
        breakdown: Of the plain path, if that was asked for.

    Returns:
        `command`, `date`, `hardware`, `software`, `setting`; `operations` (per step, by kind, and `share`);
        `sampling` (per interval: steps, operations, bound); `modes` (per mode: times of the steps,
        `time_share`, `cost_per_operation` = time_share / share, and per interval seconds and speed-up);
        `against_plain` and `breakdown` where these were measured.
    """
    steps = plan.schedules[1]
    sampling = []
    for interval, schedule in plan.schedules.items():
        full, reused = sum(schedule), len(schedule) - sum(schedule)
        sampling.append(
            {
                "interval": interval,
                "cache": "off" if interval == 1 else str(plan.caches[interval]),
                "full_steps": full,
                "reused_steps": reused,
                "operations": full * plan.full.total + reused * plan.reused.total,
                "bound": speedup_bound(schedule, plan.share),
            }
        )
    modes = {mode: _mode(result, plan.share) for mode, result in results.items()}
    more = {}
    if "fast" in results:
        more["against_plain"] = plain_figures(modes, results["fast"].difference)
    if breakdown is not None:
        more["breakdown"] = breakdown_figures(breakdown)
    return {
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": hardware(plan.device),
        "software": software(),
        "setting": {
            "model": plan.name,
            "config": dict(plan.settings),
            "weights": "random",
            "batch_size": plan.batch_size,
            "guided": plan.guided,
            "input_shape": list(plan.input_shape),
            "pixels": plan.pixels,
            "dtype": plan.dtype,
            "sampler": plan.sampler,
            "steps": len(steps),
            "shallow": plan.shallow,
        },
        "operations": {
            "full": plan.full.total,
            "reused": plan.reused.total,
            "share": plan.share,
            "full_by_kind": asdict(plan.full),
            "reused_by_kind": asdict(plan.reused),
        },
        "sampling": sampling,
        "modes": modes,
        **more,
    }


def _mode(result: ModeResult, share: float) -> dict[str, Any]:
    time_share = result.reused.median / result.full.median
    uncached = result.sampling[1].median
    return {
        "full": asdict(result.full),
        "reused": asdict(result.reused),
        "time_share": time_share,
        "cost_per_operation": time_share / share,
        **({"choices": result.choices} if result.choices else {}),
        "sampling": [
            {"interval": interval, "seconds": asdict(timing), "speedup": uncached / timing.median}
            for interval, timing in result.sampling.items()
        ],
    }


# ---------------------------------------------------------------------- tables


def to_markdown(report: dict[str, Any]) -> str:
    """Two tables under a line on what was measured, a sentence for each mode on the aim, and further tables."""
    parts = [_about(report), _steps_table(report), _verdict(report), _sampling_table(report), _notes(report)]
    if "against_plain" in report:
        parts.append(plain_table(report))
    if "breakdown" in report:
        parts.append(breakdown_table(report["breakdown"], report["modes"]["eager"]["full"]["median"]))
    return "\n\n".join(parts) + "\n"


def _about(report: dict[str, Any]) -> str:
    setting, hardware, software = report["setting"], report["hardware"], report["software"]
    shape = setting["input_shape"]
    frames = f"{shape[2]}x" if len(shape) == 5 else ""
    what = "clip" if frames else "picture"
    many = f"{setting['batch_size']} {what}{'s' if setting['batch_size'] > 1 else ''}"
    guidance = "with guidance" if setting["guided"] else "without guidance"
    cuda = f", CUDA {software['cuda']}" if software["cuda"] else ""
    pixels = f"{setting['pixels']}x{setting['pixels'] * shape[-1] // shape[-2]}"
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
    return (
        f"**{setting['model']}**, {many} of {frames}{pixels} {guidance} "
        f"(input {'x'.join(map(str, shape))}), {setting['dtype']}, random weights.  \n"
        f"{hardware['device']}, {hardware['cores']} cores, {threads}; torch {software['torch']}{cuda}, "
        f"diffusers {software['diffusers']}, Python {software['python']}, skipdit {software['skipdit']}; "
        f"{report['date'][:10]}.  \n`{report['command']}`"
    )


def _steps_table(report: dict[str, Any]) -> str:
    operations = report["operations"]
    rows = ["| | full step | reused step | reused / full |", "|---|--:|--:|--:|"]
    full, reused = (_count(operations[kind]) for kind in ("full", "reused"))
    rows.append(f"| operations | {full} | {reused} | {operations['share']:.3f} |")
    for mode, result in report["modes"].items():
        times = " | ".join(_span(result[kind], 1e3, " ms") for kind in ("full", "reused"))
        rows.append(f"| {mode} | {times} | {result['time_share']:.3f} |")
    return "\n".join(rows)


def _count(operations: int) -> str:
    unit, size = next((u, n) for u, n in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 0)) if operations >= n)
    return f"{operations / (size or 1e6):.4g} {unit}"


def _span(timing: dict[str, float] | Timing, factor: float, unit: str) -> str:
    median, least, most = (f"{timing[key] * factor:.3g}" for key in ("median", "least", "most"))
    return f"{median}{unit} ({least}..{most})"


def _verdict(report: dict[str, Any]) -> str:
    lines = []
    for mode, result in report["modes"].items():
        cost = result["cost_per_operation"]
        judgement = f"within the aim of {AIM}" if cost <= AIM else f"above the aim of {AIM}"
        lines.append(f"A reused step ({mode}) takes {cost:.2f} times its share of the operations: {judgement}.")
    load, cores = report["hardware"].get("load"), report["hardware"]["cores"]
    # This run itself is a load of at most the cores; more than them has had to share.
    if load is not None and load > cores + 0.5:
        busy = f"The machine was busy (load {load:.1f} on {cores} cores): all times and ratios are disturbed."
        lines.append(busy)
    return "  \n".join(lines)


def _sampling_table(report: dict[str, Any]) -> str:
    modes = report["modes"]
    sampler = f"{report['setting']['sampler'].upper()}-{report['setting']['steps']}"
    head = f"| {sampler} | full + reused steps | operations | bound |"
    rows = [
        head + "".join(f" {mode} | speed-up |" for mode in modes),
        "|---|--:|--:|--:|" + "--:|--:|" * len(modes),
    ]
    for number, row in enumerate(report["sampling"]):
        name = "no cache" if row["interval"] == 1 else row["cache"]
        steps = f"{row['full_steps']} + {row['reused_steps']}"
        cells = [name, steps, _count(row["operations"]), f"{row['bound']:.2f}x"]
        for result in modes.values():
            measured = result["sampling"][number]
            cells += [_span(measured["seconds"], 1, " s"), f"{measured['speedup']:.2f}x"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _notes(report: dict[str, Any]) -> str:
    first = next(iter(report["modes"].values()))
    pairs, rounds = first["full"]["repeats"], first["sampling"][0]["seconds"]["repeats"]
    return (
        f"Medians (least..most) of {pairs} forwards and {rounds} samplings in turns, without decoding.\n"
        "Bound: the speed-up if a reused step cost exactly its share of the operations."
    )


# ---------------------------------------------------------------------- files


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write bench.md, bench.json and bench.png."""
    with written_whole(folder / "bench.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with written_whole(folder / "bench.md") as temporary:
        temporary.write_text(to_markdown(report), encoding="utf-8")
    with written_whole(folder / "bench.png") as temporary:
        _plot(report, temporary)


def _plot(report: dict[str, Any], path: Path) -> None:
    """Measured speed-up by interval, least to most, against the bound."""
    from matplotlib.figure import Figure

    intervals = [row["interval"] for row in report["sampling"]]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    bounds = [row["bound"] for row in report["sampling"]]
    axes.plot(intervals, bounds, "--", color="0.4", label="bound by operations")
    for number, (mode, result) in enumerate(report["modes"].items()):
        speedups = [row["speedup"] for row in result["sampling"]]
        uncached = result["sampling"][0]["seconds"]["median"]
        spread = [
            [max(0, row["speedup"] - uncached / row["seconds"]["most"]) for row in result["sampling"]],
            [max(0, uncached / row["seconds"]["least"] - row["speedup"]) for row in result["sampling"]],
        ]
        axes.errorbar(intervals, speedups, spread, fmt="o-", capsize=3, color=f"C{number}", label=f"measured, {mode}")
    setting = report["setting"]
    axes.set_xticks(intervals, ["off" if interval == 1 else str(interval) for interval in intervals])
    axes.set_xlabel("interval N of Skip-Cache")
    axes.set_ylabel("speed-up of the whole sampling")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{setting['model']}, {setting['sampler'].upper()}-{setting['steps']}, "
        f"batch {setting['batch_size']}, {setting['dtype']}\n{report['hardware']['device']}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
