"""The ``deltaserve`` command."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from server.cli import bench, delta, jobs, serve, tenant, tune

app = typer.Typer(
    name="deltaserve",
    help="One frozen backbone, hundreds of tenants' deltas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve", help="Run the server.")(serve.command)
app.command("bench", help="Send requests to a running server and print what was measured.")(bench.command)
app.command("tune", help="Train a delta on a file of examples.")(tune.command)
app.add_typer(delta.app, name="delta")
app.add_typer(jobs.app, name="jobs")
app.add_typer(tenant.app, name="tenant")
app.add_typer(tenant.keys, name="keys")


def _version(asked: bool) -> None:
    if not asked:
        return
    try:
        number = version("deltaserve")
    except PackageNotFoundError:
        number = "(run from a source tree: not installed, hence no version)"
    typer.echo(f"deltaserve {number}")
    raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del show_version


def main() -> None:
    """Entry point."""
    app()
