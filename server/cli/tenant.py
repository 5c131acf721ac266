"""``deltaserve tenant ...`` and ``deltaserve keys ...``, with the admin key."""

from __future__ import annotations

import json
import time
from typing import Annotated
from urllib.parse import quote

import typer
from rich.table import Table

from server.cli.client import DEFAULT_URL, Client, Key, Url, console, fail

app = typer.Typer(help="Manage tenants (admin key).", no_args_is_help=True)
keys = typer.Typer(help="Manage a tenant's keys (admin key).", no_args_is_help=True)

_PATH = "/v1/tenants"


@app.command()
def create(
    name: str,
    limit: Annotated[list[str] | None, typer.Option("--limit", help="LIMIT=NUMBER; may be repeated.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Make a tenant; its first key is printed this once."""
    limits = dict(_limit(item) for item in limit or [])
    with Client(url, key) as client:
        made = client.json("POST", _PATH, json={"name": name, "limits": limits})
    console.print(f"tenant {made['name']} created; its key, shown this once:")
    typer.echo(made["key"])


@app.command("ls")
def list_tenants(url: Url = DEFAULT_URL, key: Key = None) -> None:
    """List tenants."""
    with Client(url, key) as client:
        tenants = client.pages(_PATH)
    table = Table("name", "created", "limits")
    for tenant in tenants:
        table.add_row(tenant["name"], _time(tenant["created_at"]), json.dumps(tenant["limits"]))
    console.print(table)


@app.command()
def rm(name: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Delete a tenant with its keys and deltas."""
    with Client(url, key) as client:
        client.call("DELETE", f"{_PATH}/{quote(name, safe='')}")
    console.print(f"tenant {name} deleted")


@keys.command("create")
def create_key(tenant: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Make one more key of a tenant; it is printed this once."""
    with Client(url, key) as client:
        made = client.json("POST", f"{_PATH}/{quote(tenant, safe='')}/keys")
    console.print(f"key {made['id']} of {tenant}, shown this once:")
    typer.echo(made["key"])


@keys.command("ls")
def list_keys(tenant: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """List a tenant's keys, without their secrets."""
    with Client(url, key) as client:
        found = client.json("GET", f"{_PATH}/{quote(tenant, safe='')}/keys")["data"]
    table = Table("id", "ends in", "created")
    for item in found:
        table.add_row(item["id"], item["hint"], _time(item["created_at"]))
    console.print(table)


@keys.command("rm")
def revoke_key(tenant: str, key_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Revoke a key."""
    with Client(url, key) as client:
        client.call("DELETE", f"{_PATH}/{quote(tenant, safe='')}/keys/{quote(key_id, safe='')}")
    console.print(f"key {key_id} revoked")


def _limit(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        fail(f"'{text}' is not LIMIT=NUMBER" if equals else f"'{text}' has no value: give LIMIT=NUMBER")


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
