"""The tables, as SQLModel classes. `migrations/` builds the same ones; a test compares the two.

Columns that end in `_s` hold what the field of the same name holds: monotonic seconds, which mean
something only within the boot that wrote them, or a length of time. Columns that end in `_at` (and
`hold_until`) are wall time, in seconds since 1970.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Column, MetaData, Table
from sqlmodel import Field, SQLModel


def _json(*, nullable: bool = False, default: str | None = None) -> Column[Any]:
    return Column(JSON(none_as_null=True), nullable=nullable, server_default=default)


class MetaRow(SQLModel, table=True):
    """Facts about the database itself: the owner's id, the last boot, the first choice of engine."""

    __tablename__ = "meta"

    key: str = Field(primary_key=True)
    value: str


class ModelStateRow(SQLModel, table=True):
    """What users decided about a model; None where nothing was."""

    __tablename__ = "model_state"

    model: str = Field(primary_key=True)
    pinned: bool | None = None
    hold_until: float | None = None


class InstanceRow(SQLModel, table=True):
    """The current `lifecycle.Instance` of a model, field by field."""

    __tablename__ = "instance"

    model: str = Field(primary_key=True)
    state: str
    since_s: float
    failure: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    failures: int
    retry_at_s: float | None = None
    load_time_s: float
    unloads: list[str] = Field(sa_column=_json())
    unload_wanted: bool
    force: bool
    attempt: str | None = None
    placement: dict[str, int] = Field(sa_column=_json())
    parameters: dict[str, int] = Field(sa_column=_json(default="{}"))
    claimed_at_s: float
    started_at_s: float
    ready_at_s: float | None = None
    host: str | None = None
    port: int | None = None
    drained_for: str | None = None
    stop_reason: str | None = None
    is_failing: bool
    assumed_bytes: dict[str, int] = Field(sa_column=_json())
    gone_at_s: float | None = None
    held_bytes: dict[str, int] = Field(sa_column=_json())
    unexplained_before: dict[str, int] = Field(sa_column=_json())
    reclaim_measured_s: float


class AttemptRow(SQLModel, table=True):
    """One try at starting a model, kept after it ended. Exit code and log tail only of failures."""

    __tablename__ = "attempt"

    id: str = Field(primary_key=True)
    model: str = Field(index=True)
    state: str
    placement: dict[str, int] = Field(sa_column=_json())
    parameters: dict[str, int] = Field(sa_column=_json(default="{}"))
    claimed_at: float
    started_at: float | None = None
    ready_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    oom: bool = False
    reason: str | None = None
    log_tail: list[str] | None = Field(default=None, sa_column=_json(nullable=True))


class OperationRow(SQLModel, table=True):
    """A load or unload as a user sees it: `entities.Operation`."""

    __tablename__ = "operation"

    id: str = Field(primary_key=True)
    kind: str
    model: str
    created_at: float
    state: str
    message: str
    code: str | None = None
    freed_bytes: int
    ended_at: float | None = None


class DownloadRow(SQLModel, table=True):
    """A model whose files came, come or are to go by our own hand: `entities.Download`."""

    __tablename__ = "download"

    model: str = Field(primary_key=True)
    repo: str
    commit: str
    files: list[dict[str, Any]] = Field(sa_column=_json())
    path: str
    operation: str
    mmproj: str | None = None
    alias: str | None = None
    is_listed: bool
    state: str


class LearnedRow(SQLModel, table=True):
    """What loads have shown of one recipe on one kind of card: `learned.Learned`."""

    __tablename__ = "learned"

    key: str = Field(primary_key=True)
    recipe: dict[str, Any] = Field(sa_column=_json())
    card: str
    predicted_bytes: int
    loads: list[dict[str, Any]] = Field(sa_column=_json())
    floor_bytes: int


class EventRow(SQLModel, table=True):
    """A line of the event log. AUTOINCREMENT: an id is never given twice, also after pruning."""

    __tablename__ = "event"
    __table_args__ = {"sqlite_autoincrement": True}

    id: int | None = Field(default=None, primary_key=True)
    at: float
    kind: str
    text: str
    model: str | None = Field(default=None, index=True)
    attempt: str | None = None
    data: dict[str, Any] = Field(sa_column=_json())


class ApiKeyRow(SQLModel, table=True):
    """A `keys.Key`; its digest in hex. The key's own text is nowhere."""

    __tablename__ = "api_key"

    id: str = Field(primary_key=True)
    name: str = Field(unique=True)
    digest: str
    scopes: list[str] = Field(sa_column=_json())
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None


class SessionRow(SQLModel, table=True):
    """A `keys.Session`; its digest in hex."""

    __tablename__ = "session"

    digest: str = Field(primary_key=True)
    key_id: str
    expires_at: float


METADATA: MetaData = SQLModel.metadata


def table_of(row: type[SQLModel]) -> Table:
    """The SQLAlchemy table behind a row class, for core statements."""
    return METADATA.tables[str(row.__tablename__)]
