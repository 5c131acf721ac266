"""From inputs to vectors: token ids within the backbone's limit, through the engine in waves, and what answers show."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from server.api import prompts
from server.api.ports import Engine
from server.api.schemas import EncodingRequest
from server.api.services import Backbone
from server.errors import ContextTooLong, DeltaserveError, InvalidRequest, UnsupportedTask
from server.metrics import Metrics
from server.types import DeltaRef, EncoderInput, Turn, Vector, Want

WAVE = 256  # rows of one request that wait or run at a time


async def ids_of(request: EncodingRequest, backbone: Backbone) -> list[list[int]]:
    """Every input's token ids. Raises ``ContextTooLong`` for one that is too long and not to be cut."""
    wanted = cut_at(request.truncate_prompt_tokens, backbone)
    rows = []
    for index, item in enumerate(request.input):
        ids = await _ids(item, request, backbone, wanted)
        if not ids:
            raise InvalidRequest("An input has no tokens.", param="input")
        check_length(ids, backbone, f"input {index}", "input")
        rows.append(ids)
    return rows


def cut_at(truncate_prompt_tokens: int | None, backbone: Backbone) -> int | None:
    """How many tokens an input is cut to; None: it is not. Raises ``InvalidRequest`` for more than the model takes."""
    limit = backbone.info.max_model_len
    if truncate_prompt_tokens is not None and truncate_prompt_tokens > limit:
        raise InvalidRequest(
            f"'truncate_prompt_tokens' is {truncate_prompt_tokens}; this model takes at most {limit} tokens.",
            param="truncate_prompt_tokens",
        )
    return limit if truncate_prompt_tokens == -1 else truncate_prompt_tokens


def check_length(ids: Sequence[int], backbone: Backbone, what: str, param: str) -> None:
    """Raises ``ContextTooLong`` for an input of more tokens than the model takes."""
    limit = backbone.info.max_model_len
    if len(ids) > limit:
        raise ContextTooLong(
            f"This model takes inputs of at most {limit} tokens; {what} has {len(ids)}. "
            "'truncate_prompt_tokens': -1 cuts inputs to that length.",
            param=param,
        )


async def _ids(
    item: str | list[int], request: EncodingRequest, backbone: Backbone, cut: int | None
) -> list[int]:
    special = request.add_special_tokens is not False
    if isinstance(item, str):
        if cut is not None and special:
            return await prompts.encode_within(backbone.tokenizer, item, cut)
        ids = await prompts.encode(backbone.tokenizer, item, special)
    else:
        prompts.check_ids(item, backbone, "input")
        ids = item
    return ids if cut is None else ids[:cut]


async def outcomes(
    engine: Engine,
    metrics: Metrics,
    turn: Turn,
    rows: Sequence[EncoderInput],
    delta: DeltaRef | None,
    want: Want,
) -> AsyncGenerator[list[Vector | DeltaserveError], None]:
    """What the rows became, or each its own error, in their order and in waves."""
    for first in range(0, len(rows), WAVE):
        wave = rows[first : first + WAVE]
        metrics.prompt_accepted(turn.tenant, sum(len(row.ids) for row in wave))
        yield await engine.encode(rows=wave, delta=delta, want=want, turn=turn)


async def vectors(
    engine: Engine,
    metrics: Metrics,
    turn: Turn,
    rows: Sequence[EncoderInput],
    delta: DeltaRef | None,
    want: Want,
) -> list[Vector]:
    """The rows' vectors in their order. Raises the first row's error; then no further wave begins."""
    found: list[Vector] = []
    async with aclosing(outcomes(engine, metrics, turn, rows, delta, want)) as waves:
        async for wave in waves:
            for outcome in wave:
                if isinstance(outcome, DeltaserveError):
                    raise outcome
                found.append(outcome)
    return found


def floats(vector: Vector) -> list[float]:
    """The numbers of a vector."""
    values = array("f", vector.values)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def one_output(vector: Vector, model: str) -> float:
    """The output of a head that has one. Raises ``UnsupportedTask`` for a head that has more."""
    values = floats(vector)
    if len(values) != 1:
        raise UnsupportedTask(f"The head of '{model}' has {len(values)} outputs; here it must have one.")
    return values[0]


def embedding(vector: Vector, encoding_format: str | None) -> list[float] | str:
    """A vector as the answer shows it."""
    if encoding_format == "base64":
        return base64.b64encode(vector.values).decode()
    return floats(vector)


def classes(
    found: Sequence[Vector], kind: str, labels: list[str] | None, *, activate: bool
) -> Iterator[dict[str, Any]]:
    """vLLM's entries. A regression's one value is no probability and stays as it is."""
    for index, vector in enumerate(found):
        scores = floats(vector)
        names = labels or numbered(len(scores))
        best = max(range(len(scores)), key=scores.__getitem__)
        yield {
            "index": index,
            "label": None if kind == "regress" else names[best],
            "probs": softmax(scores) if activate and kind == "classify" else scores,
            "num_classes": len(scores),
        }


def numbered(count: int) -> list[str]:
    """The names of labels where nobody named them."""
    return [f"LABEL_{n}" for n in range(count)]


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities from logits."""
    top = max(scores)
    shares = [math.exp(score - top) for score in scores]
    total = sum(shares)
    return [share / total for share in shares]
