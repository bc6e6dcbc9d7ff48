"""Pulling an image, and how far that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from orchestrator.core.entities import Progress
from orchestrator.core.errors import EngineError

STAGE = "pulling image"
_REPORT_EVERY_S = 0.2
_PARTS = {"Downloading": 0, "Extracting": 1}  # each layer is handled twice
_COMPLETE = {"Download complete": 0, "Pull complete": 1}


class PullProgress:
    """Sums up the layers' lines. The fraction is of the bytes known so far, and never goes back."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._done: dict[str, list[int]] = {}
        self._fraction: float | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        layer, status = str(line.get("id", "")), str(line.get("status", ""))
        detail = line.get("progressDetail") or {}
        if status in _PARTS and detail.get("total"):
            self._totals[layer] = int(detail["total"])
            self._done.setdefault(layer, [0, 0])[_PARTS[status]] = int(detail.get("current", 0))
        elif status in _COMPLETE and layer in self._totals:
            self._done[layer][_COMPLETE[status]] = self._totals[layer]

    @property
    def fraction(self) -> float | None:
        """From 0 to 1; None until a layer's size is known."""
        if total := 2 * sum(self._totals.values()):
            now = min(1.0, sum(map(sum, self._done.values())) / total)
            self._fraction = max(now, self._fraction or 0.0)
        return self._fraction


class HeardLines:
    """The engine's lines, and how long ago the last one came."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._lines = lines
        self._heard_s = time.monotonic()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for line in self._lines:
            self._heard_s = time.monotonic()
            yield line

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._heard_s


def follow_pull(
    lines: Iterable[Mapping[str, Any]],
    image: str,
    report: Callable[[Progress], None],
    is_given_up: Callable[[], bool],
) -> None:
    """Read the engine's lines to the end, reporting at most five times a second.

    Giving up ends the reading, and with the connection the engine's pull. Raises EngineError with the
    engine's reason.
    """
    progress, next_s = PullProgress(), 0.0
    for line in lines:
        if is_given_up():
            return
        if "error" in line:
            raise EngineError(str(line["error"]).strip())
        progress.add(line)
        if time.monotonic() >= next_s:
            report(Progress(STAGE, progress.fraction, f"{image}: {line.get('status', '')}"))
            next_s = time.monotonic() + _REPORT_EVERY_S
