"""``deltaserve tune``: from a file of examples to a served delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from server.cli.bench_targets import backbone_of
from server.cli.client import DEFAULT_URL, Client, Key, Url, console, fail
from server.cli.follow import PATH, follow


def command(
    file: Annotated[
        Path, typer.Argument(help="Examples to train on: JSONL, or CSV with the header text,label.")
    ],
    name: Annotated[str, typer.Option("--name", help="The delta's name.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD or METHOD:OPTION=VALUE,..., as lora:rank=16,targets=q+v; repeated: these train together. "
            "Default: lora, or none with --init-from."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="generate, classify, regress or tag. Default: classify on an encoder, else generate."
        ),
    ] = None,
    valid: Annotated[Path | None, typer.Option(help="Examples to validate on.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of the one method.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak. Default: the method's own.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens; longer examples are cut.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="A,B,...: in the order of the outputs. Default: those of FILE, sorted.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='The text around the fields of a row, as "{premise} -> {hypothesis}".')
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model to tune. Default: the backbone.")] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="An earlier delta to begin with: frozen beside --method, else continued."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Evaluations without an improvement until training stops.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the files and say what it would take.")
    ] = False,
    follow_it: Annotated[bool, typer.Option("--follow", help="Show the job until it has ended.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Upload a file, make a tuning job of it, and, with --follow, show the job until its delta is served."""
    methods = [_method(text) for text in method or []]
    if rank is not None:
        methods = methods or [{"method": "lora"}]
        if len(methods) > 1:
            fail("--rank is for one --method; with several, write METHOD:rank=N")
        methods[0]["rank"] = rank
    delta = {
        "name": name,
        "task": task,
        "methods": methods or None,
        "labels": None if labels is None else [label.strip() for label in labels.split(",")],
        "template": template,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "init_from": init_from,
        "early_stopping": None if patience is None else {"patience": patience},
    }
    chosen = {"n_epochs": epochs, "batch_size": batch_size}
    with Client(url, key) as client:
        model = base or backbone_of(client)["id"]
        body = {
            "model": model,
            "seed": seed,
            "delta": _given(delta),
            "method": {"type": "supervised", "supervised": {"hyperparameters": _given(chosen)}},
            "training_file": _upload(client, file),
            "validation_file": None if valid is None else _upload(client, valid),
            "dry_run": dry_run or None,
        }
        made = client.json("POST", PATH, json=_given(body))
        if dry_run:
            _print_plan(made)
            return
        console.print(f"{made['id']} is {made['status']}", soft_wrap=True)
        if follow_it:
            follow(client, url, made["id"])
        else:
            typer.echo(f"deltaserve jobs follow {made['id']}")


def _upload(client: Client, path: Path) -> str:
    try:
        with path.open("rb") as opened:
            parts = {"file": (path.name, opened, "application/octet-stream")}
            found: str = client.json("POST", "/v1/files", data={"purpose": "fine-tune"}, files=parts)["id"]
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    return found


def _method(text: str) -> dict[str, Any]:
    """``lora:rank=16,targets=q+v`` as the job's entry: values are JSON where they can be, texts where not."""
    name, _, given = text.partition(":")
    entry: dict[str, Any] = {"method": name}
    for item in filter(None, given.split(",")):
        option, equals, value = item.partition("=")
        if not equals:
            fail(f"--method: '{item}' is not OPTION=VALUE")
        entry[option] = value.split("+") if option == "targets" else _value(value)
    return entry


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _print_plan(plan: dict[str, Any]) -> None:
    """What a job would be, and what is odd about its files."""
    table = Table(show_header=False, box=None)
    for name, value in plan.items():
        if isinstance(value, int | float | str):
            table.add_row(name.replace("_", " "), str(value))
    if labels := plan.get("delta", {}).get("labels"):
        table.add_row("labels", ", ".join(labels))
    console.print(table)
    for warning in plan.get("warnings", []):
        lines = ", ".join(map(str, warning["lines"]))
        typer.echo(
            f"{warning['file']}: {warning['count']} x {warning['message']}"
            + (f" (lines {lines})" if lines else "")
        )
