"""The rows of downloads. They are few and change seldom: a row is replaced whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import Connection, RowMapping, delete, insert, select

from orchestrator.core.entities import Download, DownloadState, HubFile, ModelId
from orchestrator.store.tables import DownloadRow, table_of

DOWNLOAD = table_of(DownloadRow)


def write_downloads(connection: Connection, changed: Mapping[ModelId, Download | None]) -> None:
    """None is a row that goes."""
    for model, download in changed.items():
        connection.execute(delete(DOWNLOAD).where(DOWNLOAD.c.model == model))
        if download is not None:
            row = {**asdict(download), "state": download.state.value}
            connection.execute(insert(DOWNLOAD).values(row))


def read_downloads(connection: Connection) -> dict[ModelId, Download]:
    rows = connection.execute(select(DOWNLOAD)).mappings()
    return {row["model"]: _to_download(row) for row in rows}


def _to_download(row: RowMapping) -> Download:
    files = tuple(HubFile(**file) for file in row["files"])
    return Download(**{**row, "files": files, "state": DownloadState(row["state"])})
