"""Options of a method that is trained: their names, defaults and checks, in one table that the documentation repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltas.errors import InvalidDelta
from deltas.methods.base import number

MAX_TEXT = 16_384

Check = Callable[[object, str], Any]
"""Takes a value and the option's name; returns it in canonical form (JSON), or raises ``InvalidDelta`` naming it."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option. A ``default`` of None stands for what ``meaning`` says; None may then be given too."""

    name: str
    default: Any
    check: Check
    meaning: str


def complete(given: Mapping[str, Any], known: Iterable[Option], method: str) -> dict[str, Any]:
    """Every option with its value or default. Raises ``InvalidDelta``, ``field`` naming the option, for what is not known
    or has another type or size than it may have."""
    table = {option.name: option for option in known}
    for name in given:
        if name not in table:
            there = f"its options are {', '.join(sorted(table))}" if table else "it has none"
            raise InvalidDelta(f"{method} has no option {ascii(name)[:100]}; {there}", field=str(name))
    found: dict[str, Any] = {}
    for name, option in table.items():
        value = given.get(name, option.default)
        optional = option.default is None and value is None
        found[name] = None if optional else option.check(value, name)
    return found


def count(least: int, most: int) -> Check:
    """An integer from ``least`` to ``most``."""

    def check(value: object, name: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise InvalidDelta(f"{name} must be an integer from {least} to {most}", field=name)
        return value

    return check


def real(least: float, most: float, *, open_below: bool = False) -> Check:
    """A number from ``least`` to ``most``; ``open_below``: more than ``least``."""

    def check(value: object, name: str) -> float:
        found = number(value, name)
        if not least <= found <= most or (open_below and found == least):
            limits = f"above {least:g} and at most" if open_below else f"from {least:g} to"
            raise InvalidDelta(f"{name} must be a number {limits} {most:g}", field=name)
        return found

    return check


def one_of(*known: str) -> Check:
    """One of these names."""

    def check(value: object, name: str) -> str:
        if not isinstance(value, str) or value not in known:
            raise InvalidDelta(f"{name} must be one of {', '.join(known)}", field=name)
        return value

    return check


def flag(value: object, name: str) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise InvalidDelta(f"{name} must be true or false", field=name)
    return value


def strings(value: object, name: str) -> list[str]:
    """A list of one or more different strings."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise InvalidDelta(f"{name} must be a list of strings", field=name)
    if len(set(value)) < len(value):
        raise InvalidDelta(f"{name} has a string twice", field=name)
    return list(value)


def text(value: object, name: str) -> str:
    """A text of a character or more, and of ``MAX_TEXT`` at most."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
        raise InvalidDelta(f"{name} must be a text of 1 to {MAX_TEXT:,} characters", field=name)
    return value


def token_ids(value: object, name: str) -> list[int]:
    """A list of one or more token ids."""
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        raise InvalidDelta(f"{name} must be a list of token ids", field=name)
    return list(value)
