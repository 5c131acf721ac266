"""What a running server can be asked: its backbone, deltas and tasks, as targets of the load generator."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from server.bench.plan import PATHS, STREAMED, Target, Task
from server.bench.prompts import WORDS
from server.cli.client import Client, fail

_CLASSIFIES = ("classify", "regress")


def backbone_of(client: Client) -> dict[str, Any]:
    """The backbone's entry of ``/v1/models``: ``id``, and ``kind``, one of decoder, encoder and encoder-decoder."""
    models = client.json("GET", "/v1/models")["data"]
    backbone: dict[str, Any] = next(model for model in models if model["parent"] is None)
    return backbone


def prompt_tokens_of(client: Client) -> list[int]:
    """Token ids that ordinary text is made of, in the backbone's own vocabulary."""
    body = {"prompt": " ".join(WORDS), "add_special_tokens": False}
    return sorted(set(client.json("POST", "/tokenize", json=body)["tokens"]))


def find_targets(
    client: Client, backbone: dict[str, Any], names: list[str], endpoints: list[str], tasks: list[str]
) -> list[Target]:
    """The models named, or without names and tasks all that are ready, the backbone last; then the tasks.

    A model is asked through those of ``endpoints`` that it has. One that was named and has none of them is asked all the
    same, and so is a name that is not in the list of deltas (another tenant's, a sum, a typing error): the server answers.
    """
    for endpoint in endpoints:
        if endpoint not in PATHS:
            fail(f"--endpoint: '{endpoint}' is none of {', '.join(PATHS)}")
    deltas = {delta["name"]: delta for delta in client.pages("/v1/deltas")}
    encoder = backbone["kind"] == "encoder"
    targets = []
    for name in names:
        delta = {} if name == backbone["id"] else deltas.get(name.partition("@")[0])
        possible = _endpoints(encoder, delta, endpoints)
        targets.append(Target(name, _kind(name, delta), possible or tuple(endpoints) or _default(encoder)))
    if not names and not tasks:
        ready = [delta for delta in deltas.values() if delta["status"] == "ready"]
        for name, delta in [*((delta["name"], delta) for delta in ready), (backbone["id"], {})]:
            if possible := _endpoints(encoder, delta, endpoints):
                targets.append(Target(name, _kind(name, delta), possible))
        if not targets:
            fail(
                f"no model of this server has {' or '.join(endpoints)}: its backbone is of kind {backbone['kind']}"
            )
    return targets + [_task(client, name) for name in tasks]


def _kind(name: str, delta: dict[str, Any] | None) -> str:
    """The delta's methods; ``base`` of the backbone (no fields), ``sum`` and ``unlisted`` of what no list has."""
    if delta is None:
        return "sum" if "+" in name or "*" in name else "unlisted"
    return "+".join(delta["methods"]) if delta else "base"


def _default(encoder: bool) -> tuple[str, ...]:
    return ("embeddings",) if encoder else ("completions",)


def _endpoints(encoder: bool, delta: dict[str, Any] | None, wanted: list[str]) -> tuple[str, ...]:
    """Those of ``wanted`` that a model has; the best one it has where nothing is wanted. None for what is not known."""
    if delta is None:
        return ()
    head = delta.get("task_kind")
    has: tuple[str, ...]
    if not encoder:
        has = () if head else STREAMED
    elif head in _CLASSIFIES:
        has = ("classify", "embeddings")
    else:
        has = ("embeddings",)
    return tuple(name for name in wanted if name in has) if wanted else has[:1]


def _task(client: Client, name: str) -> Target:
    task = client.json("GET", f"/v1/tasks/{quote(name, safe='')}")
    (example,) = task["example"]["request"]["inputs"]
    return Target(task["model"], "task", (f"task {name}",), Task(quote(name, safe=""), task["kind"], example))
