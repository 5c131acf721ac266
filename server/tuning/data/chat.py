"""Conversations: OpenAI's ``messages``, of which the assistant's are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.tuning.data.problems import RowError
from server.tuning.data.tokenizer import Tokenizer
from server.types import CHAT_ROLES

EMPTY = (
    "tools",
    "functions",
    "parallel_tool_calls",
)  # keys of OpenAI's rows that may be there without content
_KEYS = frozenset({"role", "content", "name", "weight", "refusal", "tool_calls", "function_call", "audio"})


class Chat(NamedTuple):
    """Messages as a chat template takes them, and the places of those that are learnt."""

    messages: list[dict[str, str]]
    learnt: list[int]


class Learnable(NamedTuple):
    """Tokens, and the half-open ranges of them that are to be predicted, in order."""

    tokens: list[int]
    learn: list[tuple[int, int]]


def read(values: Mapping[str, Any]) -> Chat:
    """A row's conversation. Raises RowError naming the message and its key."""
    for key in ("tools", "functions"):
        if values.get(key):
            raise RowError("unsupported_field", f"'{key}' cannot be learnt: leave it out", key)
    given = values.get("messages", None)
    if not isinstance(given, list) or not given:
        raise RowError("wrong_type", "'messages' must be a list of messages, at least one", "messages")
    messages: list[dict[str, str]] = []
    learnt: list[int] = []
    for n, message in enumerate(given):
        messages.append(_message(message, f"messages[{n}]"))
        if messages[-1]["role"] == "assistant" and message.get("weight") != 0:
            learnt.append(n)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "last_message", "the last message must be the assistant's", f"messages[{len(given) - 1}].role"
        )
    if not learnt:
        raise RowError("nothing_to_learn", "every assistant's message has weight 0", "messages")
    return Chat(messages, learnt)


def _message(message: Any, field: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError("wrong_type", f"'{field}' must be an object {{role, content}}", field)
    role = message.get("role")
    if not isinstance(role, str) or role not in CHAT_ROLES:
        roles = ", ".join(CHAT_ROLES)
        raise RowError("invalid_role", f"'{field}.role' must be one of {roles}", f"{field}.role")
    for key in message:
        if key not in _KEYS:
            raise RowError("unsupported_field", f"'{field}' has an unknown key {key[:80]!r}", field)
    for key in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(key):
            raise RowError("unsupported_field", f"'{field}.{key}' cannot be learnt", f"{field}.{key}")
    weight = message.get("weight")
    if weight is not None and (role != "assistant" or type(weight) is not int or weight not in (0, 1)):
        text = f"'{field}.weight' must be 0 or 1, and on the assistant's messages only"
        raise RowError("invalid_weight", text, f"{field}.weight")
    return {"role": CHAT_ROLES[role], "content": _content(message.get("content"), role, f"{field}.content")}


def _content(content: Any, role: str, field: str) -> str:
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise RowError("wrong_type", f"'{field}' may hold parts of type 'text' only", field)
        content = "".join(part["text"] for part in content)
    if content is None:
        raise RowError("missing_field", f"'{field}' is missing", field)
    if not isinstance(content, str):
        raise RowError("wrong_type", f"'{field}' must be a text", field)
    if not content and role == "assistant":
        raise RowError("empty", f"'{field}' is empty", field)
    return content


def render(chat: Chat, tokenizer: Tokenizer) -> list[Learnable]:
    """The conversation by the backbone's own chat template, as a decoder learns it: one row where each turn's prompt, as
    serving renders it, begins the whole; else (templates that write earlier turns in another way) a row for each learnt
    turn.

    A turn is learnt from behind its generation prompt to its end token; where the template writes none, the
    tokenizer's is appended to the last turn. Raises InvalidRequest where the template does not take the messages.
    """
    whole = tokenizer.render(chat.messages, None, add_generation_prompt=False)
    learn: list[tuple[int, int]] = []
    for place in chat.learnt:
        prompt = tokenizer.render(chat.messages[:place], None) if place else []
        last = place == len(chat.messages) - 1
        end = (
            whole if last else tokenizer.render(chat.messages[: place + 1], None, add_generation_prompt=False)
        )
        if not (_begins(whole, prompt) and _begins(whole, end)):
            return [_turn(chat, place, tokenizer) for place in chat.learnt]
        learn.append((len(prompt), len(end)))
    return [_ended(whole, learn, tokenizer)]


def source_and_answer(chat: Chat, tokenizer: Tokenizer) -> list[tuple[list[int], str]]:
    """For an encoder-decoder: each learnt turn's prompt, as serving renders it, and its text."""
    return [
        (tokenizer.render(chat.messages[:place], None), chat.messages[place]["content"])
        for place in chat.learnt
    ]


def _turn(chat: Chat, place: int, tokenizer: Tokenizer) -> Learnable:
    whole = tokenizer.render(chat.messages[: place + 1], None, add_generation_prompt=False)
    prompt = tokenizer.render(chat.messages[:place], None) if place else []
    shared = next((n for n, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), None)
    start = min(len(whole), len(prompt)) if shared is None else shared
    return _ended(whole, [(start, len(whole))], tokenizer)


def _ended(tokens: list[int], learn: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Learnable:
    """Each range up to its last end token, nothing behind the last one."""
    ends = set(tokenizer.eos_token_ids)
    cut: list[tuple[int, int]] = []
    for start, end in learn:
        last = next((at + 1 for at in range(end - 1, start - 1, -1) if tokens[at] in ends), None)
        cut.append((max(start, 1), last or end))  # nothing comes before the first token that could predict it
    start, end = cut[-1]
    tokens = tokens[:end]
    if tokens[-1] not in ends and tokenizer.end_token is not None:
        tokens = [*tokens, tokenizer.end_token]
        cut[-1] = (start, end + 1)
    return Learnable(tokens, cut)


def _begins(whole: Sequence[int], start: Sequence[int]) -> bool:
    return len(start) <= len(whole) and whole[: len(start)] == start
