"""Token counts: a prompt is counted once, and so is what was cached of it."""

from __future__ import annotations

from server.api.generation import Piece
from server.api.usage import Usage


def test_copies_of_a_prompt_do_not_count_what_the_first_computed() -> None:
    usage = Usage(40, copies=3)
    for index, cached in enumerate((0, 39, 39)):
        usage.add(Piece(index, token_ids=[1, 2], cached_tokens=cached))
    assert usage.body() == {
        "prompt_tokens": 40,
        "completion_tokens": 6,
        "total_tokens": 46,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_every_prompt_of_a_request_counts() -> None:
    usage = Usage(80, copies=2)
    for index, cached in enumerate((20, 39, 30, 39)):
        usage.add(Piece(index, token_ids=[1], cached_tokens=cached))
    assert usage.body()["prompt_tokens_details"] == {"cached_tokens": 50}
