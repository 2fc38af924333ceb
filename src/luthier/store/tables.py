"""The tables. A record that is only read back whole is one JSON column beside the columns that are searched."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("content_hash", sa.String, nullable=False),
    sa.Column("record", sa.JSON, nullable=False),
)

templates = sa.Table(
    "templates",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("content_hash", sa.String, nullable=False),
    sa.Column("record", sa.JSON, nullable=False),
)

base_models = sa.Table(
    "base_models",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("project", sa.String, nullable=False, server_default="default"),
    sa.Column("metadata", sa.JSON),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("result", sa.JSON),
    sa.Column("error", sa.Text),
    sa.Column("request", sa.String),
    sa.Column("owner", sa.String),
    sa.Column("lease_until", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
)

run_events = sa.Table(
    "run_events",
    metadata,
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("level", sa.String, nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)

# The end of a run that was announced (luthier.store.outbox); one that goes on and ends again is announced again.
announcements = sa.Table(
    "announcements",
    metadata,
    sa.Column("run_id", sa.String, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("finished_at", sa.Float, nullable=False),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("run_id", sa.String, nullable=False, unique=True),
    sa.Column("project", sa.String, nullable=False, server_default="default"),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("record", sa.JSON, nullable=False),
)

evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("model", sa.String, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("record", sa.JSON, nullable=False),
)

answers = sa.Table(
    "answers",
    metadata,
    sa.Column("evaluation_id", sa.String, sa.ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("example_id", sa.String, primary_key=True),
    sa.Column("contestant", sa.String, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("hash", sa.String, nullable=False, unique=True),
    sa.Column("record", sa.JSON, nullable=False),
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

# What the API keeps for projects (luthier.store.collection): files, batches, evals, completions …
objects = sa.Table(
    "objects",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String, nullable=False, unique=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("project", sa.String, nullable=False),
    sa.Column("parent", sa.String),
    sa.Column("status", sa.String),
    sa.Column("model", sa.String),
    sa.Column("created_at", sa.Integer, nullable=False),
    sa.Column("record", sa.JSON, nullable=False),
    sa.Index("objects_of_project", "kind", "project", "parent", "sequence"),
    sa.Index("objects_by_status", "kind", "status"),
)
