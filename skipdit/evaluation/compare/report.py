"""What `skipdit compare` found: rows for programs (CSV, JSON), a table, a plot and a strip of frames for people."""

import csv
import io
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ...files import written_whole
from ...media import make_sheet, viewing_factor, write_png
from ..machine import describe_machine
from ..metrics import expected_floor, frechet_distance, kernel_distance
from ..statistics import FeatureStatistics
from .config import CompareConfig
from .measure import Contender, Measured

__all__ = ["make_report", "to_csv", "to_markdown", "write_report"]

FRAMES_SHOWN, CLIPS_SHOWN = 8, 2
SAME_COST = 0.15
"""A rival whose time (or operations) differs by a larger share is not shown beside a cache."""
COLUMNS = {
    "name": "setting",
    "network": "network",
    "seconds": "s per clip",
    "speedup": "speed-up",
    "teraflops": "TFLOP per clip",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fvd": "FVD",
    "kvd": "KVD",
    "rival": "no cache, same cost",
    "rival_psnr": "its PSNR",
    "rival_fvd": "its FVD",
    "rival_kvd": "its KVD",
}
SAME = {"seconds": "time", "teraflops": "operations"}
DIGITS = {"seconds": 3, "speedup": 2, "teraflops": 4, "psnr": 2, "ssim": 4, "lpips": 4, "fvd": 1, "kvd": 2}


def make_report(
    config: CompareConfig,
    contenders: Sequence[Contender],
    found: Sequence[Measured],
    real: FeatureStatistics | None,
    notes: Sequence[str],
    pipelines: dict[str, Any],
) -> dict[str, Any]:
    """Plain values, but for "shown" in each row (uint8 clips)."""
    base = {c.network: m.seconds / m.clips for c, m in zip(contenders, found, strict=True) if c.family == "no cache"}
    rows = []
    for contender, measured in zip(contenders, found, strict=True):
        seconds = measured.seconds / measured.clips
        row = {
            "name": contender.name,
            "family": contender.family,
            "network": contender.network,
            "steps": contender.steps,
            "clips": measured.clips,
            "seconds": seconds,
            "speedup": base[contender.network] / seconds,
            "teraflops": measured.flops / 1e12,
            **{name: measured.mean(name) for name in ("psnr", "ssim", "lpips")},
            "shown": measured.shown,
        }
        if real is not None:
            row["fvd"] = frechet_distance(real.moments, measured.statistics.moments)
            row["kvd"], row["kvd_std"] = kernel_distance(real.features, measured.statistics.features)
        rows.append(row)
    cost = "teraflops" if config.equal_operations else "seconds"
    _add_rivals(rows, cost)
    notes = list(notes)
    if real is not None:
        floor = expected_floor(real.moments, config.clips)
        notes.append(
            f"FVD and KVD against {real.moments.count} real clips ({config.real.path}); with {config.clips} generated "
            f"clips even a perfect generator would get an FVD of {floor:.0f} or more, so compare rows, not levels; "
            "KVD has no such bias."
        )
    machine = describe_machine(pipelines["skip"].device)
    scale = config.guidance_scale if config.guidance_scale is not None else "the pipeline's"
    sampler = type(pipelines["skip"].scheduler).__name__
    about = (
        f"{config.clips} clips of each setting from one noise, {config.batch_size} at once, {config.steps} steps of "
        f"{sampler}, guidance {scale}, {config.dtype}; {machine}. Settings took turns batch by batch; decoding is not "
        "timed. Speed-up, PSNR and SSIM are against the same network without cache."
    )
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": date, "about": about, "notes": notes, "cost": cost, "rows": rows}


