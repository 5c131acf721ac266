"""PEFT's name patterns (``rank_pattern``, ``alpha_pattern``), matched in bounded time.

There a pattern is a regular expression, searched as ``(.*\\.)?(pattern)$`` in a module's path. A client's
expression can take exponential time, so only a subset is read: literals, ``.``, ``\\.``, ``\\d``, ``\\w``,
simple character classes, ``^`` first, ``$`` last, few quantifiers. Nearly all real patterns are plain names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import shown
from deltas.methods.base import number

MAX_PATTERN = 256
MAX_PATTERNS = 4096
MAX_EXPRESSIONS = 16  # with a quantifier
MAX_QUANTIFIERS = 4
MAX_WIDE_QUANTIFIERS = 2  # each multiplies the time by the path's length

_LITERAL = re.compile(r"[A-Za-z0-9_.\-]+", re.ASCII)
_CLASS = r"\[(?:[A-Za-z0-9_]-[A-Za-z0-9_]|[A-Za-z0-9_])+\]"
_ATOM = re.compile(rf"(?P<narrow>\\d|\[0-9\]|\\\.|[A-Za-z0-9_\-])|(?P<wide>\.|\\w|{_CLASS})")
_QUANTIFIER = re.compile(r"[*+?]")


class Patterns:
    """One ``*_pattern`` object of a config: the value of the first pattern that matches a path."""

    def __init__(self, field: str, raw: object) -> None:
        if raw is None:
            raw = {}
        if not isinstance(raw, Mapping) or len(raw) > MAX_PATTERNS:
            raise InvalidDelta(f"{field} must be an object of at most {MAX_PATTERNS} patterns", field=field)
        self._entries = [(_compile(field, key), number(value, field)) for key, value in raw.items()]
        expressions = sum(1 for key in raw if _QUANTIFIER.search(key))
        if expressions > MAX_EXPRESSIONS:
            raise UnsupportedDelta(
                f"{field} has {expressions} patterns with quantifiers, the limit is {MAX_EXPRESSIONS}; "
                "use module names",
                field=field,
            )

    def get(self, path: str, default: float) -> float:
        """The value for a module's path."""
        for key, value in self._entries:
            if key.match(path) if isinstance(key, re.Pattern) else _names(key, path):
                return value
        return default


def _names(name: str, path: str) -> bool:
    """``(.*\\.)?(name)$`` for a plain name, in which ``.`` still stands for any character."""
    start = len(path) - len(name)
    if start < 0 or (start > 0 and path[start - 1] != "."):
        return False
    return all(wanted in (".", got) for wanted, got in zip(name, path[start:], strict=True))


def _compile(field: str, key: Any) -> str | re.Pattern[str]:
    if not isinstance(key, str) or not 0 < len(key) <= MAX_PATTERN:
        raise InvalidDelta(f"{field}: a pattern must be 1 to {MAX_PATTERN} characters", field=field)
    if _LITERAL.fullmatch(key):
        return key
    body = key.removeprefix("^").removesuffix("$")
    position = quantifiers = wide = 0
    while position < len(body):
        atom = _ATOM.match(body, position)
        if atom is None:
            raise UnsupportedDelta(
                f"{field}: {shown(key)} is beyond the regular expressions that are read; use module names",
                field=field,
            )
        position = atom.end()
        if _QUANTIFIER.match(body, position):
            position += 1
            quantifiers += 1
            wide += atom["wide"] is not None
    if quantifiers > MAX_QUANTIFIERS or wide > MAX_WIDE_QUANTIFIERS:
        raise UnsupportedDelta(f"{field}: {shown(key)} has too many quantifiers", field=field)
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error:
        raise InvalidDelta(f"{field}: {shown(key)} is not a regular expression", field=field) from None
