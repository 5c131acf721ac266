"""From a row's meaning to what the backbone reads: the tokens that serving makes of the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from server.engine.templates import Template
from server.errors import InvalidRequest, UnsupportedTask
from server.store.reference import shown
from server.tuning.data import chat
from server.tuning.data.chat import Chat, Learnable
from server.tuning.data.forms import Item, Pair, Tagged
from server.tuning.data.problems import RowError
from server.tuning.data.tagging import IGNORED, Scheme
from server.tuning.data.tokenizer import Tokenizer
from server.tuning.spec import Example, Task
from server.types import EncodedText, TextPiece

Kind = Literal["decoder", "encoder", "encoder-decoder"]

NOTES = {
    "truncated": "longer than 'max_length' tokens: the end was cut",
    "split": "conversations in which the chat template writes earlier turns in another way: one example for each turn",
    "span_inside_word": "spans that begin or end inside a word of the tokenizer: all of the word is labelled",
}


class Encoded(NamedTuple):
    """A row's examples (more than one only for conversations), and which of NOTES are true of it."""

    examples: list[Example]
    notes: list[str]


class Encoder:
    """Encodes the rows of a job. ``limit``: most tokens of an example, of its target too. ``inferred``: the labels are
    those of the training file.

    Raises UnsupportedTask and InvalidRequest (``template``) for what does not fit the backbone.
    """

    def __init__(
        self,
        kind: Kind,
        task: Task,
        template: Template | None,
        labels: Sequence[str] | None,
        tokenizer: Tokenizer,
        limit: int,
        *,
        inferred: bool = False,
    ) -> None:
        _check(kind, task, template)
        self._kind = kind
        self._task = task
        self._template = template
        self._form = template or Template.of(None)
        self._tokenizer = tokenizer
        self._limit = limit
        self._labels = labels
        self._inferred = inferred
        self._numbers = {label: n for n, label in enumerate(labels or ())}
        self._scheme = Scheme(labels or ()) if task == "tag" else None

    def encode(self, item: Item) -> Encoded:
        """Raises RowError."""
        try:
            if isinstance(item, Tagged):
                return self._tagged(item)
            if isinstance(item, Chat):
                return self._chat(item)
            return self._completed(item) if self._task == "generate" else self._labelled(item)
        except InvalidRequest as error:
            raise RowError("invalid_text", error.message) from error

    def check(self, item: Item) -> None:
        """Raises RowError for a label that is none of the labels."""
        unknown = None
        if isinstance(item, Tagged) and self._scheme is not None:
            unknown = self._scheme.unknown(item)
        elif isinstance(item, Pair) and isinstance(item.target, str) and self._labels is not None:
            unknown = None if item.target in self._numbers else (item.target, "label")
        if unknown is not None:
            label, field = unknown
            where = "not in the training file" if self._inferred else "none of 'labels'"
            raise RowError("unknown_label", f"the label {shown(label)} is {where}", field)

    def _labelled(self, item: Pair) -> Encoded:
        if self._form.roles:
            ids = self._tokenizer.render(self._form.messages(item.values), None)
            text = EncodedText(ids[: self._limit], None, [])
            cut = len(ids) > self._limit
        else:
            text, cut = self._text(self._form.pieces(item.values))
        label = self._numbers[item.target] if isinstance(item.target, str) else item.target
        return _noted([self._example(text, label)], truncated=cut)

    def _tagged(self, item: Tagged) -> Encoded:
        if self._scheme is None:
            raise RowError("wrong_format", "marked texts are for tasks of kind 'tag'")
        text, cut = self._text([[TextPiece(item.text, False)]])
        numbers, inside = self._scheme.numbers(item, text.words)
        if all(number == IGNORED for number in numbers):
            raise RowError("nothing_to_learn", "the text has no word with a label", "text")
        return _noted([self._example(text, numbers)], truncated=cut, span_inside_word=inside)

    def _completed(self, item: Pair) -> Encoded:
        target = str(item.target)
        if self._kind == "encoder-decoder":
            source, cut = self._source(item.values)
            return _noted(*self._answered([(source, target)], cut))
        prompt = self._prompt(item.values)
        if not item.is_completion:
            target = self._behind(item.values) + target
        tokens = [*prompt, *self._completion(target)]
        return _noted(*self._learnt([Learnable(tokens, [(len(prompt), len(tokens))])]))

    def _chat(self, item: Chat) -> Encoded:
        if self._kind == "encoder-decoder":
            turns = chat.source_and_answer(item, self._tokenizer)
            cut = any(len(source) > self._limit for source, _ in turns)
            answered = [(source[: self._limit], answer) for source, answer in turns]
            return _noted(*self._answered(answered, cut), split=len(turns) > 1)
        rows = chat.render(item, self._tokenizer)
        return _noted(*self._learnt(rows), split=len(rows) > 1)

    def _learnt(self, rows: Sequence[Learnable]) -> tuple[list[Example], bool]:
        """Rows cut at the limit, without those of which nothing is left to learn, and whether any was cut."""
        limit = self._limit
        examples = []
        for row in rows:
            learn = [(start, min(end, limit)) for start, end in row.learn if start < limit]
            if learn:
                examples.append(Example(tokens=row.tokens[:limit], learn=learn))
        if not examples:
            message = f"the prompt has {rows[0].learn[0][0]} tokens and 'max_length' is {limit}: nothing is left to learn"
            raise RowError("completion_cut", message)
        return examples, any(len(row.tokens) > limit for row in rows)

    def _answered(self, rows: Sequence[tuple[list[int], str]], cut: bool) -> tuple[list[Example], bool]:
        """Sources with their answers, which the decoder reads behind its start token."""
        examples = []
        for source, answer in rows:
            if not source:
                raise RowError("empty", "the prompt has no tokens")
            target = self._completion(answer)
            cut = cut or len(target) > self._limit
            examples.append(Example(tokens=source, target=target[: self._limit]))
        return examples, cut

    def _completion(self, text: str) -> list[int]:
        """Tokens without control tokens around them, as choices are scored; then the end token."""
        ids = self._tokenizer.encode_pieces([[TextPiece(text, False)]], None, False).ids
        if not ids:
            raise RowError("empty", "what is to be learnt has no tokens")
        end = self._tokenizer.end_token
        return ids if end is None else [*ids, end]

    def _prompt(self, values: dict[str, str]) -> list[int]:
        """As ``/v1/completions`` reads a prompt, or a task an input."""
        if self._template is None:
            ids = self._tokenizer.encode(values["text"])
        elif self._form.roles:
            ids = self._tokenizer.render(self._form.messages(values), None)
        else:
            ids = self._tokenizer.encode_pieces(self._form.pieces(values)).ids
        if not ids:
            raise RowError("empty", "the prompt has no tokens")
        return ids

    def _source(self, values: dict[str, str]) -> tuple[list[int], bool]:
        """A prompt for an encoder, cut where it is too long; its control tokens stay."""
        ids = self._prompt(values)
        if len(ids) <= self._limit:
            return ids, False
        if self._template is None:
            return self._tokenizer.encode_within(values["text"], self._limit), True
        if self._form.roles:
            return ids[: self._limit], True
        return self._tokenizer.encode_pieces(self._form.pieces(values), self._limit).ids, True

    def _behind(self, values: dict[str, str]) -> str:
        """What separates a prompt and the label behind it."""
        if self._form.roles:
            return ""
        prompt = "".join(piece.text for piece in self._form.pieces(values)[0])
        return "" if prompt[-1:].isspace() else " "

    def _text(self, pieces: Sequence[Sequence[TextPiece]]) -> tuple[EncodedText, bool]:
        text = self._tokenizer.encode_pieces(pieces)
        if len(text.ids) > self._limit:
            return self._tokenizer.encode_pieces(pieces, self._limit), True
        if not text.ids:
            raise RowError("empty", "the text has no tokens")
        return text, False

    def _example(self, text: EncodedText, label: int | float | list[int]) -> Example:
        types = text.types if self._kind == "encoder" and text.types is not None and any(text.types) else []
        return Example(tokens=text.ids, label=label, types=types)


def _noted(examples: list[Example], truncated: bool, **notes: bool) -> Encoded:
    return Encoded(examples, [name for name, true in {"truncated": truncated, **notes}.items() if true])


def _check(kind: Kind, task: Task, template: Template | None) -> None:
    if kind == "encoder" and task == "generate":
        raise UnsupportedTask(
            "the backbone is an encoder and generates no text: a job's task is 'classify', 'regress' or 'tag'",
            param="task",
        )
    if template is None:
        return
    why = None
    if task == "tag":
        why = "a task of kind 'tag' has none: spans are places in the text itself"
    elif template.is_pair and kind != "encoder":
        why = "the backbone generates text and takes no pair: give a text, or a chat"
    elif template.roles and kind == "encoder":
        why = "the backbone is an encoder and takes no chat: give a text, or two for a pair"
    if why is not None:
        raise InvalidRequest(f"Invalid 'template': {why}.", param="template")
