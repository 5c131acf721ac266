"""A task as answers show it: its definition, the JSON schemas of an input and of an output, and a call to copy."""

from __future__ import annotations

import json
import shlex
from typing import Any

from server.api.tasks.generated import CHOICES
from server.engine.templates import Template
from server.types import Task

_TEXT = {"type": "string", "minLength": 1}
_NUMBER = {"type": "number"}
_NUMBERS = {"type": "object", "additionalProperties": _NUMBER}

OUTPUTS: dict[str, dict[str, Any]] = {
    "generate": {"text": {"type": "string"}, "finish_reason": {"enum": ["stop", "length"]}},
    "classify": {"label": {"type": "string"}, "score": _NUMBER, "scores": _NUMBERS},
    "regress": {"value": _NUMBER},
    "score": {"choice": {"type": "string"}, "scores": _NUMBERS},
    "embed": {"embedding": {"type": "array", "items": _NUMBER}},
    "tag": {
        "spans": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "start": {"type": "integer"},
                    "end": {"type": "integer"},
                    "label": {"type": "string"},
                    "score": _NUMBER,
                },
                "required": ["start", "end", "label", "score"],
            },
        }
    },
}
_ERROR = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}


def brief(task: Task) -> dict[str, Any]:
    """The definition."""
    return {
        "id": task.name,
        "object": "task",
        "name": task.name,
        "kind": task.kind,
        "model": task.model,
        "template": task.template,
        "labels": task.labels,
        "parameters": task.parameters,
        "created_at": task.created_at,
    }


def full(task: Task, base_url: str) -> dict[str, Any]:
    """The definition with schemas and an example. ``base_url`` is the server's, ending in a slash."""
    body = {"inputs": [_example(task)]}
    url = f"{base_url}v1/tasks/{task.name}/infer"
    curl = (
        f'curl {shlex.quote(url)} -H "Authorization: Bearer $DELTASERVE_API_KEY" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
    return {
        **brief(task),
        "input": _input(task),
        "output": _output(task),
        "example": {"request": body, "curl": curl},
    }


def _input(task: Task) -> dict[str, Any]:
    fields = Template.of(task.template).fields
    properties: dict[str, Any] = dict.fromkeys(fields, _TEXT)
    required = [*fields]
    if task.kind == "score":
        properties[CHOICES] = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}
        required += [CHOICES] if task.labels is None else []
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return {"anyOf": [_TEXT, schema]} if len(required) == 1 else schema


def _output(task: Task) -> dict[str, Any]:
    properties = OUTPUTS[task.kind]
    output = {"type": "object", "properties": properties, "required": [*properties]}
    return {"anyOf": [output, _ERROR]}


def _example(task: Task) -> Any:
    fields = Template.of(task.template).fields
    choices = task.kind == "score" and task.labels is None
    if len(fields) == 1 and not choices:
        return "some text"
    given: dict[str, Any] = {field: f"some {field}" for field in fields}
    return given | ({CHOICES: ["one", "another"]} if choices else {})
