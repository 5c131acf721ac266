"""Who may train: all together, or a suspect alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.tuning.turns import Turns


class Tuner:
    """Who was let in and has not left; jobs that are asked to give way come back at the next ``tidy``."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.suspects: set[str] = set()
        self.waiting: list[str] = []
        self.inside: set[str] = set()
        self.leaving: set[str] = set()

    def ask(self, job: str) -> None:
        self.waiting.append(job)

        def begin() -> None:
            self.waiting.remove(job)
            self.inside.add(job)

        suspect = job in self.suspects
        self.turns.ask(job, begin, lambda: self.leaving.add(job), suspect=suspect)

    def leave(self, job: str) -> None:
        self.inside.discard(job)
        self.leaving.discard(job)
        if job in self.waiting:
            self.waiting.remove(job)
        self.turns.leave(job)

    def clear(self, job: str) -> None:
        self.suspects.discard(job)
        self.turns.clear(job)

    def tidy(self) -> None:
        for job in sorted(self.leaving & self.inside):
            self.leave(job)
            self.ask(job)


def test_together() -> None:
    tuner = Tuner()
    for job in "abc":
        tuner.ask(job)
    assert tuner.inside == {*"abc"}


def test_suspects_go_first_and_one_by_one() -> None:
    tuner = Tuner()
    tuner.ask("a")
    tuner.suspects = {"b", "c"}
    for job in "bcd":
        tuner.ask(job)
    assert (tuner.inside, tuner.leaving) == ({"a"}, {"a"})
    tuner.tidy()
    assert tuner.inside == {"b"}
    tuner.clear("b")
    assert tuner.leaving == {"b"}
    tuner.tidy()
    assert tuner.inside == {"c"}
    tuner.clear("c")
    assert tuner.inside == {*"abcd"}


def test_a_suspect_that_waits_may_leave() -> None:
    tuner = Tuner()
    tuner.suspects = {"a", "b"}
    for job in "abc":
        tuner.ask(job)
    tuner.leave("b")
    tuner.leave("a")
    assert tuner.inside == {"c"}


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "blame", "leave", "clear", "tidy"]), st.sampled_from("abcd")))
)
def test_whatever_happens(steps: list[tuple[str, str]]) -> None:
    """A suspect is alone, nobody waits for nothing, and in the end everybody trains."""
    tuner = Tuner()
    for what, job in steps:
        known = job in tuner.inside or job in tuner.waiting
        if what == "ask" and not known:
            tuner.ask(job)
        elif what == "blame" and not known:
            tuner.suspects.add(job)
        elif what == "leave":
            tuner.leave(job)
        elif what == "clear" and job in tuner.inside:
            tuner.clear(job)
        elif what == "tidy":
            tuner.tidy()
        assert len(tuner.inside) <= 1 or not tuner.inside & tuner.suspects
        assert tuner.inside or not tuner.waiting
        if tuner.waiting:
            assert tuner.suspects & {*tuner.inside, *tuner.waiting}
    for _ in range(5):
        for job in sorted(tuner.inside):
            tuner.clear(job)
        tuner.tidy()
    assert not tuner.waiting
