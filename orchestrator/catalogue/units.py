"""Durations and sizes as field types for pydantic, and helpers for what people mistype."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from orchestrator.core.units import parse_duration, parse_duration_or_never, parse_size


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


_DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}], "examples": ["30m"]}
_NEVER_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}, {"type": "null"}]}

Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(_DURATION_SCHEMA)]
MaybeDuration = Annotated[
    float | None, BeforeValidator(parse_duration_or_never), WithJsonSchema(_NEVER_SCHEMA)
]
Size = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"type": ["string", "integer"], "examples": ["12GiB"]})
]
Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer for which `true` is not 1."""


def listed(value: Any) -> Any:
    """A list field's value where a variable or a lone word gave text: 'a, b' is two entries."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
