"""What is asked, and when: the same from the same seed, by the popularity and in the lengths that were wanted."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.plan import PATHS, POPULARITIES, Plan, Target, Task, arrivals, choices
from server.bench.prompts import WORDS, Lengths, Prompts, read_texts

models = st.integers(1, 40)
seeds = st.integers(0, 2**32)
DRAWS = 4000


def drawn(popularity: str, count: int, seed: int, exponent: float = 1.0, draws: int = DRAWS) -> Counter[int]:
    places = choices(popularity, count, exponent, random.Random(seed))
    return Counter(itertools.islice(places, draws))


def plan(*targets: Target, prompts: Prompts | None = None, new: str = "4", seed: int = 0) -> Plan:
    given = prompts or Prompts(Lengths(3, 6), [5, 7, 9])
    return Plan(targets, "distinct", 1.0, given, Lengths.parse(new), seed)


@given(st.sampled_from(sorted(POPULARITIES)), models, seeds)
def test_every_choice_is_a_model(popularity: str, count: int, seed: int) -> None:
    assert set(drawn(popularity, count, seed, draws=200)) <= set(range(count))


@given(models, seeds)
def test_distinct_takes_turns_and_identical_stays(count: int, seed: int) -> None:
    assert set(drawn("distinct", count, seed, draws=3 * count).values()) == {3}
    assert drawn("identical", count, seed, draws=50) == {0: 50}


def near(found: int, chance: float) -> bool:
    """Within six standard deviations of what is expected of ``DRAWS``."""
    return abs(found - DRAWS * chance) <= 6 * (DRAWS * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_chances(seed: int) -> None:
    uniform = drawn("uniform", 8, seed)
    assert all(near(uniform[place], 1 / 8) for place in range(8))
    skewed = drawn("skewed", 9, seed)
    assert near(skewed[0], 1 / 2)
    assert all(near(skewed[place], 1 / 16) for place in range(1, 9))
    for exponent in (0.5, 1.0, 2.0):
        zipf = drawn("zipf", 8, seed, exponent)
        total = sum((place + 1) ** -exponent for place in range(8))
        assert all(near(zipf[place], (place + 1) ** -exponent / total) for place in range(8))


def test_one_model_is_all_there_is() -> None:
    assert all(drawn(popularity, 1, 0, draws=20) == {0: 20} for popularity in POPULARITIES)
    with pytest.raises(ValueError, match="no popularity 'fair': give one of distinct"):
        choices("fair", 3, 1.0, random.Random(0))


@given(st.floats(0.01, 1000), seeds)
def test_arrivals_go_on(rate: float, seed: int) -> None:
    due = list(itertools.islice(arrivals(rate, seed), 50))
    assert due == sorted(due)
    assert due[0] >= 0
    assert due == list(itertools.islice(arrivals(rate, seed), 50))


def test_arrivals_are_a_poisson_process() -> None:
    due = list(itertools.islice(arrivals(20.0, 1), DRAWS))
    assert due[-1] == pytest.approx(DRAWS / 20, rel=0.1)
    a_second = Counter(int(at) for at in due if at < 150)
    mean = sum(a_second.values()) / 150
    variance = sum((a_second[second] - mean) ** 2 for second in range(150)) / 150
    assert 0.6 < variance / mean < 1.5  # of a Poisson process 1, of even arrivals 0


def test_the_same_seed_asks_the_same() -> None:
    made = plan(Target("a", "lora", ("completions", "chat")), Target("base", "base", ("completions",)))
    first = list(itertools.islice(made.requests("measured"), 40))
    assert first == list(itertools.islice(made.requests("measured"), 40))
    assert first != list(itertools.islice(made.requests("warm-up"), 40))
    assert [request.model for request in first[:4]] == ["a", "base", "a", "base"]
    assert {request.endpoint for request in first if request.model == "a"} == {"completions", "chat"}


@given(st.integers(1, 50), st.integers(0, 50), seeds)
def test_lengths_are_kept(low: int, more: int, seed: int) -> None:
    prompts = Prompts(Lengths(low, low + more), [5, 7, 9])
    made = plan(
        Target("a", "lora", ("completions",)),
        Target("b", "lora", ("chat",)),
        prompts=prompts,
        new=f"{low}:{low + more}",
        seed=seed,
    )
    first, second = itertools.islice(made.requests("measured"), 2)
    assert first.path == "/v1/completions"
    assert low <= len(first.body["prompt"]) <= low + more
    assert set(first.body["prompt"]) <= {5, 7, 9}
    assert low <= first.body["max_tokens"] <= low + more
    assert (first.body["ignore_eos"], first.body["temperature"], first.body["stream"]) == (True, 0, True)
    (message,) = second.body["messages"]
    words = message["content"].split()
    assert low <= len(words) <= low + more
    assert set(words) <= set(WORDS)


def test_encoders_are_asked_in_one_piece() -> None:
    made = plan(Target("a", "head", ("classify",)), Target("b", "base", ("embeddings",)))
    for request in itertools.islice(made.requests("measured"), 4):
        assert request.path == PATHS[request.endpoint]
        assert not request.streamed
        assert set(request.body) == {"model", "input"}


def test_tasks_are_asked_as_their_examples() -> None:
    greet = Task("greet", "generate", {"name": "text", "language": "text"})
    pick = Task("pick", "score", {"text": "text", "choices": ["one", "two"]})
    mood = Task("mood", "classify", "text")
    made = plan(*(Target("m", "task", (f"task {task.name}",), task) for task in (greet, pick, mood)))
    first, second, third = itertools.islice(made.requests("measured"), 3)
    assert (first.path, first.endpoint, first.streamed) == ("/v1/tasks/greet/infer", "task greet", False)
    (fields,) = first.body["inputs"]
    assert set(fields) == {"name", "language"}
    assert all(set(text.split()) <= set(WORDS) for text in fields.values())
    assert first.body["parameters"] == {"max_tokens": 4, "ignore_eos": True, "temperature": 0}
    assert second.body["inputs"][0]["choices"] == ["one", "two"]
    assert second.body["parameters"] == {}
    assert isinstance(third.body["inputs"][0], str)


@pytest.mark.parametrize("text", ["", "a", "0", "8:4", "-1", "1:", "1:2:3"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}'"):
        Lengths.parse(text)


def test_good_lengths() -> None:
    assert (Lengths.parse("8"), Lengths.parse("4:8")) == (Lengths(8, 8), Lengths(4, 8))
    assert (str(Lengths(8, 8)), str(Lengths(4, 8))) == ("8", "4:8")


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "more": 1}\n')
    texts = read_texts(path)
    made = plan(Target("a", "lora", ("completions",)), prompts=Prompts(Lengths(1, 1), [5], texts))
    asked = [request.body["prompt"] for request in itertools.islice(made.requests("measured"), 3)]
    assert asked == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no prompts"),
        ("{}", "line 1: give"),
        ('{"prompt": "a"}\n{', "line 2: no JSON"),
        ("[]", "line 1"),
    ],
)
def test_a_bad_file_of_prompts(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=fault):
        read_texts(path)
