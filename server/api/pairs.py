"""Scores of pairs of texts: by a cross-encoder's head, which reads both at once, or by the cosine of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.api import encoding, kinds, prompts
from server.api.models import Target
from server.api.schemas_tasks import ScoreRequest
from server.api.services import Backbone, Services
from server.types import EncoderInput, TextPiece, Turn, Want


async def scores(
    request: ScoreRequest, services: Services, backbone: Backbone, turn: Turn, target: Target
) -> tuple[list[float], int]:
    """A score for each pair, and how many tokens were read.

    With a head the sigmoid of its one output, or the output itself where ``use_activation`` is false. Raises
    UnsupportedTask for a head of more outputs, ContextTooLong, and the first row's error.
    """
    firsts = request.text_1 * (len(request.text_2) if len(request.text_1) == 1 else 1)
    texts = list(zip(firsts, request.text_2, strict=True))
    cross = any(record.task_kind is not None for record in target.records)
    if cross:
        kinds.head_of(target)
        given: Sequence[tuple[str, ...]] = texts
    else:
        given = [(text,) for text in dict.fromkeys([*request.text_1, *request.text_2])]
    cut = encoding.cut_at(request.truncate_prompt_tokens, backbone)
    rows = [await _row(backbone, item, cut) for item in given]
    found = await encoding.vectors(
        services.engine,
        services.metrics,
        turn,
        rows,
        target.delta,
        Want("head") if cross else Want("embedding", normalise=True),
    )
    tokens = sum(len(row.ids) for row in rows)
    if cross:
        outputs = [encoding.one_output(vector, target.model) for vector in found]
        return (outputs if request.use_activation is False else [_sigmoid(x) for x in outputs]), tokens
    embedded = {text: encoding.floats(vector) for (text,), vector in zip(given, found, strict=True)}
    return [_dot(embedded[one], embedded[two]) for one, two in texts], tokens


async def _row(backbone: Backbone, texts: Sequence[str], cut: int | None) -> EncoderInput:
    pieces = [[TextPiece(text, False)] for text in texts]
    text = await prompts.encode_pieces(backbone.tokenizer, pieces, cut)
    encoding.check_length(text.ids, backbone, "a text" if len(texts) == 1 else "a pair", "text_1")
    return EncoderInput(text.ids, text.types)


def _dot(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(one, two, strict=True))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
