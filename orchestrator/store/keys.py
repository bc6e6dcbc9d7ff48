"""ports.KeyStore over the server's database, and the same for a command without a server."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping, bindparam, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from orchestrator.core.keys import Key, Scope, Session, issue
from orchestrator.store.admin_key import forget_admin_key, write_admin_key
from orchestrator.store.repository import SqliteStore
from orchestrator.store.tables import ApiKeyRow, SessionRow, table_of

log = structlog.get_logger(__name__)

FIRST = "admin"
"""The name of the key that the server makes by itself."""

KEY = table_of(ApiKeyRow)
SESSION = table_of(SessionRow)

NOTE_USE = update(KEY).where(KEY.c.id == bindparam("of_key")).values(last_used_at=bindparam("at"))


class SqliteKeys:
    """Writes on the store's own thread, in the order of all its writes."""

    def __init__(self, store: SqliteStore, database: Path) -> None:
        self._store = store
        self._database = database

    def load(self) -> tuple[list[Key], list[Session]]:
        """All there are. Blocks; raises StoreError."""
        return self._store.read_now(lambda c: (read_keys(c), read_sessions(c)))

    def make_first(self, now: float) -> Key:
        """An admin key, whose text goes to a file of the state folder. Blocks; raises StoreError.

        The file comes first: a key of which nobody knows the text would lock everybody out.
        """
        key, token = issue(FIRST, [Scope.ADMIN], now=now, lasts_s=None, random_hex=secrets.token_hex)
        path = write_admin_key(self._database, token)
        self._store.write_now(lambda c: insert_key(c, key))
        log.warning(
            "others may reach this server, so every call needs a key; a first one was made", file=str(path)
        )
        return key

    async def add_key(self, key: Key) -> None:
        await self._store.write(lambda c: insert_key(c, key))

    async def remove_key(self, key_id: str) -> None:
        await self._store.write(lambda c: delete_key(c, key_id))
        await asyncio.to_thread(forget_admin_key, self._database, key_id)

    async def note_use(self, used_at: Mapping[str, float]) -> None:
        rows = [{"of_key": key_id, "at": at} for key_id, at in used_at.items()]
        await self._store.write(lambda c: c.execute(NOTE_USE, rows))

    async def add_session(self, session: Session, now: float) -> None:
        def write(connection: Connection) -> None:
            connection.execute(delete(SESSION).where(SESSION.c.expires_at <= now))
            connection.execute(insert(SESSION).values(session_row(session)))

        await self._store.write(write)

    async def remove_session(self, digest: bytes) -> None:
        await self._store.write(lambda c: c.execute(delete(SESSION).where(SESSION.c.digest == digest.hex())))


# --- within a transaction


def read_keys(connection: Connection) -> list[Key]:
    return [to_key(row) for row in connection.execute(select(KEY).order_by(KEY.c.name)).mappings()]


def read_sessions(connection: Connection) -> list[Session]:
    return [to_session(row) for row in connection.execute(select(SESSION)).mappings()]


def insert_key(connection: Connection, key: Key) -> None:
    row = {"id": key.id, "name": key.name, "digest": key.digest.hex(), "scopes": sorted(key.scopes)}
    times = {"created_at": key.created_at, "expires_at": key.expires_at, "last_used_at": key.last_used_at}
    connection.execute(insert(KEY).values(row | times))


def delete_key(connection: Connection, key_id: str) -> None:
    connection.execute(delete(SESSION).where(SESSION.c.key_id == key_id))
    connection.execute(delete(KEY).where(KEY.c.id == key_id))


def to_key(row: RowMapping) -> Key:
    scopes = frozenset(map(Scope, row["scopes"]))
    return Key(**{**row, "digest": bytes.fromhex(row["digest"]), "scopes": scopes})


def session_row(session: Session) -> dict[str, Any]:
    return {"digest": session.digest.hex(), "key_id": session.key_id, "expires_at": session.expires_at}


def to_session(row: RowMapping) -> Session:
    return Session(**{**row, "digest": bytes.fromhex(row["digest"])})
