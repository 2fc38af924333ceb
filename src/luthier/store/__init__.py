"""Database and artifacts: the only place that picks a path or opens a database."""
