"""A model → an endpoint."""
