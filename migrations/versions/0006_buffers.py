"""Loads that were learned may have `buffers` in their JSON; a program from before cannot read these."""

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No table changes: rows without `buffers` stay as they are."""
