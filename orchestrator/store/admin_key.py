"""The file that holds the admin key of the first start, beside the database; only its owner can read it."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from orchestrator.core.errors import StoreError
from orchestrator.core.keys import id_of
from orchestrator.store.files import beside, sync

log = structlog.get_logger(__name__)


def admin_key_file(database: Path) -> Path:
    return database.parent / "admin.key"


def write_admin_key(database: Path, token: str) -> Path:
    """Whole or not at all. Raises StoreError."""
    path = admin_key_file(database)
    fresh = beside(path, ".new")
    how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, how, 0o600), "w") as file:
            file.write(token + "\n")
        sync(fresh)
        fresh.replace(path)
        sync(path.parent)
    except OSError as error:
        raise StoreError(f"The admin key cannot be written to {path}: {error.strerror}.") from error
    return path


def read_admin_key(database: Path) -> str | None:
    """None where there is none that we may read."""
    try:
        return admin_key_file(database).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def forget_admin_key(database: Path, key_id: str) -> None:
    """Remove the file if it holds this key, which was revoked."""
    if id_of(read_admin_key(database) or "") != key_id:
        return
    path = admin_key_file(database)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the file of a revoked key was not removed", file=str(path), error=error.strerror)
