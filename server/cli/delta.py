"""``deltaserve delta push|ls|show|rm|alias|residency``."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from server.cli.client import DEFAULT_URL, Client, Key, Url, console, fail

app = typer.Typer(help="Upload and manage deltas.", no_args_is_help=True)

_PATH = "/v1/deltas"


@app.command()
def push(
    paths: Annotated[
        list[Path], typer.Argument(help="A delta's files, their folder, or an archive of them.")
    ],
    name: Annotated[str, typer.Option("--name", help="The delta's name.")],
    promote: Annotated[bool, typer.Option(help="Whether `live` moves to the new version.")] = True,
    public: Annotated[bool, typer.Option("--public", help="Let every tenant use it.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Upload a delta's files as a new version."""
    fields = {"name": name, "promote": str(promote).lower(), "visibility": "public" if public else "private"}
    with Client(url, key) as client, ExitStack() as opened:
        parts = [
            ("file", (path.name, opened.enter_context(path.open("rb")), "application/octet-stream"))
            for path in files_of(paths)
        ]
        response = client.call("POST", _PATH, data=fields, files=parts)
    delta = response.json()
    state = "created" if response.status_code == 201 else "already there"
    console.print(f"{delta['name']}@{delta['version']} {state}: {_kinds(delta)}, {_size(delta['bytes'])}")


@app.command("ls")
def list_deltas(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """List your deltas by their live versions."""
    with Client(url, key) as client:
        _print(client.pages(_PATH))


@app.command()
def show(name: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Show a delta's live version and list all of them."""
    with Client(url, key) as client:
        versions = client.json("GET", f"{_PATH}/{quote(name, safe='')}/versions")["data"]
        live = client.json("GET", f"{_PATH}/{quote(name, safe='')}")
    details = Table(show_header=False, box=None)
    for field in (
        "name",
        "version",
        "digest",
        "format",
        "backbone",
        "parameters",
        "rank",
        "status",
        "visibility",
    ):
        details.add_row(field, str(live[field]))
    details.add_row("methods", _kinds(live))
    details.add_row("sites", str(len(live["sites"])))
    for field, value in live["metadata"].items():
        details.add_row(f"metadata.{field}", value)
    console.print(details)
    _print(versions)


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="NAME for all of it, NAME@VERSION for one version.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Delete a delta, or one version of it."""
    base, at, version = name.partition("@")
    if at and not version.isdecimal():
        fail(f"'{version}' is not a version number; an alias cannot be deleted")
    with Client(url, key) as client:
        client.call("DELETE", f"{_PATH}/{quote(base, safe='')}" + (f"/versions/{version}" if at else ""))
    console.print(f"{name} deleted")


@app.command()
def alias(
    name: str,
    alias: Annotated[str, typer.Argument(help="The alias to set, such as `live`.")],
    version: int,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Point an alias at a version."""
    with Client(url, key) as client:
        client.call(
            "PUT",
            f"{_PATH}/{quote(name, safe='')}/aliases/{quote(alias, safe='')}",
            json={"version": version},
        )
    console.print(f"{name}@{alias} is now {name}@{version}")


@app.command()
def residency(
    name: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or NAME@ALIAS.")],
    tier: Annotated[str | None, typer.Option(help="Bring it to device, host or disk.")] = None,
    pin: Annotated[bool | None, typer.Option("--pin/--unpin", help="Keep it there, or let it go.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Show which tier a delta is in, or bring it to one."""
    path = f"{_PATH}/{quote(name, safe='@/')}/residency"
    with Client(url, key) as client:
        found = client.json("GET", path)
        if tier is not None or pin is not None:
            kept = found["pinned"] and tier != "disk" if pin is None else pin
            body = {"tier": tier or found["tier"], "pinned": kept}
            found = client.json("PUT", path, json=body)
    pinned = ", pinned" if found["pinned"] else ""
    console.print(
        f"{found['name']}@{found['version']}: {found['tier']}{pinned}, {_size(found['bytes'])}",
        soft_wrap=True,
    )


def files_of(paths: list[Path]) -> list[Path]:
    """The files meant: those given, and those in the folders given (not in folders below)."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")
            )
            if not inside:
                fail(f"{path} holds no files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            fail(f"{path} does not exist")
    return found


def _print(deltas: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("name", "version", "aliases", "methods", "rank", "size", "status", "created", "digest"):
        table.add_column(column)
    for delta in deltas:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(delta["created_at"]))
        table.add_row(
            delta["name"],
            str(delta["version"]),
            ", ".join(delta["aliases"]),
            _kinds(delta),
            "" if delta["rank"] is None else str(delta["rank"]),
            _size(delta["bytes"]),
            delta["status"],
            created,
            delta["digest"][:12],
        )
    console.print(table)


def _kinds(delta: dict[str, Any]) -> str:
    return " + ".join(delta["methods"])


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
