"""Field types that bodies of several calls share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from orchestrator.core.keys import NAME
from orchestrator.core.units import parse_duration

KEY_NAME = f"^{NAME.pattern}$"
ATTEMPT = r"^[0-9A-Za-z_-]{1,64}$"
FORMS = {
    KEY_NAME: "a name of letters, digits and . _ - that begins with a letter or digit, at most 64 long",
    ATTEMPT: "an attempt's id, as GET /models/{model} has it",
}
"""What a text that must match one of these patterns is called."""


def positive_seconds(value: object) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError("expected a duration above 0, such as 10m, 30s, or a number of seconds")
    return seconds


SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(ms|s|m|h|d)?\s*$"},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 315_360_000},
    ]
}
PositiveDuration = Annotated[float, BeforeValidator(positive_seconds), WithJsonSchema(SCHEMA)]
"""Seconds, from '10m' or a number of seconds; above 0."""
