"""Models that were downloaded through the orchestrator."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "download",
        sa.Column("model", sa.String(), primary_key=True),
        sa.Column("repo", sa.String(), nullable=False),
        sa.Column("commit", sa.String(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("operation", sa.String(), nullable=False),
        sa.Column("mmproj", sa.String()),
        sa.Column("alias", sa.String()),
        sa.Column("is_listed", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
    )
