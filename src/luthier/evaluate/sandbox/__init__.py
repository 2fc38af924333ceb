"""A process that can do nothing but compute: where the code of users runs (docs/decisions/0007-sandbox.md)."""
