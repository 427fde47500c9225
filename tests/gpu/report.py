"""Tables and one JSON file of what the sections left; figures that are missing are named."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

SHIPPED = "pipe.compile()"
# What an H200 should reach: section, start of the items' names, part of the item, largest seconds, words.
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
START = 60.0  # seconds of `pipe.compile()` and its first call


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


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


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


@dataclass(frozen=True)
class Target:
    """A row of the table of targets.

    Attributes:
        words, limit: As shown.
        shown: A value in words.
        reaches: Whether a value is good enough.
        best_of: Picks of ways, by the key that gives a way's value.
    """

    words: str
    limit: str
    shown: Callable[[float], str]
    reaches: Callable[[float], bool]
    best_of: Callable = min

    def cells(self, found: dict[str, float], lossy: Collection[str] = ()) -> list[str]:
        """What ships, the best way but for the lossy ones, and whether the former reaches the target."""
        shipped = next((value for name, value in found.items() if name.endswith(SHIPPED)), None)
        exact = [name for name in found if name not in lossy]
        best = self.best_of(exact, key=found.get) if exact else None
        return [
            self.words,
            self.limit,
            "not measured" if shipped is None else self.shown(shipped),
            "" if best is None else self.shown(found[best]),
            "not measured" if best is None else best,
            "" if shipped is None else judged(self.reaches(shipped)),
        ]


def at_most(limit: float, words: str, shown: Callable[[float], str]) -> Target:
    return Target(words, shown(limit), shown, lambda value: value <= limit)


def at_least(limit: float, words: str, unit: str) -> Target:
    return Target(words, f"{limit:.0f} {unit}", f"{{:.1f}} {unit}".format, lambda value: value >= limit, max)


def targets(items: dict[str, dict]) -> str:
    """Each target beside what ships and the best that was measured by a way that loses no quality."""
    found = {name: items.get(name, {}) for name in ("forward", "sampling", "training")}
    lossy = {name for section in found.values() for name in section if loses_quality(section, name)}
    rows = [
        at_most(limit, words, ms).cells(seconds_of(found[section], prefix, part), lossy)
        for section, prefix, part, limit, words in TARGETS
    ]
    rows += [predicted(found["sampling"], lossy), four_clips(found["forward"], lossy), errors(found["forward"], lossy)]
    rows += [*starts(found["sampling"]), trained(found["training"])]
    head = ["", "target", SHIPPED, "best exact way", "by", "reached"]
    told = f"Reached is judged by {SHIPPED}; of training, which it does not touch, by the best way."
    return f"## Targets\n\n{table(head, rows)}\n\n{told}"


def loses_quality(found: dict[str, dict], name: str) -> bool:
    """In float8, or a forward whose error is larger than eager bfloat16's."""
    return "float8" in name or (times_eager(found, name) or 0) > EXACT


def times_eager(found: dict[str, dict], name: str) -> float | None:
    """A forward's error as a multiple of eager bfloat16's at the same batch, None if either is not known."""
    own, eager = (found.get(key, {}).get("error") for key in (name, f"{name.split()[0]} eager"))
    return None if own is None or eager is None else own / eager


def seconds_of(found: dict[str, dict], prefix: str, part: str) -> dict[str, float]:
    """Way -> seconds, by graphs where these are less."""
    return {
        name: min(item[part][key] for key in ("seconds", "graph_seconds") if key in item[part])
        for name, item in found.items()
        if name.startswith(prefix) and part in item
    }


def predicted(found: dict[str, dict], lossy: Collection[str]) -> list[str]:
    """What a way gains by the cache, at the worse interval, of what the operations allow; the fastest way is best."""
    found = {name: item for name, item in found.items() if name.startswith("1 clip, ") and "2" in item}
    shares = {
        name: min(100 * part["speedup"] / part["bound"] for interval, part in item.items() if interval != "1")
        for name, item in found.items()
    }
    target = at_least(100 * PREDICTED, "speed-up by the cache, of the predicted", "%")
    fastest = lambda names, key: min(names, key=lambda name: found[name]["2"]["seconds"])  # noqa: E731
    return replace(target, best_of=fastest).cells(shares, lossy)


