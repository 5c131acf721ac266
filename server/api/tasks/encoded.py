"""What runs on an encoder: each input is one row, and every row of a call goes to the engine at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from server.api import encoding, prompts
from server.api.schemas_tasks import CutParameters, EmbedParameters
from server.api.services import Backbone
from server.api.tasks.inputs import values_of
from server.api.tasks.ways import Call, Outcome, Output, Way, of_the_row
from server.errors import DeltaserveError
from server.types import EncodedText, EncoderInput, Vector, Want

C = TypeVar("C", bound=CutParameters)


@dataclass(frozen=True)
class Encoded:
    """One row: the input's values, the text that the template made of them, and what the engine made of it."""

    values: dict[str, str]
    text: EncodedText
    vector: Vector


class EncodedWay(Way[C]):
    """Reads inputs to rows, has them encoded, and shows what they became."""

    @abstractmethod
    def want(self, parameters: C) -> Want:
        """What the engine shall make of the rows."""

    @abstractmethod
    def show(self, row: Encoded) -> Output:
        """One row's output."""

    def row(self, text: EncodedText) -> EncoderInput:
        """What the engine is given of a text."""
        return EncoderInput(text.ids, text.types)

    async def check(self, backbone: Backbone, parameters: C) -> None:
        encoding.cut_at(parameters.truncate_prompt_tokens, backbone)

    async def run(self, call: Call, inputs: Sequence[Any], parameters: C) -> list[Outcome]:
        cut = encoding.cut_at(parameters.truncate_prompt_tokens, call.backbone)
        outcomes: list[Outcome | None] = []
        read: list[tuple[dict[str, str], EncodedText]] = []
        rows: list[EncoderInput] = []
        for item in inputs:
            try:
                values, text = await self._text(call.backbone, item, cut)
                rows.append(self.row(text))
                read.append((values, text))
                outcomes.append(None)
            except DeltaserveError as error:
                outcomes.append(error)
        call.prompt_tokens += sum(len(row.ids) for row in rows)
        found: list[Vector | DeltaserveError] = []
        want = self.want(parameters)
        async with aclosing(
            encoding.outcomes(call.engine, call.metrics, call.turn, rows, call.target.delta, want)
        ) as waves:
            async for wave in waves:
                found += wave
        shown = iter(
            of_the_row(vector)
            if isinstance(vector, DeltaserveError)
            else self.show(Encoded(values, text, vector))
            for vector, (values, text) in zip(found, read, strict=True)
        )
        return [next(shown) if outcome is None else outcome for outcome in outcomes]

    async def _text(
        self, backbone: Backbone, item: Any, cut: int | None
    ) -> tuple[dict[str, str], EncodedText]:
        values = values_of(item, self.template.fields)
        text = await prompts.encode_pieces(backbone.tokenizer, self.template.pieces(values), cut)
        encoding.check_length(text.ids, backbone, "the input", "inputs")
        return values, text


class Embed(EncodedWay[EmbedParameters]):
    """``embed``: pooled hidden states."""

    def want(self, parameters: EmbedParameters) -> Want:
        return Want("embedding", parameters.pooling, parameters.normalize)

    def show(self, row: Encoded) -> Output:
        return {"embedding": encoding.floats(row.vector)}
