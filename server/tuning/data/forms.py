"""What rows mean: which form a file has, and each row's input and target, checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.engine.templates import Template
from server.store.reference import shown
from server.tuning.data import chat
from server.tuning.data.chat import Chat
from server.tuning.data.problems import RowError
from server.tuning.data.rows import Row
from server.tuning.spec import Task

MESSAGES, COMPLETION, LABEL = "messages", "prompt and completion", "text and label"
SPANS, TAGS = "text and spans", "tokens and tags"
FORMS: dict[Task, tuple[str, ...]] = {
    "generate": (MESSAGES, COMPLETION, LABEL),
    "classify": (LABEL,),
    "regress": (LABEL,),
    "tag": (SPANS, TAGS),
}
LONGEST_LABEL = 256  # characters
_WHOLE = ("text", "prompt")  # keys that may stand for a template's only field


class Pair(NamedTuple):
    """A value for each of the template's fields, and what shall come out: a text, a label or a number.

    ``is_completion``: ``target`` goes on with the prompt as it is written.
    """

    values: dict[str, str]
    target: str | float
    is_completion: bool


class Tagged(NamedTuple):
    """A text and what is marked in it, in order: (first character, end, label). ``by_word``: a label for each word."""

    text: str
    marks: list[tuple[int, int, str]]
    by_word: bool


Item = Chat | Pair | Tagged


class Forms:
    """Reads the rows of one file, all of which must have the form of the first."""

    def __init__(self, task: Task, template: Template | None) -> None:
        self._task = task
        self._fields = ("text",) if template is None else template.fields
        self._form: str | None = None
        self._since = 0

    def read(self, row: Row) -> tuple[Item, list[str]]:
        """What the row means, and those of its keys that are not used. Raises RowError."""
        if row.error is not None:
            raise row.error
        form = self._form_of(row)
        values = row.values
        if form == MESSAGES:
            return chat.read(values), _unused(values, ("messages", *chat.EMPTY))
        if form in (COMPLETION, LABEL):
            return self._pair(values, form)
        if form == SPANS:
            return _spans(values), _unused(values, ("text", "spans"))
        return _tags(values), _unused(values, ("tokens", "tags"))

    def _form_of(self, row: Row) -> str:
        form = _form(row.values)
        taken = FORMS[self._task]
        if form is None:
            if self._form is None:
                raise RowError("unknown_format", f"the row has the keys of no format: {_or(taken)}")
            return self._form
        if form not in taken:
            raise RowError(
                "wrong_format", f"the row has {form}; a task of kind '{self._task}' learns from {_or(taken)}"
            )
        if self._form is None:
            self._form, self._since = form, row.line
        if form != self._form:
            raise RowError(
                "mixed_formats", f"the row has {form}; the file began with {self._form} at line {self._since}"
            )
        return form

    def _pair(self, values: Mapping[str, Any], form: str) -> tuple[Pair, list[str]]:
        name = "completion" if form == COMPLETION else "label"
        given: dict[str, str] = {}
        used = [name]
        for field in self._fields:
            key = field
            if len(self._fields) == 1 and field not in values:
                key = next((whole for whole in _WHOLE if whole in values), field)
            given[field] = text_of(values, key)
            used.append(key)
        target: str | float
        if self._task == "regress":
            target = _number(values)
        elif self._task == "classify":
            target = _label(values)
        else:
            target = text_of(values, name)
        return Pair(given, target, form == COMPLETION), _unused(values, used)


def text_of(values: Mapping[str, Any], key: str, field: str | None = None) -> str:
    """A row's text. Raises RowError where it is missing, no text, or empty."""
    field = field or key
    if key not in values or values[key] is None:
        raise RowError("missing_field", f"'{field}' is missing", field)
    value = values[key]
    if not isinstance(value, str):
        raise RowError("wrong_type", f"'{field}' must be a text", field)
    if not value:
        raise RowError("empty", f"'{field}' is empty", field)
    return value


def _form(values: Mapping[str, Any]) -> str | None:
    if "messages" in values:
        return MESSAGES
    if "completion" in values:
        return COMPLETION
    if "tokens" in values or "tags" in values:
        return TAGS
    if "spans" in values:
        return SPANS
    if "label" in values:
        return LABEL
    return COMPLETION if "prompt" in values else None


def _label(values: Mapping[str, Any]) -> str:
    value = values.get("label")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    label = text_of({"label": value}, "label").strip()
    if not 0 < len(label) <= LONGEST_LABEL:
        raise RowError("invalid_label", f"a label has 1 to {LONGEST_LABEL} characters", "label")
    return label


def _number(values: Mapping[str, Any]) -> float:
    value = values.get("label")
    if value is None:
        raise RowError("missing_field", "'label' is missing", "label")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("wrong_type", "'label' must be a finite number", "label")
    return number


def _spans(values: Mapping[str, Any]) -> Tagged:
    text = text_of(values, "text")
    given = values.get("spans", None)
    if not isinstance(given, list):
        raise RowError("wrong_type", "'spans' must be a list of {start, end, label}", "spans")
    marks: list[tuple[int, int, str]] = []
    for n, span in enumerate(given):
        if not isinstance(span, dict):
            raise RowError(
                "wrong_type", f"'spans[{n}]' must be an object {{start, end, label}}", f"spans[{n}]"
            )
        places = [span.get("start"), span.get("end")]
        start, end = (place if type(place) is int else -1 for place in places)
        if not 0 <= start < end <= len(text):
            message = f"'spans[{n}]' must have 0 <= start < end <= {len(text)}, in characters of the text"
            raise RowError("invalid_span", message, f"spans[{n}]")
        marks.append((start, end, text_of(span, "label", f"spans[{n}].label")))
    marks.sort()
    for before, mark in itertools.pairwise(marks):
        if mark[0] < before[1]:
            message = f"two spans overlap: {before[0]} to {before[1]}, and {mark[0]} to {mark[1]}"
            raise RowError("invalid_span", message, "spans")
    return Tagged(text, marks, by_word=False)


def _tags(values: Mapping[str, Any]) -> Tagged:
    """Words go into a text with a space between each two: this is what is served, too."""
    words, tags = (_texts(values, name) for name in ("tokens", "tags"))
    if len(words) != len(tags):
        raise RowError("length_mismatch", f"there are {len(words)} tokens and {len(tags)} tags", "tags")
    if not words:
        raise RowError("empty", "'tokens' is empty", "tokens")
    marks: list[tuple[int, int, str]] = []
    at = 0
    for word, tag in zip(words, tags, strict=True):
        marks.append((at, at + len(word), tag))
        at += len(word) + 1
    return Tagged(" ".join(words), marks, by_word=True)


def _texts(values: Mapping[str, Any], name: str) -> list[str]:
    given = values.get(name)
    if given is None:
        raise RowError("missing_field", f"'{name}' is missing", name)
    if not isinstance(given, list) or not all(isinstance(item, str) and item.strip() for item in given):
        hint = " (names, not numbers)" if name == "tags" else ""
        raise RowError("wrong_type", f"'{name}' must be a list of texts{hint}, none of them empty", name)
    return given


def _unused(values: Mapping[str, Any], used: Sequence[str]) -> list[str]:
    return [shown(key) for key in values if key not in used]


def _or(forms: Sequence[str]) -> str:
    return ", or ".join(forms)
