"""The inputs of a task's call: a value for each of its template's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import InvalidRequest
from server.store.reference import shown


def values_of(item: Any, fields: Sequence[str]) -> dict[str, str]:
    """An input's value for each field. Raises InvalidRequest for one that does not fit them."""
    if isinstance(item, str):
        if len(fields) != 1:
            raise _bad(f"The input is a text, and the task has the fields {_listed(fields)}: give an object.")
        item = {fields[0]: item}
    if not isinstance(item, dict):
        raise _bad("An input is a text, or an object of texts.")
    for field in fields:
        if field not in item:
            raise _bad(f"The input lacks the field '{field}'.")
        if not isinstance(item[field], str) or not item[field]:
            raise _bad(f"The input's field '{field}' must be a text that is not empty.")
    if unknown := item.keys() - set(fields):
        raise _bad(f"The input has the field {shown(min(unknown))}; the task has {_listed(fields)}.")
    return item


def _listed(fields: Sequence[str]) -> str:
    return ", ".join(f"'{field}'" for field in fields)


def _bad(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="inputs")