def _add_rivals(rows: list[dict[str, Any]], cost: str) -> None:
    """Beside each cache: its own network without one, with the steps whose cost is nearest to the cache's."""
    for row in rows:
        if row["family"] in ("no cache", "fewer steps"):
            continue
        plain = [r for r in rows if r["network"] == row["network"] and r["family"] in ("no cache", "fewer steps")]
        nearest = min(plain, key=lambda r: abs(r[cost] - row[cost]))
        if abs(nearest[cost] - row[cost]) > SAME_COST * row[cost]:
            continue
        unit = {"seconds": "s", "teraflops": "TFLOP"}[cost]
        row["rival"] = f"{nearest['steps']} steps, {nearest[cost]:.{DIGITS[cost]}f} {unit}"
        row |= {f"rival_{name}": nearest.get(name) for name in ("psnr", "ssim", "fvd", "kvd")}


def to_markdown(report: dict[str, Any]) -> str:
    """The table with what was measured below it."""
    rows = report["rows"]
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    words = ("name", "network", "rival")
    titles = COLUMNS | {"rival": f"no cache, same {SAME[report['cost']]}"}
    lines = ["| " + " | ".join(titles[key] for key in columns) + " |"]
    lines.append("|" + "|".join("---" if key in words else "--:" for key in columns) + "|")
    for row in rows:
        lines.append("| " + " | ".join(_cell(key, row.get(key)) for key in columns) + " |")
    notes = [report["about"], *(f"Note: {note}" for note in report["notes"])]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.{DIGITS[key.removeprefix('rival_')]}f}" + ("x" if key == "speedup" else "")


def to_csv(report: dict[str, Any]) -> str:
    """The rows, unrounded."""
    rows = [_plain(row) for row in report["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "shown"}


def _or_none(value: Any) -> Any:
    """JSON has no infinity, which is the PSNR of equal clips."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_report(report: dict[str, Any], folder: Path) -> list[str]:
    """compare.md, .csv, .json, .png and strip.png; returns their names."""
    rows = [{key: _or_none(value) for key, value in _plain(row).items()} for row in report["rows"]]
    plain = {**report, "rows": rows}
    texts = {
        "compare.md": to_markdown(report),
        "compare.csv": to_csv(report),
        "compare.json": json.dumps(plain, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with written_whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    _plot(report["rows"], report["cost"], folder / "compare.png")
    write_png(folder / "strip.png", _strip(report["rows"]))
    return [*texts, "compare.png", "strip.png"]


def _plot(rows: Sequence[dict[str, Any]], cost: str, path: Path) -> None:
    """Quality against the cost of a clip: a panel for PSNR and, with real clips, one for KVD."""
    from matplotlib.figure import Figure

    panels = {"psnr": "PSNR against no cache (dB), higher is better"}
    if any("kvd" in row for row in rows):
        panels["kvd"] = "KVD to real clips, lower is better"
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    series = dict.fromkeys((row["family"], row["network"]) for row in rows)
    styles = {"skip": "-", "vanilla": "--"}
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        for place, (family, network) in enumerate(series):
            points = [(r[cost], r[key]) for r in rows if (r["family"], r["network"]) == (family, network)]
            points = sorted(point for point in points if point[1] is not None and np.isfinite(point[1]))
            if not points:
                continue
            line = "" if family == "no cache" else styles[network]
            label = f"{family} ({network})" if family in ("no cache", "fewer steps") else family
            marker = {"no cache": "*", "fewer steps": "x", "Skip-Cache": "o"}.get(family, "s")
            axis.plot(*zip(*points, strict=True), line, marker=marker, label=label, color=f"C{place}")
        axis.set(xlabel=COLUMNS[cost], ylabel=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _strip(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Rows: settings; columns: frames; a block for each of the first clips."""
    shown = [(row, row["shown"].numpy()) for row in rows]
    length, height, width = shown[0][1].shape[1:4]
    frames = np.unique(np.linspace(0, length - 1, FRAMES_SHOWN).round().astype(int))
    blocks = [
        make_sheet(
            [(f"{row['name']}  {row['speedup']:.2f}x", clips[index, frames]) for row, clips in shown],
            title=f"clip {index}",
            columns=[f"frame {frame + 1}" for frame in frames],
            scale=viewing_factor(height, width, least=64),
        )
        for index in range(min(CLIPS_SHOWN, len(shown[0][1])))
    ]
    return np.concatenate(blocks)
