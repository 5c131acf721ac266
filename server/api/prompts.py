"""Prompts to token ids, within the backbone's context, and requests to the engine's sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from server.api.ports import Tokenizer
from server.api.schemas import SamplingFields
from server.api.services import Backbone
from server.errors import ContextTooLong, InvalidRequest
from server.types import EncodedText, SamplingParams, TextPiece

Number = TypeVar("Number", int, float)

_INLINE_CHARS = 4096  # longer texts are tokenized in a thread, so that they hold up nobody's tokens


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """A text's token ids."""
    if len(text) <= _INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


async def encode_within(tokenizer: Tokenizer, text: str, limit: int) -> list[int]:
    """A text's token ids, cut to ``limit``."""
    if len(text) <= _INLINE_CHARS:
        return tokenizer.encode_within(text, limit)
    return await asyncio.to_thread(tokenizer.encode_within, text, limit)


async def encode_pieces(
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[TextPiece]],
    limit: int | None = None,
    add_special_tokens: bool = True,
) -> EncodedText:
    """One text made of pieces, or a pair of them, cut to ``limit``."""
    if sum(len(piece.text) for text in texts for piece in text) <= _INLINE_CHARS:
        return tokenizer.encode_pieces(texts, limit, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode_pieces, texts, limit, add_special_tokens)


async def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
) -> list[int]:
    """The chat template's token ids for these messages (``Message.plain``)."""
    if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
        return tokenizer.render(messages, None, add_generation_prompt)
    return await asyncio.to_thread(tokenizer.render, messages, None, add_generation_prompt)


def check_ids(ids: Sequence[int], backbone: Backbone, param: str) -> None:
    """Raises ``InvalidRequest`` for a token id that the backbone does not have."""
    if ids and max(ids) >= backbone.spec.vocab:
        raise InvalidRequest(
            f"Token id {max(ids)} is outside the backbone's vocabulary of {backbone.spec.vocab}.", param=param
        )


def room(prompt: Sequence[int], backbone: Backbone, param: str) -> int:
    """How many tokens may follow ``prompt``. Raises ``ContextTooLong`` if none, ``InvalidRequest`` if it is
    empty.
    """
    if not prompt:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    limit = backbone.info.max_model_len
    if len(prompt) >= limit:
        raise ContextTooLong(
            f"This model's maximum context length is {limit} tokens, of which at least one is generated; "
            f"the prompt has {len(prompt)}.",
            param=param,
        )
    return limit - len(prompt)


class Start(NamedTuple):
    """How a row begins: its own tokens, what an encoder-decoder's encoder reads, and how many tokens may follow."""

    prompt: list[int]
    source: list[int]
    room: int


def start(tokens: list[int], backbone: Backbone, param: str) -> Start:
    """A row for what a caller sent. Raises ``ContextTooLong`` or ``InvalidRequest`` as :func:`room` does."""
    first, limit = backbone.info.decoder_start, backbone.info.max_model_len
    if not first:
        return Start(tokens, [], room(tokens, backbone, param))
    if not tokens:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    if len(tokens) > limit:
        raise ContextTooLong(
            f"This model's encoder reads at most {limit} tokens; the prompt has {len(tokens)}.", param=param
        )
    return Start([*first], tokens, limit - len(first))


def sampling(
    request: SamplingFields,
    backbone: Backbone,
    *,
    max_tokens: int,
    copy: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The engine's parameters for the ``copy``-th of a prompt's ``n`` rows (each has its own seed)."""
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    check_ids(list(bias), backbone, "logit_bias")
    stop_ids = request.stop_token_ids or []
    check_ids(stop_ids, backbone, "stop_token_ids")
    if request.min_tokens and request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise InvalidRequest("'min_tokens' is larger than 'max_tokens'.", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        temperature=_given(request.temperature, 1.0),
        top_p=_given(request.top_p, 1.0),
        top_k=max(_given(request.top_k, 0), 0),
        min_p=_given(request.min_p, 0.0),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        logit_bias=bias,
        seed=None if request.seed is None else (request.seed + copy) % 2**63,
        stop_token_ids=list(stop_ids),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value
