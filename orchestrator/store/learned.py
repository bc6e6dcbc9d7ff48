"""The rows of what was learned of models' memory: `learned.Learned`, by its key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from orchestrator.core.entities import Recipe
from orchestrator.core.errors import StoreError
from orchestrator.core.learned import Learned, Load
from orchestrator.store.copies import open_to_read
from orchestrator.store.database import BUSY_TIMEOUT_S, Database
from orchestrator.store.explain import explained
from orchestrator.store.tables import LearnedRow, table_of

LEARNED = table_of(LearnedRow)


def write_learned(connection: Connection, changed: Mapping[str, Learned | None]) -> None:
    """None is a row that goes."""
    for key, learned in changed.items():
        connection.execute(delete(LEARNED).where(LEARNED.c.key == key))
        if learned is not None:
            connection.execute(insert(LEARNED).values({**asdict(learned), "key": key}))


def read_learned(connection: Connection) -> dict[str, Learned]:
    return {row["key"]: _to_learned(row) for row in connection.execute(select(LEARNED)).mappings()}


def look(path: Path) -> dict[str, Learned]:
    """What stands in the database, also while a server runs; nothing is changed. Raises StoreError."""
    if not path.exists():
        raise StoreError(f"There is no database {path}. --config or --database names another.")
    columns = ", ".join(column.name for column in LEARNED.columns)
    with explained(path), closing(open_to_read(path, BUSY_TIMEOUT_S)) as connection:
        is_there = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'learned'").fetchone()
        rows = connection.execute(f"SELECT {columns} FROM learned").fetchall() if is_there else []
    names = [column.name for column in LEARNED.columns]
    found = (dict(zip(names, row, strict=True)) for row in rows)
    return {
        row["key"]: _to_learned({**row, "recipe": loads(row["recipe"]), "loads": loads(row["loads"])})
        for row in found
    }


def forget(path: Path, keys: Collection[str]) -> None:
    """Raises DatabaseInUse while a server runs, or StoreError."""
    database = Database(path)
    try:
        with database.transaction() as connection:
            write_learned(connection, dict.fromkeys(keys))
    finally:
        database.close()


def _to_learned(row: Mapping[Any, Any]) -> Learned:
    recipe, seen = Recipe(**row["recipe"]), tuple(Load(**load) for load in row["loads"])
    return Learned(recipe, row["card"], row["predicted_bytes"], seen, row["floor_bytes"])
