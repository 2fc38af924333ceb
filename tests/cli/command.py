"""The command line, called as a user calls it."""

from __future__ import annotations

from typer.testing import CliRunner

from luthier.cli.main import app


def run(*arguments: str) -> str:
    """Return what a command that succeeds prints."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
