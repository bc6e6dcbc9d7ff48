"""The rows of what was learned of models' memory: `learned.Learned`, by its key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict

from sqlalchemy import Connection, RowMapping, delete, insert, select

from orchestrator.core.entities import Recipe
from orchestrator.core.learned import Learned, Load
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


def forget(connection: Connection, keys: Collection[str]) -> None:
    write_learned(connection, dict.fromkeys(keys))


def _to_learned(row: RowMapping) -> Learned:
    loads = tuple(Load(**load) for load in row["loads"])
    return Learned(Recipe(**row["recipe"]), row["card"], row["predicted_bytes"], loads, row["floor_bytes"])
