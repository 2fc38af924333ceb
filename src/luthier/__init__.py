"""Luthier: a self-hosted fine-tuning service, from raw data to a served and measured model.

The Python API is :mod:`luthier.workflows`, one function per thing a user can do.
"""

__version__ = "0.1.0"
