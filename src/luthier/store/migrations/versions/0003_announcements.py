"""Webhooks: which runs' ends are announced. Those that ended before are not announced any more."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of announcements, with every run that has ended."""
    op.create_table(
        "announcements",
        sa.Column("run_id", sa.String, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("finished_at", sa.Float, nullable=False),
    )
    op.execute(
        "INSERT INTO announcements (run_id, finished_at) SELECT id, finished_at FROM runs WHERE finished_at IS NOT NULL"
    )
