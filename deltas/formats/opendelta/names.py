"""Which modules a config's ``modified_modules`` mean, by OpenDelta's own rules, in bounded time.

A name means every module whose path, or common name where ``common_structure`` is set, ends with it at a dot. A name
that starts with ``[r]`` is a regular expression, searched in the path; a client's can take exponential time, so only
a subset is read, and the others decide nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltas.errors import InvalidDelta, UnsupportedDelta
from deltas.formats.header import shown
from deltas.formats.opendelta.modules import TABLED, Module
from deltas.sites import BackboneSpec

MAX_NAMES = 4096
MAX_LENGTH = 256
MAX_EXPRESSIONS = 16
MAX_QUANTIFIERS = 4

_MARK = "[r]"
_NARROW = r"(?:\\d|\[0-9\]|\\\.|[A-Za-z0-9_,@-])"
_CHOICE = r"\((?:[A-Za-z0-9_.]|\\\.)+(?:\|(?:[A-Za-z0-9_.]|\\\.)+)*\)"
_CLASS = r"\[(?:[A-Za-z0-9_]-[A-Za-z0-9_]|[A-Za-z0-9_])+\]"
# possessive: "[0-9]" is read in two ways, and trying both for each of fifty takes for ever
_READ = re.compile(rf"\^?(?:{_NARROW}[*+?]?|{_CHOICE}|(?:\.|\\w|{_CLASS})[*+?]?)*+\$?", re.ASCII)
_QUANTIFIED = re.compile(r"[*+?]")
_WIDE = re.compile(
    r"(?:(?<!\\)\.|\\w|\])[*+?]"
)  # one is enough: each multiplies the time by the path's length


@dataclass(frozen=True)
class Names:
    """The names of one config. ``certain`` is False where an expression among them could not be read."""

    plain: tuple[str, ...]
    expressions: tuple[re.Pattern[str], ...]
    excluded: tuple[str, ...]
    common: bool
    certain: bool = True
    order: tuple[str, ...] = field(default=())

    @staticmethod
    def of(config: Mapping[str, Any], spec: BackboneSpec) -> Names:
        """Raises :class:`InvalidDelta` for what is no list of names, :class:`UnsupportedDelta` for common names of a
        family that OpenDelta has none for."""
        names = _strings(config, "modified_modules")
        if not names:
            raise InvalidDelta("modified_modules names no module", field="modified_modules")
        common = config.get("common_structure")
        if common not in (None, True, False):
            raise InvalidDelta("common_structure must be true or false", field="common_structure")
        if common and spec.family not in TABLED:
            raise UnsupportedDelta(
                f"OpenDelta has no common names for {spec.family}: common_structure must be off",
                field="common_structure",
            )
        expressions = [_compiled(name.removeprefix(_MARK)) for name in names if name.startswith(_MARK)]
        if len(expressions) > MAX_EXPRESSIONS:
            raise UnsupportedDelta(
                f"modified_modules has more than {MAX_EXPRESSIONS} regular expressions; use module names",
                field="modified_modules",
            )
        return Names(
            plain=tuple(name for name in names if not name.startswith(_MARK)),
            expressions=tuple(expression for expression in expressions if expression is not None),
            excluded=tuple(_strings(config, "exclude_modules")),
            common=bool(common),
            certain=None not in expressions,
            order=tuple(names),
        )

    def mean(self, module: Module) -> bool:
        """Is the module among those named? Without ``certain``, only if a name that could be read says so."""
        if any(module.path.startswith(start) for start in self.excluded):
            return False
        name = module.common if self.common else module.path
        return any(_ends(name, end) for end in self.plain) or any(
            _found(name, expression) for expression in self.expressions
        )

    def unmet(self, modules: Iterable[Module]) -> list[str]:
        """The plain names that mean none of these modules."""
        names = [module.common if self.common else module.path for module in modules]
        return [end for end in self.plain if not any(_ends(name, end) for name in names)]


def _ends(name: str, end: str) -> bool:
    return name.endswith(end) and (name == end or name[-len(end) - 1] == ".")


def _found(name: str, expression: re.Pattern[str]) -> bool:
    """OpenDelta looks at the first match only: it must end where the name does, and begin at a dot."""
    match = expression.search(name)
    if match is None or match.end() != len(name):
        return False
    return match.start() == 0 or (bool(match.group()) and name[match.start() - 1] == ".")


def _compiled(body: str) -> re.Pattern[str] | None:
    if not _READ.fullmatch(body):
        return None
    if len(_QUANTIFIED.findall(body)) > MAX_QUANTIFIERS or len(_WIDE.findall(body)) > 1:
        return None
    try:
        return re.compile(body)
    except re.error:
        raise InvalidDelta(
            f"modified_modules: {shown(body)} is not a regular expression", field="modified_modules"
        ) from None


def _strings(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key)
    if value is None:
        return []
    if (
        not isinstance(value, list)
        or len(value) > MAX_NAMES
        or not all(isinstance(name, str) and 0 < len(name) <= MAX_LENGTH for name in value)
    ):
        raise InvalidDelta(
            f"{key} must be a list of at most {MAX_NAMES} names of 1 to {MAX_LENGTH} characters", field=key
        )
    return value
