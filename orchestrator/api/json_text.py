"""Where things stand in the text of valid JSON, so that one can be replaced and the rest left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

WHITE = re.compile(r"[ \t\r\n]*")

Span = tuple[int, int]


def value_span(text: str, wanted: str) -> Span | None:
    """Where the value of a key of the top-level object stands; of several, the last, as parsers do."""
    decode = json.JSONDecoder().raw_decode
    found = None
    at = text.index("{") + 1
    while (at := next_token(text, at)) < len(text) and text[at] == '"':
        key, at = decode(text, at)
        start = next_token(text, next_token(text, at) + 1)  # past the colon
        _, at = decode(text, start)
        if key == wanted:
            found = (start, at)
        at = next_token(text, at) + 1  # past the comma
    return found


def elements(text: str, start: int) -> Iterator[tuple[Any, int, int]]:
    """Each element of the array that begins at `start`: its value, and where it stands."""
    decode = json.JSONDecoder().raw_decode
    at = next_token(text, start + 1)
    while text[at] != "]":
        value, end = decode(text, at)
        yield value, at, end
        at = next_token(text, end)
        if text[at] == ",":
            at = next_token(text, at + 1)


def next_token(text: str, at: int) -> int:
    """The next place that is not white space."""
    match = WHITE.match(text, at)
    return match.end() if match else at
