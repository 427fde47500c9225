"""Typed settings: a dataclass says what there is, a YAML file and `key=value` words fill it in."""

import dataclasses
import difflib
import keyword
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .errors import UserError
from .files import written_whole

__all__ = ["describe", "load_config", "nearest", "save_config", "setting", "setting_name"]

Schema = TypeVar("Schema")
COMMAND_LINE = "the command line"


def load_config(schema: type[Schema], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Schema:
    """Read settings: the schema's defaults, then the file, then the overrides.

    Args:
        schema: A dataclass, possibly of dataclasses. A field without a default must be given. A setting whose name
            is a word of Python's own has an underscore behind it there (`from_` is set as "from").
        path: A YAML file (1.2 rules: `off` is a word, not a boolean; 1e-4 is a number), or None.
        overrides: Words such as "steps=50" or "optimizer.lr=1e-4"; values are YAML too ("classes=[3, cat]").
            A single value where the schema has a list makes a list of one ("classes=cat").

    Returns:
        An instance of the schema, its `__post_init__` run.

    Raises:
        UserError: A missing or malformed file, an unknown key (the nearest one is named), a value of another
            type, or a ValueError of a `__post_init__`.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = 50
        >>> load_config(Settings, None, ["steps=20"])
        Settings(steps=20)
    """
    config = OmegaConf.structured(schema)
    if path is not None:
        config = _merge(config, schema, *_read_file(Path(path)), str(path))
    for word in overrides:
        config = _merge(config, schema, *_parse_override(word), COMMAND_LINE)
    source = " or ".join(filter(None, [path and str(path), COMMAND_LINE]))
    try:
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: set it in {source} ({error.full_key}=...).") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'Settings'} ({source}): {_first_line(error)}.") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a dataclass instance as YAML that `load_config` reads back to an equal one."""
    settings = OmegaConf.create(_renamed(OmegaConf.to_container(OmegaConf.structured(config)), setting_name))
    with written_whole(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(settings), encoding="utf-8")


def setting_name(field: str) -> str:
    """What users call a field: without the underscore behind a word of Python's own."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field


def _field_name(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def _renamed(values: Any, rename: Callable[[str], str]) -> Any:
    """The same mapping, its own and its inner mappings' keys renamed."""
    if not isinstance(values, dict):
        return values
    return {rename(name) if isinstance(name, str) else name: _renamed(value, rename) for name, value in values.items()}


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default (lists and mappings are copied for each instance) and a line for `describe`."""
    metadata = {"help": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def describe(schema: type) -> str:
    """Settings with their defaults and lines of help, for the end of a command's --help."""
    return "settings (key=value, with their defaults):\n" + "\n".join(_lines(schema))


def _lines(schema: type, prefix: str = "") -> list[str]:
    lines = []
    for field in dataclasses.fields(schema):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            lines += _lines(type(default), f"{prefix}{field.name}.")
            continue
        shown = "null" if default is None else str(default).replace("'", "")
        lines.append(f"  {f'{prefix}{field.name}={shown}':<26} {field.metadata.get('help', '')}".rstrip())
    return lines


def nearest(word: str, valid: Sequence[str]) -> str:
    """The end of an error message: "did you mean 'x'?" if something is near, else what there is."""
    folded = {name.casefold(): name for name in valid}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=0.6)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    return f"choose from {', '.join(valid[:40])}{', ...' if len(valid) > 40 else ''}."


def _merge(config: Any, schema: type, values: dict[str, Any], words: dict[str, Any], source: str) -> Any:
    known = dict(_walk_schema(schema))
    _check_keys(values, known, source)
    try:
        return OmegaConf.merge(config, _choose(values, words, known))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or ', '.join(values)} ({source}): {_first_line(error)}.") from error
    except TypeError as error:  # a list where a mapping belongs
        raise UserError(f"{', '.join(values)} ({source}): a mapping is needed, such as {{name: value}}.") from error


