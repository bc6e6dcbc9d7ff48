"""With which parameters an attempt runs, where its model leaves that to us."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("instance", "attempt"):
        op.add_column(table, sa.Column("parameters", sa.JSON(), nullable=False, server_default="{}"))
