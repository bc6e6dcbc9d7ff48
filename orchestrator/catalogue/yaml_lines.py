"""YAML as plain data, with the line of every key kept for error messages.

Narrower than YAML 1.1 on purpose: `yes`, `on`, `10:30`, `007` and dates are text, tags beyond the plain
kinds are refused, keys are text, and a key may appear once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from orchestrator.core.errors import CatalogueError

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MOST_BYTES = 4 * 1024 * 1024
_MOST_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with JSON's idea of what is a number, a truth value or null."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's API


_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    _TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,17})$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2})?$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class Document:
    """A file's data and the line (from 1) where each key or list entry stands."""

    path: Path
    data: object
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return shown(self.path)

    def line(self, where: KeyPath) -> int:
        """The line of this key or, where it is not in the file, of what should hold it."""
        while where and where not in self.lines:
            where = where[:-1]
        return self.lines.get(where, 1)

    def at(self, where: KeyPath, text: str) -> str:
        """`models.yaml, line 12: models.foo.context_size: <text>`."""
        dotted = ".".join(str(part) for part in where)
        return f"{self.name}, line {self.line(where)}: {dotted + ': ' if dotted else ''}{text}"


def shown(path: Path) -> str:
    """The path as a person at this folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def load_yaml(path: Path) -> Document:
    """Read one file. Raises CatalogueError, with the line, for what is not readable, not YAML or repeated."""
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = error.problem or error.context or "not YAML"
        raise CatalogueError(f"{shown(path)}, line {line}: not valid YAML: {reason}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise CatalogueError(f"{shown(path)}, line {line}: a character YAML does not allow") from error
    except RecursionError as error:
        raise CatalogueError(f"{shown(path)}: nested too deeply") from error
    if node is None:
        return Document(path, None)
    builder = _Builder(path)
    data = builder.build(node, ())
    if builder.errors:
        raise CatalogueError("\n".join(builder.errors))
    return Document(path, data, builder.lines)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CatalogueError(f"{shown(path)}: larger than 4 MiB, which no configuration is")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CatalogueError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise CatalogueError(f"{shown(path)}, line {line}: not UTF-8 text") from error


class _Builder:
    """Turns nodes into data; collects errors so that all are told at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.errors: list[str] = []
        self._open: set[int] = set()
        self._count = 0

    def build(self, node: Node, where: KeyPath) -> object:
        self.lines.setdefault(where, node.start_mark.line + 1)
        self._count += 1
        if self._count > _MOST_NODES or id(node) in self._open:
            raise CatalogueError(
                f"{shown(self.path)}, line {node.start_mark.line + 1}: this alias repeats itself without end"
            )
        self._open.add(id(node))
        try:
            return self._value(node, where)
        finally:
            self._open.discard(id(node))

    def _value(self, node: Node, where: KeyPath) -> object:
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, where)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(child, (*where, place)) for place, child in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        return self._fail(node, f"the tag {node.tag} is not allowed here")

    def _mapping(self, node: MappingNode, where: KeyPath) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, child in node.value:
            if not isinstance(key, ScalarNode):
                self._fail(key, "a key must be plain text")
                continue
            name = str(key.value)
            path = (*where, name)
            if name in found:
                self._fail(key, f"the key '{name}' stands here twice, first in line {self.lines[path]}")
                continue
            self.lines[path] = key.start_mark.line + 1
            found[name] = self.build(child, path)
        return found

    def _scalar(self, node: ScalarNode) -> object:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text)
            if kind == "float" and math.isfinite(float(text)):
                return float(text)
        except ValueError:
            return self._fail(node, f"'{text}' is not of the kind its tag says")
        if kind in ("str", "!"):
            return text
        return self._fail(node, f"the tag {node.tag} is not allowed here")

    def _fail(self, node: Node, text: str) -> object:
        """Note the error; the value in its place is None."""
        self.errors.append(f"{shown(self.path)}, line {node.start_mark.line + 1}: {text}")
        return None
