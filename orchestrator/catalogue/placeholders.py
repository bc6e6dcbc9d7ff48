"""Fills `{path}` and the like: a fixed list of names and nothing else, never `str.format`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from orchestrator.catalogue.units import suggestion

NAMES = (
    "path",
    "mmproj",
    "context_size",
    "n_gpu_layers",
    "parallel",
    "cache_type_k",
    "cache_type_v",
    "model",
    "served_name",
    "port",
    "tensor_split",
)
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def check(text: str) -> str:
    """The text, if all its placeholders are known. Other braces, as in JSON, are only text.

    Raises ValueError.
    """
    for name in _PLACEHOLDER.findall(text):
        if name not in NAMES:
            allowed = ", ".join(f"{{{known}}}" for known in NAMES)
            raise ValueError(
                f"unknown placeholder {{{name}}}{suggestion(name, NAMES) or ';'} allowed: {allowed}"
            )
    return text


def used(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(name for text in texts for name in _PLACEHOLDER.findall(text))


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders that have a value, once: what is put in is not looked at again."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def fill_all(texts: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    return {key: fill(text, values) for key, text in texts.items()}
