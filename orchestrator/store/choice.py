"""Which engine and which devices were chosen at the first start, as the database remembers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from orchestrator.store.copies import open_to_read
from orchestrator.store.explain import explained

KEYS = ("engine", "devices")


def choice_in(known: Mapping[str, str]) -> tuple[str, str] | None:
    engine, devices = (known.get(key) for key in KEYS)
    return (engine, devices) if engine and devices else None


def look_at_choice(path: Path) -> tuple[str, str] | None:
    """Also while a server runs; nothing is changed. None where nothing is remembered. Raises StoreError."""
    with explained(path):
        if not path.exists() or not path.stat().st_size:
            return None
        with closing(open_to_read(path)) as connection:
            is_there = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone()
            rows = connection.execute("SELECT key, value FROM meta").fetchall() if is_there else []
    return choice_in(dict(rows))
