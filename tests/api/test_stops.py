"""Stop strings, whatever the pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.api.stops import StopFinder


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    finder = StopFinder(stops)
    shown = ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.found is not None:
            return shown, finder.found
    return shown + finder.flush(), None


def test_partial_matches_are_held_and_released() -> None:
    finder = StopFinder(["</s>"])
    assert finder.push("a<") == "a"
    assert finder.push("/") == ""
    assert finder.push("b") == "</b"
    assert finder.push("<") == ""
    assert finder.flush() == "<"


def test_nothing_after_the_end() -> None:
    finder = StopFinder(["x"])
    assert finder.push("axb") == "a"
    assert finder.push("c") == ""
    assert finder.flush() == ""


def test_min_tokens_let_text_through() -> None:
    finder = StopFinder(["abc"])
    assert finder.push("ab") == ""
    assert finder.release("c") == "abc"
    assert finder.push("xabc") == "x"


TEXT = st.text("ab", max_size=12)


@given(text=TEXT, cuts=st.lists(st.integers(0, 12)), stops=st.lists(st.text("ab", min_size=1, max_size=4)))
def test_pieces_do_not_matter(text: str, cuts: list[int], stops: list[str]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, found = run(pieces, stops)
    assert (shown, found) == run(list(text), stops)
    # the truth: the stop string that is complete first, the longer of two that end together
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    if not ends:
        assert (shown, found) == (text, None)
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (shown, found) == (text[: ends[0] - len(longest)], longest)
