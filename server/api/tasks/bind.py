"""From a task to the way in which this backbone, with the delta that the model's name means now, runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from server.api import kinds
from server.api.errors import first_problem
from server.api.models import Target
from server.api.schemas import Prioritised
from server.api.schemas_tasks import CutParameters, EmbedParameters, GenerateParameters, LikelihoodParameters
from server.api.services import Backbone
from server.api.tasks.encoded import Embed
from server.api.tasks.generated import CHOICES, MAX_CHOICES, Generate, Likelihood
from server.api.tasks.heads import HeadClass, HeadTags, HeadValue
from server.api.tasks.masks import MaskedClass
from server.api.tasks.ways import Way
from server.engine.templates import Template
from server.errors import InvalidRequest, UnsupportedTask
from server.types import Task


def bind(task: Task, backbone: Backbone, target: Target) -> Way[Any]:
    """The way that runs the task.

    Raises UnsupportedTask where the backbone or the delta is not made for its kind, InvalidRequest (``template``,
    ``labels``) for a definition that does not fit it.
    """
    template = Template.of(task.template)
    if backbone.spec.kind == "encoder":
        return _on_an_encoder(task, template, backbone, target)
    return _on_a_decoder(task, template, backbone, target)


def _on_an_encoder(task: Task, template: Template, backbone: Backbone, target: Target) -> Way[Any]:
    if template.roles:
        _refuse(
            "template",
            f"'{backbone.info.name}' is an encoder and takes no chat: give a text, or two for a pair",
        )
    match task.kind:
        case "embed":
            _without_labels(task)
            return Embed(template, EmbedParameters)
        case "regress":
            _without_labels(task)
            kinds.head_of(target, ("regress",))
            return HeadValue(template, CutParameters, target.model)
        case "classify" if isinstance(task.labels, dict):
            if "head" not in backbone.spec.sites:
                raise UnsupportedTask(
                    f"The checkpoint of '{backbone.info.name}' has no masked-language-model head, so it expects no "
                    "words at a mask: use a delta with a task head, and labels that are a list or none."
                )
            return MaskedClass.of(template, task.labels, backbone.tokenizer)
        case "classify":
            return HeadClass(template, CutParameters, target.model, _names(task.labels, target, "classify"))
        case "tag":
            if task.template is not None:
                _refuse("template", "a task of kind 'tag' has none: spans are places in the input itself")
            return HeadTags(template, CutParameters, target.model, _names(task.labels, target, "tag"))
        case _:
            raise UnsupportedTask(
                f"'{backbone.info.name}' is an encoder ({backbone.spec.family}); tasks of kind '{task.kind}' need a "
                "backbone that generates.",
                param="kind",
            )


def _on_a_decoder(task: Task, template: Template, backbone: Backbone, target: Target) -> Way[Any]:
    if task.kind not in ("generate", "score", "classify"):
        raise UnsupportedTask(
            f"'{backbone.info.name}' generates text ({backbone.spec.family}); tasks of kind '{task.kind}' need an "
            "encoder.",
            param="kind",
        )
    kinds.without_head(target)
    if template.is_pair:
        _refuse(
            "template", f"'{backbone.info.name}' generates text and takes no pair: give a text, or a chat"
        )
    if task.kind == "generate":
        _without_labels(task)
        return Generate(template, GenerateParameters)
    choices = None if task.labels is None else _choices(task.labels)
    if task.kind == "classify" and choices is None:
        _refuse("labels", "classification by likelihood needs the labels, or an object of each label's text")
    if task.kind == "score" and CHOICES in template.fields:
        _refuse("template", f"'{CHOICES}' is where an input brings its choices, and can be no field")
    return Likelihood(template, LikelihoodParameters, choices, task.kind == "classify")


def parameters_of(way: Way[Any], *given: Mapping[str, Any] | None) -> Prioritised:
    """The way's parameters, later ones over earlier ones. Raises InvalidRequest naming the field."""
    values: dict[str, Any] = {}
    for some in given:
        values |= some or {}
    try:
        found: Prioritised = way.parameters.model_validate(values)
    except ValidationError as error:
        problem = first_problem(list(error.errors(include_url=False)))
        raise InvalidRequest(problem.message, param=f"parameters.{problem.param}") from error
    return found


def _names(
    labels: Sequence[str] | Mapping[str, Sequence[str]] | None, target: Target, kind: str
) -> Sequence[str] | None:
    """The labels of a head of this kind: the task's, else the delta's own."""
    own = kinds.head_of(target, (kind,))[1]
    if isinstance(labels, Mapping):
        _refuse("labels", "a head's labels are a list of names, in the order of its outputs")
    if labels is not None and own is not None and len(labels) != len(own):
        _refuse("labels", f"the delta's head has {len(own)} outputs, and {len(labels)} labels are given")
    return labels or own


def _choices(labels: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, str]:
    if not isinstance(labels, Mapping):
        labels = {label: [label] for label in labels}
    if len(labels) > MAX_CHOICES:
        _refuse("labels", f"by likelihood there are at most {MAX_CHOICES}")
    for label, texts in labels.items():
        if len(texts) != 1:
            _refuse("labels", f"by likelihood a label has one text, '{label}' has {len(texts)}")
    return {label: texts[0] for label, texts in labels.items()}


def _without_labels(task: Task) -> None:
    if task.labels is not None:
        _refuse("labels", f"a task of kind '{task.kind}' has none")


def _refuse(field: str, why: str) -> NoReturn:
    raise InvalidRequest(f"Invalid '{field}': {why}.", param=field)
