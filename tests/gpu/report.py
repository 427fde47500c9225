"""Tables and one JSON file of what the sections left; figures that are missing are named."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

# What an H200 should reach: section, start of the items' names, part of the item, largest seconds, words. The best of
# the items counts.
TARGETS = (
    ("forward", "B2 ", "full", 13.5e-3, "full forward, one clip with guidance"),
    ("forward", "B2 ", "reused", 2.0e-3, "reused step, one clip with guidance"),
    ("sampling", "1 clip, ", "2", 0.43, "DDIM-50, N=2, without VAE"),
    ("sampling", "1 clip, ", "4", 0.30, "DDIM-50, N=4, without VAE"),
)
PREDICTED = 0.95  # of the speed-up that the operations allow
EXACT = 1.05  # times the error of eager bfloat16 that a way may have, for its time to count
FOUR_CLIPS = ("B8 ", 0.6 * 790e12)  # operations a second of a full forward
TRAINING = 40.0  # clips a second


def write(output: Path, parts: Path, preset: str, ended: dict[str, str]) -> None:
    """gpu.json and gpu.md from the sections' files in `parts`."""
    sections = {}
    for name in ended:
        path = parts / f"{name}.json"
        empty = {"items": {}, "errors": {}, "skipped": []}
        sections[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else empty
        sections[name]["ended"] = ended[name]
    report = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "preset": preset, "sections": sections}
    (output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text(to_markdown(report), encoding="utf-8")


def to_markdown(report: dict[str, Any]) -> str:
    sections = report["sections"]
    items = {name: section["items"] for name, section in sections.items()}
    writers = {
        "rates": rates,
        "correctness": correctness,
        "forward": forward,
        "sampling": sampling,
        "training": training,
        "pieces": pieces,
        "breakdown": breakdown,
        "decoding": decoding,
    }
    parts = [f"# Measurement of {report['date'][:10]}, preset {report['preset']}", about(items)]
    if report["preset"] == "xl":
        parts.append(targets(items))
    for name, section in sections.items():
        parts.append(f"## {name.capitalize()}")
        try:
            parts.append(writers[name](items))
        except Exception as problem:  # the JSON has it all
            parts.append(f"The table failed ({type(problem).__name__}: {problem}); see gpu.json.")
        parts.append(missing(section))
    return "\n\n".join(part for part in parts if part) + "\n"


def about(items: dict[str, dict]) -> str:
    found = items.get("rates", {}).get("hardware")
    if not found:
        return "What it ran on is not known, for the section of rates has not told."
    card = found.get("name", found["device"])
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "cuda", "triton", "diffusers", "python"))
    return f"{card}; {versions}; {found.get('nvidia_smi') or 'no nvidia-smi'}. Kernels: {found['kernels']}."


def missing(section: dict[str, Any]) -> str:
    lines = [] if section["ended"] == "ended" else [f"This section {section['ended']}."]
    if section["skipped"]:
        lines.append(f"No time was left for: {'; '.join(section['skipped'])}.")
    lines += [f"FAILED {name}: {problem['message'].splitlines()[0]}" for name, problem in section["errors"].items()]
    return "  \n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g} ms"


def share_of(limit: float | None, seconds: float) -> str:
    return "" if not limit else f"{limit / seconds:.0%}"


def hardware_rates(items: dict[str, dict]) -> tuple[float | None, float | None]:
    """Operations and bytes per second that this run measured."""
    found = items.get("rates", {})
    return tuple(found.get(name, {}).get("rate") for name in ("matrix torch.bfloat16", "memory"))


def limit(items: dict[str, dict], operations: float, moved: float = 0) -> float | None:
    """Seconds that the hardware's rates allow."""
    matrix, memory = hardware_rates(items)
    if not matrix or not memory:
        return None
    return max(operations / matrix, moved / memory)


# ---------------------------------------------------------------------- sections


