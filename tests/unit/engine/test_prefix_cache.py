"""Prompts that are not computed again: the engine gives what it gives without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.engine.messages import Submit
from server.types import SamplingParams, TokenLogprob
from tests.tiny import KINDS, random_delta
from tests.unit.engine.running import Harness, harnesses

PROMPT = [3 + i * 11 % 250 for i in range(60)]
CLOSE = 1e-4


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    with harnesses(tmp_path / "tiny") as start:
        yield start


def scored(engine: Harness, row: int) -> list[TokenLogprob | None]:
    found = engine.events[row][0].prompt_logprobs
    assert found is not None
    return found


def test_a_prompt_computed_before_gives_the_same_answer(make: Callable[..., Harness]) -> None:
    engine, alone = make(), make()
    spec = engine.engine.runner.backbone.spec
    for n, ref in enumerate([None, *(engine.save(random_delta(spec, kind, 1)) for kind in KINDS)]):
        first, second, other = 10 * n + 1, 10 * n + 2, 10 * n + 3
        engine.submit(first, PROMPT, ref)
        engine.wait(first)
        conversation = [*PROMPT, *engine.tokens(first), 4, 5, 6]
        engine.submit(second, conversation, ref, logprobs=2)
        engine.submit(other, [*PROMPT[:30], 9, 8, 7], ref, logprobs=2)
        engine.wait(second, other)
        assert engine.events[second][0].cached_tokens == len(PROMPT) + len(engine.tokens(first)) - 1
        assert engine.events[other][0].cached_tokens == 30
        for row, prompt in ((second, conversation), (other, [*PROMPT[:30], 9, 8, 7])):
            alone.submit(row, prompt, ref, logprobs=2)
            alone.wait(row)
            assert engine.tokens(row) == alone.tokens(row)
            for got, wanted in zip(engine.events[row], alone.events[row], strict=True):
                assert got.logprobs is not None
                assert wanted.logprobs is not None
                assert abs(got.logprobs[0].logprob - wanted.logprobs[0].logprob) < CLOSE
    engine.wait_stats(lambda stats: stats.prefix_cache_hits > 0)
    assert engine.stats is not None
    assert engine.stats.stats.prefix_cache_hits < engine.stats.stats.prefix_cache_queries


def test_choices_are_scored_behind_a_prompt_that_is_computed_once(make: Callable[..., Harness]) -> None:
    engine = make()
    choices = [[9], [8, 7], [6, 5, 4], [9, 3]]
    for row, choice in enumerate(choices):
        engine.submit(
            row, [*PROMPT, *choice], max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(PROMPT)
        )
    engine.wait(*range(len(choices)))
    cached = [engine.events[row][0].cached_tokens for row in range(len(choices))]
    assert sorted(cached) == [0] + [len(PROMPT) - 1] * 3
    for row, choice in enumerate(choices):
        whole = 100 + row
        engine.submit(whole, [*PROMPT, *choice], max_tokens=0, prompt_logprobs=0)
        engine.wait(whole)
        wanted = scored(engine, whole)
        assert wanted[0] is None
        assert len(wanted) == len(PROMPT) + len(choice)
        assert engine.events[whole][0].cached_tokens == 0
        for got, true in zip(scored(engine, row), wanted[len(PROMPT) :], strict=True):
            assert got is not None
            assert true is not None
            assert got.token == true.token
            assert abs(got.logprob - true.logprob) < CLOSE


def test_another_tenant_computes_its_prompt_itself(make: Callable[..., Harness]) -> None:
    engine = make()
    engine.submit(1, PROMPT)
    engine.wait(1)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    engine.engine.receive(Submit(2, "another", PROMPT, None, params))
    engine.wait(2)
    assert engine.events[2][0].cached_tokens == 0
