"""What is wrong with a value, in plain words: of files, variables and bodies of requests alike.

Validators name the kind of a mistake; these are pydantic's names, and its limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_EXPECTED: Mapping[str, str] = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of less than 20 digits",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (in quotes, if it looks like a number)",
    "string_unicode": "text that UTF-8 can say",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
}


def refused(item: Mapping[str, Any], forms: Mapping[str, str]) -> str:
    """`got "x", expected a whole number`, or the sentence of a validator of ours.

    `item` is one of pydantic's errors. `forms` are the words for each pattern of text.
    """
    kind = item["type"]
    if kind == "missing":
        return "missing, and there is no default"
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "value_error":
        text = str(item["ctx"]["error"])
        return f"got {quoted(item['input'])}, {text}" if text.startswith("expected") else text
    return f"got {quoted(item['input'])}, expected {_expected(item, forms)}"


def _expected(item: Mapping[str, Any], forms: Mapping[str, str]) -> str:
    kind, limits = item["type"], item.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return f"one of {limits['expected']}"
    if kind == "string_pattern_mismatch":
        return forms.get(limits["pattern"], f"text that matches {limits['pattern']}")
    if kind in ("string_too_short", "too_short"):
        return _at_least(limits["min_length"], is_text=kind == "string_too_short")
    if kind in ("string_too_long", "too_long"):
        return f"at most {limits['max_length']} {'characters' if kind == 'string_too_long' else 'entries'}"
    return _number(kind, limits) or _EXPECTED.get(kind) or str(item["msg"])


def _at_least(length: int, *, is_text: bool) -> str:
    if length == 1:
        return "some text" if is_text else "a list with something in it"
    return f"at least {length} {'characters' if is_text else 'entries'}"


def _number(kind: str, limits: Mapping[str, Any]) -> str | None:
    match kind:
        case "greater_than_equal" if limits["ge"] == 1:
            return "a positive whole number"
        case "greater_than_equal":
            return f"at least {limits['ge']}"
        case "less_than_equal":
            return f"at most {limits['le']}"
        case "greater_than":
            return f"more than {limits['gt']}"
        case "less_than":
            return f"less than {limits['lt']}"
        case _:
            return None


def quoted(value: object) -> str:
    """A value as it might stand in the file, cut where it is long."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a character cannot be sent
    return text if len(text) <= 80 else text[:77] + "…"
