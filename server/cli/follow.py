"""Following a tuning job until it has ended: a progress bar on a terminal, lines anywhere else."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol
from urllib.parse import quote

import httpx
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.cli.client import DEFAULT_URL, Client, console, fail

PATH = "/v1/fine_tuning/jobs"
ENDED = frozenset({"succeeded", "failed", "cancelled"})

_LINES = 50  # of steps, at most about, where there is no terminal
_PATIENCE = 300.0  # seconds for which a server may be away
_WAITS = (0.2, 0.5, 1.0, 2.0, 5.0)
_INTERRUPTED = 130  # as a shell has it

# What a request to the new delta looks like: path, and the body beside the model.
_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/v1/completions", {"prompt": "..."}),
    "classify": ("/classify", {"input": "..."}),
    "regress": ("/classify", {"input": "..."}),
}


class View(Protocol):
    """What shows a job's events."""

    def message(self, event: dict[str, Any]) -> None: ...

    def step(self, event: dict[str, Any], step: int, steps: int) -> None: ...


def follow(client: Client, url: str, job: str) -> None:
    """Show a job's events from its first until it has ended, then what came of it.

    A lost connection is taken up where it broke off. Ends the command with 1 if the job failed or was cancelled, or the
    server stays away; with 130 on Ctrl-C, which leaves the job alone.
    """
    try:
        with _view() as view:
            for event in _events(client, job):
                _show(view, event)
    except KeyboardInterrupt:
        _leave(url, job)
    report(client.json("GET", f"{PATH}/{quote(job, safe='')}"), url)


def report(job: dict[str, Any], url: str) -> None:
    """Say what came of a job that has ended. Ends the command with 1 if it made nothing."""
    if job["status"] == "failed":
        error = job["error"] or {"message": "no reason is known", "code": "unknown"}
        fail(f"{job['id']} failed: {error['message']} ({error['code']})")
    if job["status"] != "succeeded":
        fail(f"{job['id']} is {job['status']}")
    model = job["fine_tuned_model"]
    task = (job.get("delta") or {}).get("task", "generate")
    console.print(f"{job['id']} succeeded: the model is [bold]{escape(model)}[/bold]", soft_wrap=True)
    if job["result_files"]:
        console.print(f"metrics: GET /v1/files/{job['result_files'][0]}/content", soft_wrap=True)
    if task in _CALLS:
        path, body = _CALLS[task]
        text = shlex.quote(json.dumps({"model": model, **body}))
        typer.echo(
            f'curl {shlex.quote(url.rstrip("/") + path)} -H "Authorization: Bearer $DELTASERVE_API_KEY" '
            f"-H 'Content-Type: application/json' -d {text}"
        )


def _events(client: Client, job: str) -> Iterator[dict[str, Any]]:
    """The job's events, each once, whatever happens to connections, until it has ended."""
    path = f"{PATH}/{quote(job, safe='')}"
    last: str | None = None
    away: float | None = None  # since when
    tries = 0
    while True:
        problem = "it closes the stream of a job that goes on"
        try:
            for event in client.events(f"{path}/events", last):
                last, away, tries = event["id"], None, 0
                yield event
            if client.state(path)["status"] in ENDED:
                return
        except httpx.TransportError as error:
            problem = str(error)
        now = time.monotonic()
        away = now if away is None else away
        if now - away > _PATIENCE:
            fail(f"the server is away ({problem}); the job may go on: deltaserve jobs follow {job}")
        time.sleep(_WAITS[min(tries, len(_WAITS) - 1)])
        tries += 1


def _show(view: View, event: dict[str, Any]) -> None:
    data = event.get("data") or {}
    if event.get("type") == "metrics" and "total_steps" in data:
        view.step(event, int(data["step"]), int(data["total_steps"] or 0))
    else:
        view.message(event)


def _leave(url: str, job: str) -> NoReturn:
    option = "" if url == DEFAULT_URL else f" --url {shlex.quote(url)}"
    console.print(f"\n{job} goes on. To see it again, or to end it:", soft_wrap=True)
    typer.echo(f"  deltaserve jobs follow {job}{option}\n  deltaserve jobs cancel {job}{option}")
    raise typer.Exit(_INTERRUPTED)


@contextmanager
def _view() -> Iterator[View]:
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress)


class Lines:
    """One line for each message, and for some fifty of the steps."""

    def __init__(self) -> None:
        self._next = 0

    def message(self, event: dict[str, Any]) -> None:
        """As it came."""
        typer.echo(_line(event))

    def step(self, event: dict[str, Any], step: int, steps: int) -> None:
        """If one is due; the last one is."""
        if step >= self._next or step == steps:
            self._next = step + max(1, steps // _LINES)
            typer.echo(_line(event))


class Bar:
    """A bar with the newest loss, messages above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def message(self, event: dict[str, Any]) -> None:
        """Above the bar."""
        self._progress.console.print(escape(_line(event)), soft_wrap=True, highlight=False)

    def step(self, event: dict[str, Any], step: int, steps: int) -> None:
        """Move the bar."""
        loss = (event.get("data") or {}).get("train_loss")
        shown = "" if loss is None else f"loss {loss:.4f}"
        if self._task is None:
            self._task = self._progress.add_task("", total=steps or None, loss=shown)
        self._progress.update(self._task, completed=step, total=steps or None, loss=shown)


def _line(event: dict[str, Any]) -> str:
    level = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{time.strftime('%H:%M:%S', time.localtime(event['created_at']))} {level}{event['message']}"
