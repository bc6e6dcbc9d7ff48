"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_meta()
    create_instance()
    create_attempt()
    create_operation()
    create_event()


def create_meta() -> None:
    op.create_table(
        "meta",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("value", sa.String(), nullable=False),
    )
    op.create_table(
        "model_state",
        sa.Column("model", sa.String(), primary_key=True),
        sa.Column("pinned", sa.Boolean()),
        sa.Column("hold_until", sa.Float()),
    )


def create_instance() -> None:
    op.create_table(
        "instance",
        sa.Column("model", sa.String(), primary_key=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("since_s", sa.Float(), nullable=False),
        sa.Column("failure", sa.JSON()),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("retry_at_s", sa.Float()),
        sa.Column("load_time_s", sa.Float(), nullable=False),
        sa.Column("unloads", sa.JSON(), nullable=False),
        sa.Column("unload_wanted", sa.Boolean(), nullable=False),
        sa.Column("force", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.String()),
        sa.Column("placement", sa.JSON(), nullable=False),
        sa.Column("claimed_at_s", sa.Float(), nullable=False),
        sa.Column("started_at_s", sa.Float(), nullable=False),
        sa.Column("ready_at_s", sa.Float()),
        sa.Column("host", sa.String()),
        sa.Column("port", sa.Integer()),
        sa.Column("drained_for", sa.String()),
        sa.Column("stop_reason", sa.String()),
        sa.Column("is_failing", sa.Boolean(), nullable=False),
        sa.Column("assumed_bytes", sa.JSON(), nullable=False),
        sa.Column("gone_at_s", sa.Float()),
        sa.Column("held_bytes", sa.JSON(), nullable=False),
        sa.Column("unexplained_before", sa.JSON(), nullable=False),
        sa.Column("reclaim_measured_s", sa.Float(), nullable=False),
    )


def create_attempt() -> None:
    op.create_table(
        "attempt",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("placement", sa.JSON(), nullable=False),
        sa.Column("claimed_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float()),
        sa.Column("ready_at", sa.Float()),
        sa.Column("ended_at", sa.Float()),
        sa.Column("exit_code", sa.Integer()),
        sa.Column("oom", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String()),
        sa.Column("log_tail", sa.JSON()),
    )
    op.create_index("ix_attempt_model", "attempt", ["model"])


def create_operation() -> None:
    op.create_table(
        "operation",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("code", sa.String()),
        sa.Column("freed_bytes", sa.Integer(), nullable=False),
        sa.Column("ended_at", sa.Float()),
    )


def create_event() -> None:
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("model", sa.String()),
        sa.Column("attempt", sa.String()),
        sa.Column("data", sa.JSON(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_event_model", "event", ["model"])
