"""The breakdown and the comparison with the plain path, as figures and as tables."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .breakdown import Breakdown

__all__ = ["breakdown_figures", "breakdown_table", "plain_figures", "plain_table"]


def breakdown_figures(breakdown: "Breakdown") -> dict[str, Any]:
    """Rates, and for each part: seconds, operations, bytes and limit of one time, and how often a step does it."""
    return {
        "matrix_rate": breakdown.matrix,
        "memory_rate": breakdown.memory,
        "parts": [
            {
                "name": part.name,
                "full": part.full,
                "reused": part.reused,
                "seconds": asdict(breakdown.took[part.name]),
                "operations": part.operations,
                "bytes": part.moved,
                "limit": breakdown.limit(part),
            }
            for part in breakdown.parts
        ],
    }


def breakdown_table(figures: dict[str, Any], full_step: float) -> str:
    """A row for each part, their sum, and the rates.

    Args:
        figures: From `breakdown_figures`.
        full_step: Seconds of a full forward measured as a whole.
    """
    head = ["", "in a full", "in a reused", "one", "GFLOP", "MB", "of the limit", "all of a full", "share"]
    rows, total, limits = [], 0.0, 0.0
    steps = [part for part in figures["parts"] if part["full"]]
    whole = sum(part["full"] * part["seconds"]["median"] for part in steps)
    for part in figures["parts"]:
        seconds, often = part["seconds"]["median"], part["full"]
        cells = [part["name"], often or "", part["reused"] or "", _ms(seconds), f"{part['operations'] / 1e9:.4g}"]
        cells += [f"{part['bytes'] / 1e6:.4g}", f"{part['limit'] / seconds:.0%}"]
        rows.append([*cells, *([_ms(often * seconds), f"{often * seconds / whole:.1%}"] if often else ["", ""])])
        if often and part["name"] != "sampler":
            total += often * seconds
            limits += often * part["limit"]
    rows.append(["forward, sum of parts", "", "", "", "", "", f"{limits / total:.0%}", _ms(total), ""])
    rows.append(["forward, measured whole", "", "", "", "", "", f"{limits / full_step:.0%}", _ms(full_step), ""])
    rates = f"{_rate(figures['matrix_rate'], 'FLOP/s')} of a large product and {_rate(figures['memory_rate'], 'B/s')}"
    return (
        f"Where the time of the plain path goes:\n\n{_table(head, rows)}\n\n"
        f"The limit is what {rates} of a large copy allow, both measured in this run. The VAE decodes once, at the end."
    )


def plain_figures(modes: dict[str, Any], differences: dict[int, float]) -> dict[str, Any]:
    """How many times as fast as the plain path `pipe.compile()` is, and how far its latents are from it.

    Args:
        modes: "eager" and "fast", as the report has them.
        differences: Interval -> relative error of the latents.
    """
    plain, fast = modes["eager"], modes["fast"]
    pairs = zip(plain["sampling"], fast["sampling"], strict=True)
    return {
        **{kind: plain[kind]["median"] / fast[kind]["median"] for kind in ("full", "reused")},
        "sampling": [
            {
                "interval": one["interval"],
                "times": one["seconds"]["median"] / other["seconds"]["median"],
                "difference": differences[one["interval"]],
            }
            for one, other in pairs
        ],
    }


def plain_table(report: dict[str, Any]) -> str:
    """The two paths beside each other."""
    figures, plain, fast = report["against_plain"], report["modes"]["eager"], report["modes"]["fast"]
    head, rows = ["", "plain", "pipe.compile()", "times as fast", "difference of the latents"], []
    for kind in ("full", "reused"):
        seconds = [_ms(mode[kind]["median"]) for mode in (plain, fast)]
        rows.append([f"{kind} step", *seconds, f"{figures[kind]:.2f}", ""])
    for number, row in enumerate(figures["sampling"]):
        seconds = [f"{mode['sampling'][number]['seconds']['median']:.3g} s" for mode in (plain, fast)]
        name = "no cache" if row["interval"] == 1 else report["sampling"][number]["cache"]
        rows.append([f"sampling, {name}", *seconds, f"{row['times']:.2f}", f"{row['difference']:.1e}"])
    return f"{_table(head, rows)}\n\n```\n{fast['choices']}\n```"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _rate(rate: float, unit: str) -> str:
    prefix, size = next((p, n) for p, n in (("T", 1e12), ("G", 1e9), ("M", 0)) if rate >= n)
    return f"{rate / (size or 1e6):.3g} {prefix}{unit}"
