"""What the user reads: the plan, the list, the tree, sizes in words."""

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .plan import Plan
from .schema import HUB_CACHE, Entry, System
from .state import State, known_files

__all__ = ["list_lines", "plan_lines", "short_size", "tree_lines", "words"]


def words(size: int) -> str:
    """A size for people: "2.77 GB"."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def short_size(size: int, units: str = "iec") -> str:
    """A size as `tree -h` shows it, "2.4G" or "92M": one decimal below 10."""
    base, value, letters = (1000 if units == "si" else 1024), float(size), iter("KMGT")
    letter = ""
    while value >= base - 0.5:
        value /= base
        letter = next(letters)
    return f"{value:.1f}{letter}" if letter and value < 9.95 else f"{value:.0f}{letter}"


def plan_lines(plan: Plan, root: Path) -> list[str]:
    """The plan before anything is fetched: bytes, where from, licences, room."""
    lines = [f"{name}: there ({state.detail})" for name, state in plan.there.items()]
    if not plan.tasks:
        return lines
    size, unknown = plan.bytes_to_fetch()
    more = f" and {unknown} of unknown size" if unknown else ""
    lines.append(f"To fetch into {root}: {len(plan.tasks)} downloads, {words(size)}{more}")
    for task in plan.tasks:
        share = task.bytes_to_fetch()
        shown = words(share) if share is not None else "?"
        owners = ", ".join(entry.id for entry in task.entries)
        lines.append(f"  {shown:>8}  {owners}: {_origin(task.remote.locator)}")
    by_licence: dict[str, list[str]] = {}
    for entry in {entry.id: entry for task in plan.tasks for entry in task.entries}.values():
        by_licence.setdefault(entry.licence or "not stated: see the source", []).append(entry.id)
    lines.append("Licences:")
    lines += [f"  {licence}: {', '.join(ids)}" for licence, ids in by_licence.items()]
    for folder, need in plan.needs().items():
        lines.append(f"Room: {words(need)} needed in {folder}, {words(shutil.disk_usage(folder).free)} free")
    return lines


def _origin(locator: str) -> str:
    return locator.split("?")[0].removeprefix("https://")


def list_lines(rows: Iterable[tuple[Entry, State]]) -> list[str]:
    """A line an entry: state, size, id, path, what is wrong."""
    rows = list(rows)
    width = max((len(entry.id) for entry, _ in rows), default=0)
    lines = []
    for entry, state in rows:
        size = words(state.size) if state.size else (entry.size or "?")
        detail = f"  ({state.detail})" if state.detail else ""
        lines.append(f"{state.name:<8} {size:>8}  {entry.id:<{width}}  {entry.path}{detail}")
    counts = {name: sum(state.name == name for _, state in rows) for name in ("there", "missing", "damaged")}
    return [*lines, ", ".join(f"{number} {name}" for name, number in counts.items())]


def tree_lines(system: System, entries: list[Entry]) -> list[str]:
    """The folder tree of a guide, in the manner of `tree --du -h`."""
    root: dict = {}
    for entry in entries:
        path = "(hub cache)/" + entry.id.split("/", 1)[-1] if entry.path == HUB_CACHE else entry.path
        parts = PurePosixPath(path).parts
        folder = root
        for part in parts[:-1]:
            folder = folder.setdefault(part + "/", {})
        name = parts[-1] + ("/" if entry.is_folder else "")
        if not entry.is_folder:
            folder[name] = [entry]
            continue
        inside = folder.setdefault(name, {})
        inside.setdefault("", []).append(entry)
        for file in known_files(entry):
            *above, last = PurePosixPath(file).parts
            spot = inside
            for part in above:
                spot = spot.setdefault(part + "/", {})
            spot.setdefault(last, [])
    lines = [f"# {system.system}" + (f" ({system.guide})" if system.guide else "")]
    for name in sorted(root):
        lines.append(f"[{_total(root[name], system.units)}]  {name.rstrip('/')}")
        lines += _branches(root[name], system.units, "")
    totals = ", ".join(f"{name} {size}" for name, size in system.totals.items())
    return lines + ([f"# the guide says: {totals}"] if totals else [])


def _branches(folder: dict | list, units: str, indent: str) -> list[str]:
    if isinstance(folder, list):
        return []
    names = sorted(name for name in folder if name)
    lines = []
    for number, name in enumerate(names):
        last = number == len(names) - 1
        mark = "└── " if last else "├── "
        lines.append(f"{indent}{mark}[{_total(folder[name], units)}]  {name.rstrip('/')}")
        lines += _branches(folder[name], units, indent + ("    " if last else "│   "))
    return lines


def _total(node: dict | list, units: str) -> str:
    """Size of a file or folder in four columns; "?" where nothing is known, "+" where something is not."""
    leaves = list(_leaves(node))
    sizes = [entry.size_estimate for entry in leaves]
    known = [size for size in sizes if size is not None]
    if len(leaves) == 1 and leaves[0].size and isinstance(node, list):
        return f"{leaves[0].size:>4}"
    if not known:
        return "   ?"
    return f"{short_size(sum(known), units) + ('+' if len(known) < len(sizes) else ''):>4}"


def _leaves(node: dict | list) -> Iterable[Entry]:
    if isinstance(node, list):
        yield from node
        return
    for name, child in node.items():
        yield from child if name == "" else _leaves(child)
