"""The Python API: one function per thing that a user can do."""
