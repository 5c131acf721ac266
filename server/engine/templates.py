"""Templates: texts with fields, ``"{premise} ? [MASK], {hypothesis}"``. Data, never code.

``{name}`` is a field, ``{{`` and ``}}`` are braces; there is nothing else: no attributes, no indices, no formats. A
value is put in as it is and never read again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.errors import InvalidRequest
from server.types import CHAT_ROLES, TextPiece

DEFAULT = "{text}"
LONGEST = 65_536  # characters of all of a template's texts
_PART = re.compile(r"\{\{|\}\}|\{(?P<field>[A-Za-z_][A-Za-z0-9_]{0,63})\}|(?P<stray>[{}])")

Stored = str | list[str | dict[str, str]] | None


class Part(NamedTuple):
    """A piece of a template: its text, or the name of a field."""

    text: str
    is_field: bool


def parse(text: str, param: str = "template") -> tuple[Part, ...]:
    """A template's parts in their order. Raises InvalidRequest for a brace that is neither a field nor doubled."""
    parts: list[Part] = []
    literal, at = "", 0
    for match in _PART.finditer(text):
        literal += text[at : match.start()]
        at = match.end()
        if match["stray"]:
            raise InvalidRequest(
                f"Invalid '{param}': the brace at character {match.start()} begins no field like {{text}} (letters, "
                "digits and '_'); a brace itself is written twice.",
                param=param,
            )
        if match["field"] is None:
            literal += match[0][0]
            continue
        if literal:
            parts.append(Part(literal, False))
        parts.append(Part(match["field"], True))
        literal = ""
    literal += text[at:]
    if literal:
        parts.append(Part(literal, False))
    return tuple(parts)


@dataclass(frozen=True)
class Template:
    """One text, two (a pair), or with ``roles`` a chat: a text for each message."""

    texts: tuple[tuple[Part, ...], ...]
    roles: tuple[str, ...] = ()

    @classmethod
    def of(cls, stored: Stored) -> Template:
        """From a task's ``template``. Raises InvalidRequest naming it, and for one without fields."""
        if stored is None or isinstance(stored, str):
            found = cls((parse(DEFAULT if stored is None else stored),))
        else:
            messages = [item for item in stored if isinstance(item, dict)]
            roles = tuple(message["role"] for message in messages)
            texts = [item if isinstance(item, str) else item["content"] for item in stored]
            found = cls(tuple(parse(text) for text in texts), roles)
        if not found.fields:
            raise InvalidRequest(
                "Invalid 'template': it has no field, so every input would give the same; a field is written {text}.",
                param="template",
            )
        return found

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields' names, each once, in their order."""
        return tuple(dict.fromkeys(part.text for text in self.texts for part in text if part.is_field))

    @property
    def is_pair(self) -> bool:
        return len(self.texts) == 2 and not self.roles

    def with_literals(self, change: Callable[[str], str]) -> Template:
        """With ``change`` applied to what stands between the fields."""
        texts = tuple(
            tuple(part if part.is_field else Part(change(part.text), False) for part in text)
            for text in self.texts
        )
        return replace(self, texts=texts)

    def pieces(self, values: Mapping[str, str]) -> list[list[TextPiece]]:
        """The texts with these values in them."""
        return [_filled(text, values) for text in self.texts]

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """A chat's messages with these values in them, as a backbone's chat template takes them."""
        contents = ["".join(piece.text for piece in text) for text in self.pieces(values)]
        return [
            {"role": CHAT_ROLES[role], "content": content}
            for role, content in zip(self.roles, contents, strict=True)
        ]


def _filled(text: Sequence[Part], values: Mapping[str, str]) -> list[TextPiece]:
    return [TextPiece(values[part.text] if part.is_field else part.text, not part.is_field) for part in text]
