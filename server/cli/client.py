"""What the client commands share: where the server is, the key, and answers or plain error lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_FILE = Path("data/admin.key")

Url = Annotated[str, typer.Option("--url", envvar="DELTASERVE_URL", help="The server's address.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="DELTASERVE_API_KEY", help="Your key (default: ./data/admin.key, if readable)."
    ),
]

_SILENCE = 60.0  # seconds without an event, after which a stream counts as lost

console = Console(width=None if sys.stdout.isatty() else 200)  # in a pipe, nothing is cut


def fail(message: str) -> NoReturn:
    """Print a message and exit with 1."""
    typer.secho(message, err=True, fg="red")
    raise typer.Exit(1)


def find_key(key: str | None) -> str:
    """The key given, else that of a server started in this folder."""
    if key:
        return key
    if os.access(KEY_FILE, os.R_OK):
        return KEY_FILE.read_text().strip()
    fail(f"no key: give --key, set DELTASERVE_API_KEY, or run this where {KEY_FILE} is")


class Client:
    """One server, reached with one key."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self._url,
            headers={"authorization": f"Bearer {find_key(key)}"},
            timeout=httpx.Timeout(30.0, read=600.0, write=600.0),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The answer. An error of the server or of the network ends the command with its message and code
        1.
        """
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            fail(f"cannot reach {self._url}: {error}")
        if response.is_error:
            fail(_message(response))
        return response

    def json(self, method: str, path: str, **arguments: Any) -> Any:
        """As ``call``, the body parsed."""
        return self.call(method, path, **arguments).json()

    def state(self, path: str) -> Any:
        """As ``json`` of a GET, but raises httpx.TransportError where the server is away or cannot now."""
        response = self._http.get(path)
        _check(response)
        return response.json()

    def events(self, path: str, after: str | None = None) -> Iterator[dict[str, Any]]:
        """The objects of a stream of events, from behind the one with the id ``after``.

        An error of the server ends the command, unless it says that the server cannot now. Raises httpx.TransportError
        for that, for a connection that is lost, and for a server that is silent for a minute.
        """
        headers = {"accept": "text/event-stream"} | ({} if after is None else {"last-event-id": after})
        timeout = httpx.Timeout(30.0, read=_SILENCE)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in response.iter_lines():
                if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                    event: dict[str, Any] = json.loads(data)
                    if "error" in event:
                        raise httpx.NetworkError(str(event["error"].get("message")))
                    yield event

    def pages(self, path: str, key: str = "name") -> list[dict[str, Any]]:
        """All items of a list, whose names, or another ``key``, page through it."""
        items: list[dict[str, Any]] = []
        more = True
        while more:
            after = {"after": items[-1][key]} if items else {}
            page = self.json("GET", path, params={"limit": 100, **after})
            items += page["data"]
            more = page["has_more"] and bool(page["data"])
        return items


def _check(response: httpx.Response) -> None:
    """Raises httpx.NetworkError for an error that may pass; any other ends the command."""
    if response.status_code >= 500:
        raise httpx.NetworkError(_message(response))
    if response.is_error:
        fail(_message(response))


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        lines = [f"{error['message']} ({response.status_code} {error['code']})"]
        lines += [_bad_row(row) for row in error.get("rows", [])]
        if error.get("report_file"):
            lines.append(f"  all of them: GET /v1/files/{error['report_file']}/content")
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"


def _bad_row(row: dict[str, Any]) -> str:
    """A row of a dataset that cannot be used (``server.types.BadRow``)."""
    where = row["file"].replace("_", " ") + ("" if row["line"] is None else f", line {row['line']}")
    field = "" if row["field"] is None else f", {row['field']}"
    return f"  {where}{field}: {row['message']} ({row['code']})"
