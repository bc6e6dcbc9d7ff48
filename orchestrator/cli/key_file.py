"""The key that a command uses where nobody named one: the server's own file, if we may read it."""

from __future__ import annotations

from pathlib import Path

from orchestrator.core.errors import CatalogueError
from orchestrator.settings import load_settings
from orchestrator.store.admin_key import read_admin_key


def admin_key_here(config: Path | None = None) -> str | None:
    """The admin key of the first start, from the state folder that the settings here name."""
    try:
        return read_admin_key(load_settings(config).database)
    except CatalogueError:
        return None
