"""What the store does not know yet: the difference of two snapshots. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from orchestrator.control.ports import Changes
from orchestrator.core.snapshot import Snapshot

V = TypeVar("V")


def differences(saved: Snapshot, decided: Snapshot) -> Changes:
    return Changes(
        instances=changed_items(saved.instances, decided.instances),
        operations=changed_items(saved.operations, decided.operations),
        pins=changed_or_gone(saved.pins, decided.pins),
        holds={
            model: None if until_s is None else decided.wall_s + until_s - decided.now_s
            for model, until_s in changed_or_gone(saved.holds, decided.holds).items()
        },
        downloads=changed_or_gone(saved.downloads, decided.downloads),
        learned=changed_or_gone(saved.learned, decided.learned),
    )


def changed_items(before: Mapping[str, V], after: Mapping[str, V]) -> dict[str, V]:
    if before is after:
        return {}
    return {key: value for key, value in after.items() if before.get(key) is not value}


def changed_or_gone(before: Mapping[str, V], after: Mapping[str, V]) -> dict[str, V | None]:
    if before is after:
        return {}
    changed: dict[str, V | None] = {k: v for k, v in after.items() if before.get(k) != v}
    return changed | dict.fromkeys(before.keys() - after.keys())
