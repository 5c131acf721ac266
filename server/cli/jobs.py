"""``deltaserve jobs ls|show|follow|pause|resume|cancel``."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from server.cli import follow as following
from server.cli.client import DEFAULT_URL, Client, Key, Url, console

app = typer.Typer(help="Tuning jobs: list, follow and steer them.", no_args_is_help=True)

Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's id: ftjob-...")]


@app.command("ls")
def list_jobs(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """List your jobs, newest first."""
    with Client(url, key) as client:
        jobs = client.pages(following.PATH, "id")
    table = Table("id", "status", "step", "model", "created")
    for job in jobs:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        table.add_row(job["id"], job["status"], _step(job), job["fine_tuned_model"] or "", created)
    console.print(table)


@app.command()
def show(job: Job, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Print a job's object."""
    with Client(url, key) as client:
        typer.echo(json.dumps(client.json("GET", _path(job)), indent=2))


@app.command()
def follow(job: Job, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Show a job's events until it has ended. Ctrl-C leaves it alone."""
    with Client(url, key) as client:
        following.follow(client, url, job)


@app.command()
def pause(job: Job, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let a job rest, after a checkpoint."""
    _ask(job, "pause", url, key)


@app.command()
def resume(job: Job, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let a paused job go on."""
    _ask(job, "resume", url, key)


@app.command()
def cancel(job: Job, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """End a job."""
    _ask(job, "cancel", url, key)


def _ask(job: str, what: str, url: str, key: str | None) -> None:
    with Client(url, key) as client:
        found = client.json("POST", f"{_path(job)}/{what}")
    pausing = (found.get("progress") or {}).get("pausing")
    console.print(f"{job} is {found['status']}" + (", and will be paused" if pausing else ""), soft_wrap=True)


def _path(job: str) -> str:
    return f"{following.PATH}/{quote(job, safe='')}"


def _step(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    return f"{progress['step']}/{progress['steps']}" if progress.get("steps") else ""
