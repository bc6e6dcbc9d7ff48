"""Durations and sizes as people write them."""

from __future__ import annotations

import re

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_LONGEST_S = 10 * 365 * 86400.0

NEVER = ("never", "null", "none")


def parse_duration(value: object) -> float:
    """Seconds, from '30m', '10s', '1.5h', '250ms' or a plain number of seconds. Raises ValueError."""
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        text = value.strip()
        match = _DURATION.fullmatch(text)
        if match:
            seconds = float(match[1]) * _SECONDS[match[2]]
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError("expected a duration such as 10s, 30m or 2h, or a number of seconds")
    return seconds


def parse_duration_or_never(value: object) -> float | None:
    """The same, and None for null and 'never'. Raises ValueError."""
    if value is None or (isinstance(value, str) and value.strip().lower() in NEVER):
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{error}, or never") from error


def parse_size(value: object) -> int:
    """Bytes, from '12GiB', '6600MiB' or '1.5GB'; without a unit only 0. Raises ValueError.

    A bare number is refused since half of its readers would take it for MiB.
    """
    if isinstance(value, int) and value == 0 and not isinstance(value, bool):
        return 0
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a size with its unit, such as 6600MiB, 12GiB or 1.5GB")
    prefix = match[2] or ""
    base = 1024 if prefix.endswith("i") else 1000
    size = float(match[1]) * float(base ** _POWERS[prefix.rstrip("i")])
    if size >= 2**53:
        raise ValueError("expected a size that some machine could have")
    return round(size)


def size_text(size_bytes: int) -> str:
    """A size of files for a person: `17.3 GiB`, `480 MiB`, `12 KiB`."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if size_bytes >= 1024**power:
            value = size_bytes / 1024**power
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{-(-size_bytes // 1024)} KiB"


def counted(count: int, word: str) -> str:
    """`1 model`, `2 models`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def age(seconds: float) -> str:
    """A time span in its largest fitting unit: `3 days`, `40 minutes`, `12 s`."""
    for unit_s, unit in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
