"""Commands of the command line, run in this process."""

from pathlib import Path

from typer.testing import CliRunner

from controlprefix.cli import app
from controlprefix.errors import ControlPrefixError


def run(folder: Path, *arguments: str) -> str:
    """Run a command in this process, with the store in `folder`; its errors are raised."""
    result = CliRunner(env={"CONTROLPREFIX_STORE": f"sqlite:///{folder}/prefixes.db"}).invoke(
        app, arguments
    )
    if isinstance(result.exception, ControlPrefixError):
        raise result.exception
    if result.exit_code == 2:  # the command line itself refused the arguments
        raise ControlPrefixError(" ".join(result.output.replace("│", " ").split()))
    assert result.exit_code == 0, result.output
    return result.output
