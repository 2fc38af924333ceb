"""The service: projects, keys, aliases, and the things that the API keeps."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Give runs and models a project, and make the tables of keys, aliases and objects."""
    for table in ("runs", "models"):
        op.add_column(table, sa.Column("project", sa.String, nullable=False, server_default="default"))
    op.add_column("runs", sa.Column("metadata", sa.JSON))
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("record", sa.JSON, nullable=False),
    )
    op.create_table(
        "aliases",
        sa.Column("project", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "objects",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("project", sa.String, nullable=False),
        sa.Column("parent", sa.String),
        sa.Column("status", sa.String),
        sa.Column("model", sa.String),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
    )
    op.create_index("objects_of_project", "objects", ["kind", "project", "parent", "sequence"])
    op.create_index("objects_by_status", "objects", ["kind", "status"])