def targets(items: dict[str, dict]) -> str:
    """Each target beside the best that was measured by a way that loses no quality."""
    exact = {name: keep_exact(items, name) for name in ("forward", "sampling")}
    rows = [fastest(exact[section], *rest) for section, *rest in TARGETS]
    rows.append(predicted(exact["sampling"]))
    prefix, least = FOUR_CLIPS
    found = [
        (item["full"]["operations"] / item["full"]["seconds"] / 1e12, name)
        for name, item in exact["forward"].items()
        if name.startswith(prefix)
    ]
    rows.append(largest(found, "full forward, four clips", least / 1e12, "TFLOP/s"))
    found = [(item["clips_per_second"], name) for name, item in items.get("training", {}).items()]
    rows.append(largest(found, "training", TRAINING, "clips/s"))
    return "## Targets\n\n" + table(["", "target", "best", "by", "reached"], rows)


def keep_exact(items: dict[str, dict], section: str) -> dict[str, dict]:
    """Without float8, and without forwards whose error is larger than eager bfloat16's."""
    found = {name: item for name, item in items.get(section, {}).items() if "float8" not in name}
    if section == "sampling":
        return found
    eager = {name.split()[0]: item["error"] for name, item in found.items() if name.endswith(" eager")}
    return {
        name: item for name, item in found.items() if item["error"] <= EXACT * eager.get(name.split()[0], float("inf"))
    }


def fastest(found: dict[str, dict], prefix: str, part: str, most: float, words: str) -> list[str]:
    times = [
        (seconds, name)
        for name, item in found.items()
        if name.startswith(prefix)
        for key in ("seconds", "graph_seconds")
        if (seconds := item[part].get(key))
    ]
    seconds, name = min(times, default=(None, "not measured"))
    return [words, ms(most), ms(seconds), name, judged(seconds and seconds <= most)]


def predicted(found: dict[str, dict]) -> list[str]:
    """Of the fastest way: what it gains by the cache, at the worse interval, of what the operations allow."""
    times = [(intervals["2"]["seconds"], name) for name, intervals in found.items() if "2" in intervals]
    shares = []
    for _, name in sorted(times)[:1]:
        cached = [item for interval, item in found[name].items() if interval != "1"]
        shares.append((min(100 * item["speedup"] / item["bound"] for item in cached), name))
    return largest(shares, "speed-up by the cache, of the predicted", 100 * PREDICTED, "%")


def largest(found: list[tuple[float, str]], words: str, least: float, unit: str) -> list[str]:
    value, name = max(found, default=(None, "not measured"))
    shown = "" if value is None else f"{value:.1f} {unit}"
    return [words, f"{least:.0f} {unit}", shown, name, judged(value and value >= least)]


def judged(reached: bool | None) -> str:
    return "" if reached is None else "yes" if reached else "NO"


def rates(items: dict[str, dict]) -> str:
    rows = []
    for name, found in items["rates"].items():
        if "rate" in found:
            unit = "TB/s" if name == "memory" else "TFLOP/s"
            rows.append([name, f"{found['rate'] / 1e12:.4g} {unit}"])
    return table(["", "rate"], rows)


def correctness(items: dict[str, dict]) -> str:
    rows = []
    for name, found in items["correctness"].items():
        if "ok" in found:
            keys = [f"{part} {way}" for part in ("forward", "backward") for way in ("kernel", "plain")]
            rows.append([name, *(f"{found[key]:.2e}" for key in keys), "yes" if found["ok"] else "NO"])
    head = ["error against float64", "kernel", "plain", "gradients, kernel", "gradients, plain", "no larger"]
    return table(head, rows) if rows else "No kernel runs here."


def forward(items: dict[str, dict]) -> str:
    found = items["forward"]
    rows = []
    for name, item in found.items():
        full, reused = item["full"], item["reused"]
        eager = found.get(f"{name.split()[0]} eager", {}).get("error")
        cells = [name]
        for step in (full, reused):
            cells += [ms(step["seconds"]), ms(step.get("graph_seconds"))]
        cells.append(f"{full['operations'] / full['seconds'] / 1e12:.3g}")
        cells += [share_of(limit(items, step["operations"]), step["seconds"]) for step in (full, reused)]
        cells += [f"{item['error']:.2e}", "" if eager is None else f"{item['error'] / eager:.2f}"]
        rows.append([*cells, f"{full['set_up']:.1f} + {reused['set_up']:.1f} s"])
    head = ["", "full", "graph", "reused", "graph", "TFLOP/s", "of the matrix rate", "reused, of it"]
    return table([*head, "error", "/ eager's", "first call"], rows)


