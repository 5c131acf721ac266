"""Names as users write them: checked, and taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.errors import InvalidRequest
from server.types import LIVE

_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_ALIAS = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_REFERENCE = re.compile(
    rf"(?:(?P<tenant>{_TENANT.pattern})/)?(?P<name>{_NAME.pattern})"
    rf"(?:@(?:(?P<version>{_VERSION.pattern})|(?P<alias>{_ALIAS.pattern})))?"
)
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class Reference:
    """A delta as a request names it. ``tenant`` None: the caller's own; ``version`` None: by ``alias``."""

    tenant: str | None
    name: str
    version: int | None
    alias: str


def parse_reference(text: str) -> Reference | None:
    """``NAME``, ``NAME@3``, ``NAME@ALIAS``, also as ``TENANT/NAME...``; None when it is none of these."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    version = match["version"]
    return Reference(
        tenant=match["tenant"],
        name=match["name"],
        version=int(version) if version else None,
        alias=match["alias"] or LIVE,
    )


def is_tenant(text: str) -> bool:
    """Whether the text could be a tenant's name."""
    return _TENANT.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether the text could be a delta's or a task's name."""
    return _NAME.fullmatch(text) is not None


def is_alias(text: str) -> bool:
    """Whether the text could be an alias."""
    return _ALIAS.fullmatch(text) is not None


def check_tenant(text: str, param: str = "name") -> str:
    """The tenant's name, or InvalidRequest."""
    return _check(
        _TENANT, text, param, "a tenant's name has 1 to 63 of a-z, 0-9 and '-', and begins with no '-'"
    )


def check_name(text: str, param: str = "name") -> str:
    """The delta's name, or InvalidRequest."""
    rule = "a delta's name has 1 to 128 of A-Z, a-z, 0-9, '_', '.' and '-', and begins with a letter or digit"
    return _check(_NAME, text, param, rule)


def check_task(text: str, param: str = "name") -> str:
    """The task's name, or InvalidRequest."""
    rule = "a task's name has 1 to 128 of A-Z, a-z, 0-9, '_', '.' and '-', and begins with a letter or digit"
    return _check(_NAME, text, param, rule)


def check_alias(text: str, param: str = "alias") -> str:
    """The alias, or InvalidRequest."""
    rule = "an alias has 1 to 64 of a-z, 0-9, '_', '.' and '-', and begins with a letter"
    return _check(_ALIAS, text, param, rule)


def shown(text: str) -> str:
    """The text as an error message quotes it."""
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "...")


def _check(pattern: re.Pattern[str], text: str, param: str, rule: str) -> str:
    if pattern.fullmatch(text) is None:
        raise InvalidRequest(f"{shown(text)}: {rule}", param=param)
    return text