def _choose(values: dict[str, Any], words: dict[str, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The user's mapping: words as typed where the schema has text ("007" is no 7), values elsewhere."""
    chosen = {}
    for name, value in values.items():
        kind = known[f"{prefix}{name}"]
        if dataclasses.is_dataclass(kind):
            chosen[name] = _choose(value, words[name], known, f"{prefix}{name}.")
        else:
            container = typing.get_origin(kind)
            of_text = container in (list, tuple, dict) and typing.get_args(kind)[-1] is str
            chosen[name] = words[name] if kind is str or of_text else value
            if container is list and isinstance(chosen[name], str | int | float):
                chosen[name] = [chosen[name]]
    return chosen


def _check_keys(values: dict[str, Any], known: dict[str, Any], source: str) -> None:
    for key, is_section in _walk_values(values, known):
        if key not in known:
            raise UserError(f"No setting {key!r} ({source}): {_nearest_key(key, known)}")
        if dataclasses.is_dataclass(known[key]) and not is_section:
            inner = ", ".join(name for name in known if name.startswith(f"{key}."))
            raise UserError(f"{key!r} ({source}) is a section: set one of {inner}.")


def _walk_schema(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a dataclass with their types, sections included."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = _without_none(hints[field.name])
        yield prefix + field.name, kind
        if dataclasses.is_dataclass(kind):
            yield from _walk_schema(kind, f"{prefix}{field.name}.")


def _walk_values(values: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted keys of the user's mapping; True marks a mapping where the schema has a section."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, dict) and dataclasses.is_dataclass(known.get(key))
        yield key, is_section
        if is_section:
            yield from _walk_values(value, known, f"{key}.")


def _without_none(kind: Any) -> Any:
    choices = [choice for choice in typing.get_args(kind) if choice is not type(None)]
    return choices[0] if type(None) in typing.get_args(kind) and len(choices) == 1 else kind


def _nearest_key(key: str, known: dict[str, Any]) -> str:
    """Nearest key; one in another section with exactly this last name goes first."""
    fields = [name.split(".") for name, kind in known.items() if not dataclasses.is_dataclass(kind)]
    settings = [".".join(map(setting_name, parts)) for parts in fields]
    same_leaf = [name for name in settings if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"did you mean {same_leaf[0]!r}?" if same_leaf else nearest(key, settings)


def _parse_override(word: str) -> tuple[dict[str, Any], dict[str, Any]]:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{word!r} is not of the form key=value, for example steps=50.")
    try:
        value, words = yaml.load(text, _Loader), yaml.load(text, _WordLoader)
    except yaml.YAMLError as error:
        raise UserError(f"The value of {word!r} is not valid YAML: check its brackets and quotes.") from error
    for name in reversed(key.strip().split(".")):
        value, words = {name: value}, {name: words}
    return _renamed(value, _field_name), _renamed(words, _field_name)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's mapping twice: with values, and with plain words left as text."""
    if not path.is_file():
        raise UserError(f"{path} is not there: give the path of a YAML file, for example configs/digits/sample.yaml.")
    try:
        text = path.read_text(encoding="utf-8")
        content, words = yaml.load(text, _Loader), yaml.load(text, _WordLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise UserError(f"{path} is not valid YAML{place}.") from error
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not settings of the form 'key: value'.")
    return _renamed(content, _field_name), _renamed(words, _field_name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain words and without silent double keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is set twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _WordLoader(_Loader):
    """Leaves every plain word but null as text."""


# PyYAML follows YAML 1.1, where `off` and `no` are booleans (cache=off would be False) and 1e-4 is a string.
_PLAIN_WORDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}
for _loader, _kinds in ((_Loader, _PLAIN_WORDS), (_WordLoader, ["null"])):
    _loader.yaml_implicit_resolvers = {}
    for _kind in _kinds:
        _pattern, _first = _PLAIN_WORDS[_kind]
        _loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), list(_first))
