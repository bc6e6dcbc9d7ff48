"""Pydantic's validation errors as sentences with file, line, field, value and what is allowed."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.catalogue.units import suggestion
from orchestrator.catalogue.yaml_lines import KeyPath

_EXPECTED: Mapping[str, str] = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (in quotes, if it looks like a number)",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
}


def explain(
    error: ValidationError, root: type[BaseModel], at: Callable[[KeyPath, str], str], prefix: KeyPath = ()
) -> list[str]:
    """One line for each thing that is wrong. `at` puts a place before a text, `prefix` is where `root` is."""
    lines = []
    for item in error.errors(include_url=False):
        where = tuple(part for part in item["loc"] if part != "[key]")
        lines.append(at((*prefix, *where), _sentence(dict(item), where, root)))
    return lines


def _sentence(item: Mapping[str, Any], where: KeyPath, root: type[BaseModel]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        allowed = _fields(_model_at(root, where[:-1]))
        hint = suggestion(str(where[-1]), allowed)
        return f"unknown field{hint or ';'} allowed: {', '.join(sorted(allowed))}"
    if kind == "missing":
        return "missing, and there is no default"
    if kind == "value_error":
        text = str(item["ctx"]["error"])
        return f"got {quoted(item['input'])}, {text}" if text.startswith("expected") else text
    return f"got {quoted(item['input'])}, expected {_expected(item)}"


def _expected(item: Mapping[str, Any]) -> str:
    kind, limits = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return f"one of {limits['expected']}"
    if kind == "greater_than_equal" and limits["ge"] == 1:
        return "a positive whole number"
    if kind in ("greater_than_equal", "less_than_equal"):
        limit = limits.get("ge", limits.get("le"))
        return f"at {'least' if kind.startswith('greater') else 'most'} {limit}"
    if kind == "greater_than":
        return f"more than {limits['gt']}"
    return _EXPECTED.get(kind) or str(item["msg"])


def quoted(value: object) -> str:
    """A value as it might stand in the file, cut where it is long."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _fields(model: type[BaseModel] | None) -> list[str]:
    return list(model.model_fields) if model is not None else []


def _model_at(model: type[BaseModel], where: KeyPath) -> type[BaseModel] | None:
    """The class that stands at this path below `model`; dict keys and list places are steps too."""
    kind: Any = model
    for part in where:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            known = kind.model_fields.get(str(part))
            kind = known.annotation if known else None
        else:
            kind = get_args(kind)[-1] if get_args(kind) else None
        kind = _without_none(kind)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [choice for choice in get_args(kind) if choice is not type(None)]
        return rest[0] if rest else None
    return kind
