"""Pydantic's validation errors as sentences with file, line, field, value and what is allowed."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.catalogue.schema import FORMS
from orchestrator.catalogue.units import suggestion
from orchestrator.catalogue.yaml_lines import KeyPath
from orchestrator.core.mistakes import refused


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
    text = refused(item, FORMS)
    if item["type"] != "extra_forbidden":
        return text
    allowed = _fields(_model_at(root, where[:-1]))
    return f"{text}{suggestion(str(where[-1]), allowed) or ';'} allowed: {', '.join(sorted(allowed))}"


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
