"""What runs on a backbone that generates: prompts from templates, texts, and choices ranked by their likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.api import encoding, prompts
from server.api.completions import DEFAULT_MAX_TOKENS
from server.api.generation import Generation, Row
from server.api.schemas import Prioritised
from server.api.schemas_tasks import GenerateParameters, LikelihoodParameters
from server.api.services import Backbone
from server.api.tasks.heads import ranked
from server.api.tasks.inputs import values_of
from server.api.tasks.ways import Call, Outcome, Output, Way, side_by_side
from server.errors import ContextTooLong, InvalidRequest
from server.store.reference import shown
from server.types import TextPiece

P = TypeVar("P", bound=Prioritised)

MOST_ROWS = 256  # of one call that wait or run at a time
MAX_CHOICES = MOST_ROWS  # of one row
CHOICES = "choices"


class GeneratedWay(Way[P]):
    """Makes prompts of inputs by the template: text, or a chat by the backbone's own chat template."""

    async def check(self, backbone: Backbone, parameters: P) -> None:
        del parameters
        if self.template.roles:
            try:
                await self._given(backbone, dict.fromkeys(self.template.fields, "x"))
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"Invalid 'template': {error.message}", param="template", code=error.code
                ) from error

    async def _start(self, backbone: Backbone, item: Any) -> prompts.Start:
        """Where an input's row begins."""
        given = await self._given(backbone, values_of(item, self.template.fields))
        return prompts.start(given, backbone, "inputs")

    async def _given(self, backbone: Backbone, values: Mapping[str, str]) -> list[int]:
        if self.template.roles:
            return await prompts.render(backbone.tokenizer, self.template.messages(values))
        return (await prompts.encode_pieces(backbone.tokenizer, self.template.pieces(values))).ids


class Generate(GeneratedWay[GenerateParameters]):
    """``generate``: a text for each input."""

    async def check(self, backbone: Backbone, parameters: GenerateParameters) -> None:
        await super().check(backbone, parameters)
        prompts.sampling(parameters, backbone, max_tokens=1, copy=0, logprobs=None)

    async def run(self, call: Call, inputs: Sequence[Any], parameters: GenerateParameters) -> list[Outcome]:
        return await side_by_side(inputs, partial(self._one, call, parameters), MOST_ROWS)

    async def _one(self, call: Call, parameters: GenerateParameters, item: Any) -> Output:
        backbone, chat = call.backbone, bool(self.template.roles)
        start = await self._start(backbone, item)
        wanted = parameters.max_tokens or (start.room if chat else DEFAULT_MAX_TOKENS)
        row = Row(
            0,
            start.prompt,
            prompts.sampling(parameters, backbone, max_tokens=min(wanted, start.room), copy=0, logprobs=None),
            parameters.stop or (),
            continues=not chat and not start.source,
            source=start.source,
        )
        call.prompt_tokens += len(row.given)
        generation = Generation(
            call.engine, backbone.tokenizer, call.metrics, call.turn, call.target.delta, call.started
        )
        (piece,) = await generation.collect([row])
        call.completion_tokens += len(piece.token_ids)
        return {"text": piece.text, "finish_reason": piece.finish_reason}


@dataclass(frozen=True)
class Likelihood(GeneratedWay[LikelihoodParameters]):
    """``score``, and ``classify`` by likelihood: how likely is each choice's text behind the prompt?

    A choice's text is tokenized by itself, without control tokens. ``choices`` are the task's, by name; None where
    every input brings its own. ``as_classes``: probabilities over the choices instead of log-likelihoods.
    """

    choices: Mapping[str, str] | None
    as_classes: bool

    async def check(self, backbone: Backbone, parameters: LikelihoodParameters) -> None:
        await super().check(backbone, parameters)
        for text in (self.choices or {}).values():
            await _tokens(backbone, text, "labels")

    async def run(self, call: Call, inputs: Sequence[Any], parameters: LikelihoodParameters) -> list[Outcome]:
        known = {text: await _tokens(call.backbone, text, "labels") for text in (self.choices or {}).values()}
        widest = max((len(item[CHOICES]) for item in inputs if _brings_choices(item)), default=len(known))
        most = MOST_ROWS // min(max(widest, len(known), 1), MAX_CHOICES)
        return await side_by_side(inputs, partial(self._one, call, parameters, known), most)

    async def _one(
        self, call: Call, parameters: LikelihoodParameters, known: Mapping[str, list[int]], item: Any
    ) -> Output:
        choices, item = self._choices(item)
        start = await self._start(call.backbone, item)
        own = choices is self.choices
        tokens = [
            known[text] if own else await _tokens(call.backbone, text, "inputs") for text in choices.values()
        ]
        if (longest := max(map(len, tokens))) > start.room:
            raise ContextTooLong(
                f"The longest choice has {longest} tokens, and behind the prompt there is room for {start.room}.",
                param="inputs",
            )
        used = len(start.source or start.prompt) + sum(map(len, tokens))
        call.prompt_tokens += used
        call.metrics.prompt_accepted(call.turn.tenant, used)
        found = await call.engine.score(
            prompt=start.prompt,
            choices=tokens,
            delta=call.target.delta,
            turn=call.turn,
            source=start.source,
        )
        scores = [sum(line) / (len(line) if parameters.normalize == "mean" else 1) for line in found]
        if self.as_classes:
            return ranked([*choices], encoding.softmax(scores))
        best = max(range(len(scores)), key=scores.__getitem__)
        return {"choice": [*choices][best], "scores": dict(zip(choices, scores, strict=True))}

    def _choices(self, item: Any) -> tuple[Mapping[str, str], Any]:
        """The choices of an input, and the input without them."""
        if self.as_classes or not isinstance(item, dict) or CHOICES not in item:
            if self.choices is None:
                raise InvalidRequest(
                    "The input brings no 'choices', and the task has no labels.", param="inputs"
                )
            return self.choices, item
        given = item[CHOICES]
        if (
            not _brings_choices(item)
            or not 0 < len(given) <= MAX_CHOICES
            or not all(isinstance(text, str) and text for text in given)
            or len(set(given)) < len(given)
        ):
            raise InvalidRequest(
                f"The input's 'choices' must be 1 to {MAX_CHOICES} different texts, none of them empty.",
                param="inputs",
            )
        return dict(zip(given, given, strict=True)), {k: v for k, v in item.items() if k != CHOICES}


def _brings_choices(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get(CHOICES), list)


async def _tokens(backbone: Backbone, text: str, param: str) -> list[int]:
    """A choice's. The task's own may spell control tokens, an input's may not."""
    pieces = [[TextPiece(text, param == "labels")]]
    found = (await prompts.encode_pieces(backbone.tokenizer, pieces, add_special_tokens=False)).ids
    if not found:
        raise InvalidRequest(f"The choice {shown(text)} has no tokens.", param=param)
    return found
