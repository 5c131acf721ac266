"""From inputs to vectors: token ids within the backbone's limit, through the engine in waves, and what answers show."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from server.api import prompts
from server.api.ports import Engine
from server.api.schemas import EncodingRequest
from server.api.services import Backbone
from server.errors import ContextTooLong, InvalidRequest
from server.metrics import Metrics
from server.types import DeltaRef, Vector

WAVE = 256  # rows of one request that wait or run at a time


async def ids_of(request: EncodingRequest, backbone: Backbone) -> list[list[int]]:
    """Every input's token ids. Raises ``ContextTooLong`` for one that is too long and not to be cut."""
    limit = backbone.info.max_model_len
    cut = request.truncate_prompt_tokens
    if cut is not None and cut > limit:
        raise InvalidRequest(
            f"'truncate_prompt_tokens' is {cut}; this model takes at most {limit} tokens.",
            param="truncate_prompt_tokens",
        )
    wanted = limit if cut == -1 else cut
    rows = []
    for index, item in enumerate(request.input):
        ids = await _ids(item, request, backbone, wanted)
        if not ids:
            raise InvalidRequest("An input has no tokens.", param="input")
        if len(ids) > limit:
            raise ContextTooLong(
                f"This model takes inputs of at most {limit} tokens; input {index} has {len(ids)}. "
                "'truncate_prompt_tokens': -1 cuts inputs to that length.",
                param="input",
            )
        rows.append(ids)
    return rows


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


async def vectors(
    engine: Engine,
    metrics: Metrics,
    tenant: str,
    rows: Sequence[list[int]],
    delta: DeltaRef | None,
    *,
    head: bool,
) -> list[Vector]:
    """The rows' vectors in their order: embeddings, or what the delta's head gives. Raises the first row's error."""
    found: list[Vector] = []
    for first in range(0, len(rows), WAVE):
        wave = rows[first : first + WAVE]
        metrics.prompt_accepted(tenant, sum(len(row) for row in wave))
        found += await engine.encode(rows=wave, delta=delta, head=head, tenant=tenant)
    return found


def floats(vector: Vector) -> list[float]:
    """The numbers of a vector."""
    values = array("f", vector.values)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


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
        names = labels or [f"LABEL_{n}" for n in range(len(scores))]
        best = max(range(len(scores)), key=scores.__getitem__)
        yield {
            "index": index,
            "label": None if kind == "regress" else names[best],
            "probs": _softmax(scores) if activate and kind == "classify" else scores,
            "num_classes": len(scores),
        }


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    shares = [math.exp(score - top) for score in scores]
    total = sum(shares)
    return [share / total for share in shares]