def sampling(items: dict[str, dict]) -> str:
    rows = []
    for name, intervals in items["sampling"].items():
        for interval, item in intervals.items():
            rows.append(
                [name, "no cache" if interval == "1" else f"N={interval}", f"{item['full']} + {item['reused']}",
                 f"{item['seconds']:.4g} s ({item['least']:.4g}..{item['most']:.4g})", f"{item['speedup']:.2f}x",
                 f"{item['bound']:.2f}x", f"{item['speedup'] / item['bound']:.0%}", f"{item['difference']:.1e}"]
            )  # fmt: skip
    head = ["", "cache", "full + reused", "seconds", "speed-up", "bound", "of the bound", "difference to eager"]
    return table(head, rows)


def training(items: dict[str, dict]) -> str:
    rows = []
    for name, item in items["training"].items():
        rate = item["operations"] / item["seconds"] / 1e12
        rows.append(
            [name, ms(item["seconds"]), f"{item['clips_per_second']:.2f}", f"{rate:.3g}",
             share_of(limit(items, item["operations"]), item["seconds"]), f"{item['memory_gib']:.1f}",
             f"{item['loss']:.5f}", f"{item['grad_norm']:.4f}", f"{item['set_up']:.1f} s"]
        )  # fmt: skip
    head = ["", "step", "clips/s", "TFLOP/s", "of the matrix rate", "GiB", "loss", "gradient norm", "first step"]
    return table(head, rows)


def pieces(items: dict[str, dict]) -> str:
    rows = []
    for name, item in items["pieces"].items():
        seconds = item["seconds"]
        rates = f"{item['bytes'] / seconds / 1e9:.0f}", f"{item['operations'] / seconds / 1e12:.3g}"
        bound = limit(items, item["operations"], item["bytes"])
        rows.append([name, ms(seconds), *rates, share_of(bound, seconds), "" if item["graph"] else "host included"])
    return table(["", "a call", "GB/s", "TFLOP/s", "of the limit", ""], rows)


def breakdown(items: dict[str, dict]) -> str:
    rows, sums = [], {}
    for name, item in items["breakdown"].items():
        if name.endswith(", kernel"):
            continue
        batch = name.split()[0]
        plain = item["plain"]["seconds"]
        kernel = items["breakdown"].get(f"{name}, kernel", {}).get("kernel", {}).get("seconds")
        bound = limit(items, item["operations"], item["bytes"])
        best = min(plain, kernel or plain)
        rows.append(
            [name, item["full"], item["reused"], ms(plain), ms(kernel), f"{item['operations'] / 1e9:.4g}",
             f"{item['bytes'] / 1e6:.4g}", ms(bound), share_of(bound, best), ms(best * item["full"]),
             ms(best * item["reused"])]
        )  # fmt: skip
        # The first norm of a block, the joint pass and the gate are each counted; the norm alone is not run twice.
        total = sums.setdefault(batch, [0.0, 0.0, 0.0, 0.0])
        for index, value in enumerate((plain * item["full"], best * item["full"], best * item["reused"])):
            total[index] += value
        total[3] += (bound or 0) * item["full"]
    for batch, (plain, best, reused, bound) in sums.items():
        words = f"{batch} all: {ms(plain)} in a full forward by plain operations"
        rows.append([words, "", "", "", "", "", "", ms(bound), share_of(bound, best), ms(best), ms(reused)])
    head = ["", "in a full", "in a reused", "plain", "kernel", "GFLOP", "MB", "limit", "of the limit"]
    return table([*head, "a full forward", "a reused one"], rows)


def decoding(items: dict[str, dict]) -> str:
    rows = []
    for name, item in items["decoding"].items():
        fields = [f"{item['error']:.1e}", f"{item['set_up']:.1f} s"] if "error" in item else ["", ""]
        rows.append([name, ms(item["seconds"]), *fields])
    return table(["", "a clip", "error against float32", "first call"], rows)
