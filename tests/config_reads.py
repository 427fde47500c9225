"""Which settings a package reads, found in its syntax trees: an attribute counts if its owner is of the config's class.

The owner's class is followed through annotations, assignments, attributes, constructors and return annotations. What
only checks a setting (`__post_init__`, functions called check... or _check...) does not read it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

Table = dict[str, dict[str, str]]
"""Class -> attribute -> class of that attribute."""


class Reader:
    """What `files` say of their classes, and what they read of them.

    Attributes:
        reads: (class, attribute) of every reading access.
    """

    def __init__(self, files: list[Path]):
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
        self.table: Table = {
            node.name: {} for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
        }
        self.returns = {
            node.name: kind
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and (kind := self._annotated(node.returns))
        }
        self.reads: set[tuple[str, str]] = set()
        for _ in range(3):  # what an attribute is may follow from another class's attribute
            for tree in trees:
                self._walk(tree, {}, None)

    def _walk(self, node: ast.AST, names: dict[str, str], owner: str | None) -> None:
        """Take in a node; `names` are the variables whose class is known."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                self._walk(child, names, child.name)
            elif isinstance(child, ast.FunctionDef | ast.Lambda):
                self._enter(child, dict(names), owner)
            else:
                self._take(child, names, owner if isinstance(node, ast.ClassDef) else None)
                self._walk(child, names, owner)

    def _enter(self, function: ast.FunctionDef | ast.Lambda, names: dict[str, str], owner: str | None) -> None:
        if isinstance(function, ast.FunctionDef):
            if function.name == "__post_init__" or function.name.lstrip("_").startswith("check"):
                return
            if owner and any(
                getattr(word, "id", "") in ("property", "cached_property") for word in function.decorator_list
            ):
                self._note(owner, function.name, self._annotated(function.returns))
        for argument in function.args.args + function.args.kwonlyargs:
            names.pop(argument.arg, None)
            if kind := owner if argument.arg == "self" else self._annotated(argument.annotation):
                names[argument.arg] = kind
        self._walk(function, names, None)

    def _take(self, node: ast.AST, names: dict[str, str], owner: str | None) -> None:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and owner:
            self._note(owner, node.target.id, self._annotated(node.annotation))
        elif isinstance(node, ast.Assign):
            for target, value in _pairs(node.targets[0], node.value):
                self._assign(target, self._kind(value, names), names)
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target, self._kind(node.value, names), names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if kind := self._kind(node.value, names):
                self.reads.add((kind, node.attr))

    def _assign(self, target: ast.AST, kind: str | None, names: dict[str, str]) -> None:
        if isinstance(target, ast.Name):
            names.pop(target.id, None)
            if kind:
                names[target.id] = kind
        elif isinstance(target, ast.Attribute) and (whole := self._kind(target.value, names)):
            self._note(whole, target.attr, kind)

    def _note(self, owner: str, attribute: str, kind: str | None) -> None:
        if kind:
            self.table[owner][attribute] = kind

    def _kind(self, node: ast.AST, names: dict[str, str]) -> str | None:
        """Class of an expression's value, if it is one of the package's."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.table.get(self._kind(node.value, names) or "", {}).get(node.attr)
        if isinstance(node, ast.IfExp):
            return self._kind(node.body, names) or self._kind(node.orelse, names)
        if not isinstance(node, ast.Call):
            return None
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "replace" and node.args:
            return self._kind(node.args[0], names)
        if name == "load_config":
            return getattr(node.args[0], "id", None)
        return name if name in self.table else self.returns.get(name)

    def _annotated(self, node: ast.AST | None) -> str | None:
        """A class of the package that an annotation names: X, "X | None"."""
        words = set(re.findall(r"\w+", ast.unparse(node))) if node is not None else set()
        return min(words & set(self.table), default=None)


def _pairs(target: ast.AST, value: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """a = x, and the parts of a, b = x, y."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value
