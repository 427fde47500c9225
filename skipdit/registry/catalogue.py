"""Reading registry files and choosing entries: by id, pattern, system and set."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..config import nearest
from ..errors import UserError
from .parse import parse_system
from .schema import Entry, System

__all__ = ["DEFAULT_SYSTEM", "Catalogue", "load_catalogue", "shipped_files"]

DEFAULT_SYSTEM = "Skip-DiT"
CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Catalogue:
    """All entries of some registry files."""

    systems: tuple[System, ...]
    own: tuple[str, ...] = ()
    """Systems that the user's own files brought; chosen when nothing else is."""

    @property
    def entries(self) -> list[Entry]:
        return [entry for system in self.systems for entry in system.entries]

    def select(self, ids: Sequence[str] = (), system: str | None = None, set_name: str | None = None) -> list[Entry]:
        """Choose entries, in the order of the files, each once.

        Args:
            ids: Ids or patterns ("sam-pt/raft/*"). Alone, they choose whatever the set.
            system: Only entries of this system (any case).
            set_name: Only entries of this set; "complete" includes "minimal". By default: with a system, its
                minimal set if it has one, else all of it; with nothing, what class-to-video needs.

        Raises:
            UserError: Nothing of that name, or nothing is left.
        """
        chosen = self.entries
        if system is not None:
            names = {entry.system.lower(): entry.system for entry in chosen}
            if system.lower() not in names:
                raise UserError(f"No system {system!r}: {nearest(system, sorted(names.values()))}")
            chosen = [entry for entry in chosen if entry.system.lower() == system.lower()]
        if ids:
            chosen = _matching(chosen, ids)
        elif system is None:
            wanted = self.own or (DEFAULT_SYSTEM,)
            chosen = [entry for entry in chosen if entry.system in wanted]
        if set_name is None and not ids and (system is not None or not self.own):
            has_minimal = any("minimal" in entry.sets for entry in chosen)
            set_name = "minimal" if has_minimal else None
        return chosen if set_name is None else _of_set(chosen, set_name)


def _matching(entries: list[Entry], ids: Sequence[str]) -> list[Entry]:
    known = [entry.id for entry in entries]
    wanted: set[str] = set()
    for word in ids:
        found = [word] if word in known else fnmatch.filter(known, word)
        if not found:
            raise UserError(f"No entry {word!r}: {nearest(word, known)} ('--list --set all' shows every entry)")
        wanted.update(found)
    return [entry for entry in entries if entry.id in wanted]


def _of_set(entries: list[Entry], name: str) -> list[Entry]:
    if name == "all":
        return entries
    known = sorted({item for entry in entries for item in entry.sets} | {"all"})
    wanted = {"minimal", "complete"} if name == "complete" else {name}
    chosen = [entry for entry in entries if wanted & set(entry.sets)]
    if not chosen:
        raise UserError(f"No set {name!r} among the chosen entries: {nearest(name, known)}")
    return chosen


def shipped_files() -> list[Path]:
    """The project's own registry files. In a checkout `data` is a link to `pretrained/registry`."""
    return sorted((Path(__file__).parent / "data").glob("*.yaml"))


def load_catalogue(own_files: Sequence[Path] = ()) -> Catalogue:
    """Read the shipped registry files and the user's own.

    Raises:
        UserError: A file is missing or malformed, or an id occurs twice.
    """
    files = shipped_files()
    if not files and not own_files:
        raise UserError("The registry files are not there: install the package anew, or pass --registry FILE.")
    systems, seen = [], {}
    for path in (*files, *map(Path, own_files)):
        system = _read(path)
        systems.append(system)
        for entry in system.entries:
            if entry.id in seen:
                raise UserError(f"{path}: the id {entry.id!r} is already used in {seen[entry.id]}: choose another.")
            seen[entry.id] = path
    own = tuple(system.system for system in systems[len(files) :])
    return Catalogue(tuple(systems), own)


def _read(path: Path) -> System:
    if not path.is_file():
        raise UserError(f"The registry file {path} is not there.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        line = f" (line {place.line + 1})" if place else ""
        raise UserError(f"{path} is no valid YAML{line}: {str(error).splitlines()[0]}.") from error
    return parse_system(content, str(path))
