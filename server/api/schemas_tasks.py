"""Bodies of the routes of tasks, each kind's parameters, and ``/score``. Strict, as in ``schemas.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag, field_validator, model_validator

from server.api.schemas import MAX_INPUTS, Prioritised, SamplingFields, Strict
from server.types import TaskKind

MAX_LABELS = 1024
MAX_WORDS = 256  # that stand for one label
MAX_MESSAGES = 64  # of a template
LONGEST_TEXT = 65_536

Label = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
Words = Annotated[list[Label], Field(min_length=1, max_length=MAX_WORDS)]


class TemplateMessage(Strict):
    """One message of a chat template."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


def _template_form(value: Any) -> str:
    if not isinstance(value, list):
        return "str"
    return "list[message]" if any(isinstance(item, dict) for item in value) else "list[str]"


def _labels_form(value: Any) -> str:
    return "dict[str]" if isinstance(value, dict) else "list[str]"


# The form decides which arm of a union is tried, so that an error names the field and not the arm.
AnyTemplate = Annotated[
    Annotated[Text, Tag("str")]
    | Annotated[list[Text], Field(min_length=2, max_length=2), Tag("list[str]")]
    | Annotated[list[TemplateMessage], Field(max_length=MAX_MESSAGES), Tag("list[message]")],
    Discriminator(_template_form),
]
AnyLabels = Annotated[
    Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS), Tag("list[str]")]
    | Annotated[dict[Label, Words], Field(min_length=1, max_length=MAX_LABELS), Tag("dict[str]")],
    Discriminator(_labels_form),
]


def stored_template(
    template: str | list[str] | list[TemplateMessage] | None,
) -> str | list[str | dict[str, str]] | None:
    """A template as it is stored."""
    if template is None or isinstance(template, str):
        return template
    return [item if isinstance(item, str) else item.model_dump() for item in template]


class TaskRequest(Strict):
    """``POST /v1/tasks``.

    ``template`` is a text, two texts (a pair), or messages. ``labels`` that are an object come out with a list of words
    for each.
    """

    name: Annotated[str, Field(min_length=1, max_length=256)]
    kind: TaskKind
    model: Annotated[str, Field(min_length=1, max_length=1024)]
    template: AnyTemplate | None = None
    labels: AnyLabels | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {label: [words] if isinstance(words, str) else words for label, words in value.items()}
        if isinstance(value, list) and len({str(item) for item in value}) < len(value):
            raise ValueError("a label is there twice")
        return value

    def stored_template(self) -> str | list[str | dict[str, str]] | None:
        """As a task keeps it."""
        return stored_template(self.template)


class InferRequest(Strict):
    """``POST /v1/tasks/{name}/infer``. Each input is looked at by itself: a bad one fails alone."""

    inputs: Annotated[list[Any], Field(min_length=1, max_length=MAX_INPUTS)]
    parameters: dict[str, Any] | None = None


class CutParameters(Prioritised):
    """Of every kind on an encoder. ``truncate_prompt_tokens`` as in ``/v1/embeddings``."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be -1 or at least 1")
        return value


class EmbedParameters(CutParameters):
    """Of ``embed``: None is what the backbone's files say."""

    pooling: Literal["mean", "cls", "max"] | None = None
    normalize: bool | None = None


class LikelihoodParameters(Prioritised):
    """Of ``score``, and of ``classify`` by likelihood: a choice's tokens' log-probabilities added up, or their mean."""

    normalize: Literal["sum", "mean"] | None = None


class GenerateParameters(SamplingFields):
    """Of ``generate``."""

    @field_validator("max_tokens")
    @classmethod
    def _some(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be at least 1")
        return value


class ScoreRequest(CutParameters):
    """``POST /score``, as vLLM has it: one text against one or many, or lists of one length, pair by pair."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    text_1: Annotated[
        list[Text],
        Field(
            min_length=1, max_length=MAX_INPUTS, validation_alias=AliasChoices("text_1", "queries", "data_1")
        ),
    ]
    text_2: Annotated[
        list[Text],
        Field(
            min_length=1,
            max_length=MAX_INPUTS,
            validation_alias=AliasChoices("text_2", "documents", "items", "data_2"),
        ),
    ]
    use_activation: bool | None = None
    user: str | None = None

    @field_validator("text_1", "text_2", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _pairs(self) -> ScoreRequest:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise ValueError("'text_1' is one text, or as many as 'text_2'")
        return self