def four_clips(found: dict[str, dict], lossy: Collection[str]) -> list[str]:
    prefix, rate = FOUR_CLIPS
    seconds = seconds_of(found, prefix, "full")
    rates = {name: found[name]["full"]["operations"] / seconds[name] / 1e12 for name in seconds}
    return at_least(rate / 1e12, "full forward, four clips", "TFLOP/s").cells(rates, lossy)


def errors(found: dict[str, dict], lossy: Collection[str]) -> list[str]:
    """Of full forwards of one clip, as multiples of eager bfloat16's."""
    names = [name for name in found if name.startswith("B2 ") and not name.endswith(" eager")]
    times = {name: times_eager(found, name) for name in names}
    known = {name: value for name, value in times.items() if value is not None}
    return at_most(1.0, "error, of eager bfloat16's", "{:.3f}".format).cells(known, lossy)


def starts(found: dict[str, dict]) -> list[list[str]]:
    """The first start, and a second one, which finds the compiled code and should take less."""
    name, shown = f"1 clip, {SHIPPED}", "{:.1f} s".format
    first = {name: found[name]["1"]["set_up"]} if name in found else {}
    second = {name: found["second start"]["seconds"]} if "second start" in found else {}
    rows = [at_most(START, "first start", shown).cells(first)]
    rows.append(at_most(min([START, *first.values()]), "second start", shown).cells(second))
    return [[*row[:3], "", "", row[-1]] for row in rows]


def trained(found: dict[str, dict]) -> list[str]:
    rates = {name: item["clips_per_second"] for name, item in found.items()}
    cells = at_least(TRAINING, "training", "clips/s").cells(rates)
    return [*cells[:2], "", *cells[3:5], judged(max(rates.values()) >= TRAINING) if rates else ""]


def judged(reached: bool) -> str:
    return "yes" if reached else "NO"


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
        times = times_eager(found, name)
        cells = [name]
        for step in (full, reused):
            cells += [ms(step["seconds"]), ms(step.get("graph_seconds"))]
        cells.append(f"{full['operations'] / full['seconds'] / 1e12:.3g}")
        cells += [share_of(limit(items, step["operations"]), step["seconds"]) for step in (full, reused)]
        cells += [scientific(item["error"]), "" if times is None else f"{times:.3f}"]
        rows.append([*cells, f"{full['set_up']:.1f} + {reused['set_up']:.1f} s"])
    head = ["", "full", "graph", "reused", "graph", "TFLOP/s", "of the matrix rate", "reused, of it"]
    return table([*head, "error", "/ eager's", "first call"], rows)


def sampling(items: dict[str, dict]) -> str:
    rows, second = [], items["sampling"].get("second start")
    for name, intervals in items["sampling"].items():
        for interval, item in intervals.items() if name != "second start" else ():
            rows.append(
                [name, "no cache" if interval == "1" else f"N={interval}", f"{item['full']} + {item['reused']}",
                 f"{item['seconds']:.4g} s ({item['least']:.4g}..{item['most']:.4g})", f"{item['speedup']:.2f}x",
                 f"{item['bound']:.2f}x", f"{item['speedup'] / item['bound']:.0%}", scientific(item["difference"]),
                 f"{item['set_up']:.1f} s"]
            )  # fmt: skip
    head = ["", "cache", "full + reused", "seconds", "speed-up", "bound", "of the bound", "difference to eager"]
    told = (
        ""
        if second is None
        else f"\n\nSecond start of {SHIPPED}, to the end of its first call: {second['seconds']:.1f} s."
    )
    return table([*head, "first call"], rows) + told


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
        fields = [scientific(item["error"]), f"{item['set_up']:.1f} s"] if "error" in item else ["", ""]
        rows.append([name, ms(item["seconds"]), *fields])
    return table(["", "a clip", "error against float32", "first call"], rows)
