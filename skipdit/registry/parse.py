"""From YAML to the schema's classes; every mistake is named with its file and entry."""

import dataclasses
import types
import typing
from typing import Any

from ..config import nearest
from ..errors import UserError
from .schema import SOURCES, Entry, Source, System

__all__ = ["parse_system"]


def parse_system(content: Any, where: str) -> System:
    """Check and convert what a registry file holds.

    Args:
        content: The parsed YAML.
        where: The file's name, for messages.

    Raises:
        UserError: An unknown or missing field, a wrong type, or a value that makes no sense.
    """
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise UserError(f"{where} is no registry: it needs 'system: NAME' and a list 'entries:'.")
    content = dict(content)
    units = content.get("units", "iec")
    if units not in ("iec", "si"):
        raise UserError(f"{where}: units is 'iec' (1024) or 'si' (1000), not {units!r}.")
    system = content.get("system")
    entries = []
    for number, item in enumerate(content.pop("entries"), 1):
        name = item.get("id", f"number {number}") if isinstance(item, dict) else f"number {number}"
        place = f"{where}, entry {name}"
        if not isinstance(item, dict):
            raise UserError(f"{place} is not a mapping of fields.")
        item = {**item, "system": item.get("system", system), "units": units}
        entries.append(_build(Entry, item, place))
    return _build(System, {**content, "entries": tuple(entries)}, where)


def _build(cls: type, values: dict, where: str) -> Any:
    """A dataclass from a mapping, each field checked against its type."""
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown field {name!r}: {nearest(str(name), list(fields))}")
    for name, item in fields.items():
        missing = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if missing and name not in values:
            raise UserError(f"{where}: the field {name!r} is missing.")
    made = cls(**{name: _convert(value, hints[name], f"{where}, {name}") for name, value in values.items()})
    problem = made.problem() if hasattr(made, "problem") else None
    if problem:
        raise UserError(f"{where}: {problem}.")
    return made


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0], where)
    if isinstance(hint, type) and issubclass(hint, Source):
        return value if isinstance(value, Source) else _source(value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: a list is needed, not {value!r}.")
        return tuple(_convert(item, arguments[0], where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: a mapping is needed, not {value!r}.")
        return {str(key): _convert(item, arguments[1], where) for key, item in value.items()}
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not right:
        raise UserError(f"{where}: {hint.__name__} is needed, not {value!r} (quote it if it is text).")
    return value


def _source(value: Any, where: str) -> Source:
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"{where}: a source is a mapping with a 'kind': {', '.join(SOURCES)}.")
    values = dict(value)
    kind = values.pop("kind")
    if kind not in SOURCES:
        raise UserError(f"{where}: unknown kind {kind!r}: {nearest(str(kind), list(SOURCES))}")
    return _build(SOURCES[kind], values, f"{where} ({kind})")
