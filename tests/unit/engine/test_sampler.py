"""Sampling against a plain per-row reference, transformers' processors, and itself in other batches."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as processors

from server.engine.drawing import best, draw, draw_filtered
from server.engine.logprobs import prompt_logprobs
from server.engine.sampler import RowSampler, sample
from server.errors import InvalidRequest
from server.types import SamplingParams

VOCAB = 600
EOS = [3, 7]


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 100} | given))


def sampler(prompt: list[int] | None = None, vocab: int = VOCAB, **given: Any) -> RowSampler:
    return RowSampler(params(**given), prompt or [1, 2], vocab=vocab, eos_token_ids=EOS)


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits: Tensor, p: SamplingParams, prompt: list[int], output: list[int], u: float) -> int:
    """The definition, one Python number at a time, in double precision."""
    x = [float(value) for value in logits.tolist()]
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        if p.repetition_penalty != 1:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, times in Counter(output).items():
        x[token] -= p.frequency_penalty * times + p.presence_penalty
    if len(output) < p.min_tokens:
        for token in {*p.stop_token_ids, *([] if p.ignore_eos else EOS)}:
            x[token] = -math.inf
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if p.temperature == 0:
        return order[0]
    weights = {token: math.exp((x[token] - x[order[0]]) / p.temperature) for token in order}
    kept = [token for token in order if weights[token] >= p.min_p * weights[order[0]]]
    kept = kept[: p.top_k or None]
    if p.top_p < 1:
        total, mass, nucleus = sum(weights[t] for t in kept), 0.0, []
        for token in kept:
            nucleus.append(token)
            mass += weights[token]
            if mass >= p.top_p * total:
                break
        kept = nucleus
    filtered = p.top_p < 1 or 0 < p.top_k < len(x) or p.min_p > 0
    line = kept if filtered else sorted(kept)
    target, mass = u * sum(weights[t] for t in line), 0.0
    for token in line:
        mass += weights[token]
        if mass > target:
            return token
    return line[-1]


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k beyond the candidates": {"top_k": 400},
    "top_p": {"top_p": 0.6},
    "wide top_p": {"top_p": 0.999, "temperature": 3.0},
    "min_p": {"min_p": 0.1},
    "wide min_p": {"min_p": 1e-6, "temperature": 2.0},
    "all filters": {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 0.9},
    "bias": {"logit_bias": {5: 6.0, 9: -100.0}, "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.5, "temperature": 0.0},
    "repetition, drawn": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.5, "temperature": 0.0},
    "frequency": {"frequency_penalty": 0.9, "temperature": 0.0},
    "negative frequency": {"frequency_penalty": -1.0},
    "min_tokens": {"min_tokens": 4, "temperature": 0.0, "logit_bias": {3: 50.0}},
    "min_tokens and stop ids": {"min_tokens": 4, "stop_token_ids": [11], "logit_bias": {11: 50.0, 3: 40.0}},
    "ignore_eos": {"min_tokens": 4, "ignore_eos": True, "temperature": 0.0, "logit_bias": {3: 50.0}},
    "everything": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {4: 3.0},
        "min_tokens": 2,
        "stop_token_ids": [20],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_against_the_reference(case: str) -> None:
    for seed in range(6):
        prompt = [1, 5, 5, 9]
        row = sampler(prompt, seed=seed, **CASES[case])
        output: list[int] = []
        for step in range(10):
            logits = logits_of(1, seed=100 * seed + step, scale=1.5)
            expected = reference(logits[0], row.params, prompt, output, row.uniform())
            before = logits.clone()
            out = sample(logits, [row])
            assert out.tokens == [expected]
            assert out.failed == []
            assert torch.equal(logits, before)
            output.append(expected)


def test_a_mixed_batch_equals_each_row_alone() -> None:
    """All cases at once, in shuffled batches of several sizes, over a vocabulary worth several threads."""
    vocab, steps = 49_152, 4
    cases = [*CASES.values()] * 2
    logits = [logits_of(len(cases), seed=s, vocab=vocab) for s in range(steps)]
    alone: list[list[int]] = []
    for i, case in enumerate(cases):
        row = sampler(seed=i, vocab=vocab, **case)
        alone.append([sample(logits[s][i : i + 1], [row]).tokens[0] for s in range(steps)])
    shuffle = random.Random(0)
    order = list(range(len(cases)))
    for size in (1, 3, len(cases)):
        shuffle.shuffle(order)
        rows = {i: sampler(seed=i, vocab=vocab, **cases[i]) for i in order}
        got: dict[int, list[int]] = {i: [] for i in order}
        for s in range(steps):
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                for i, token in zip(
                    batch, sample(logits[s][batch], [rows[i] for i in batch]).tokens, strict=True
                ):
                    got[i].append(token)
        assert [got[i] for i in range(len(cases))] == alone


def kept_by(processor: Any, scores: Tensor) -> list[int]:
    out = processor(torch.zeros(1, 1, dtype=torch.long), scores[None].clone())[0]
    return [int(i) for i in out.isfinite().nonzero()[:, 0]]


def support(probs: Tensor, **filters: Any) -> list[int]:
    """The tokens that any uniform number reaches, found by trying many."""
    tries = 4000
    given = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    uniforms = (torch.arange(tries, dtype=torch.float64) + 0.5) / tries
    ids = draw_filtered(
        probs.expand(tries, -1),
        uniforms,
        *([given[name]] * tries for name in ("top_k", "top_p", "min_p")),
    )
    return sorted(set(ids.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_filters_keep_what_transformers_keeps(seed: int) -> None:
    scores = logits_of(1, seed, vocab=40, scale=1.0)[0]
    probs = scores.softmax(-1)[None]
    for k in (1, 3, 20, 40):
        assert support(probs, top_k=k) == kept_by(processors.TopKLogitsWarper(k), scores)
    for p in (0.05, 0.3, 0.7, 0.9):
        assert support(probs, top_p=p) == kept_by(processors.TopPLogitsWarper(p), scores)
    for p in (0.05, 0.3, 0.9):
        assert support(probs, min_p=p) == kept_by(processors.MinPLogitsWarper(p), scores)
    for k, p in ((5, 0.5), (30, 0.9)):
        after_k = processors.TopKLogitsWarper(k)(torch.zeros(1, 1, dtype=torch.long), scores[None].clone())[0]
        assert support(probs, top_k=k, top_p=p) == kept_by(processors.TopPLogitsWarper(p), after_k)


def test_among_equals_the_lowest_ids_are_kept() -> None:
    probs = torch.full((1, 5000), 1 / 5000)
    assert support(probs, top_k=10) == list(range(10))
    assert support(probs, top_p=0.0099) == list(range(50))
    probs[0, 4970:] *= 2  # push others out of the candidates, whichever they are
    assert support(probs / probs.sum(), top_k=50) == [*range(20), *range(4970, 5000)]


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits = logits_of(1, 4)
    seen = [1, 5, 5, 9]
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits.clone())
    row = sampler(seen[:2], repetition_penalty=penalty)
    for token in seen[2:]:
        row.advance(token)
    ours = logits[0].clone()
    row.adjust(ours)
    assert torch.equal(ours, theirs[0])


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 1200),
    top_k=st.integers(0, 70) | st.integers(0, 1300),
    top_p=st.floats(0.0, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 1e-3, 0.5, 1.0]),
    u=st.floats(0, 1, exclude_max=True),
    levels=st.sampled_from([1, 2, 7, 1000]),
)
def test_candidates_give_what_sorting_everything_gives(
    seed: int, vocab: int, top_k: int, top_p: float, min_p: float, u: float, levels: int
) -> None:
    """Also where many probabilities are equal (logits in few ``levels``), so that cuts fall among equals."""
    logits = (logits_of(1, seed, vocab) * levels).round() / levels
    probs = logits.softmax(-1)
    values, ids = probs[0].sort(descending=True, stable=True)
    keep = int((values >= min_p * values[0]).sum())
    keep = min(keep, top_k or vocab)
    mass = values.double().cumsum(0)
    free = min_p == 0 and (top_k == 0 or top_k >= vocab)
    total = 1.0 if free else float(mass[keep - 1])
    keep = min(int((mass < top_p * total).sum()) + 1, keep)
    position = int((mass[:keep] <= u * mass[keep - 1]).sum())
    got = draw_filtered(probs, torch.tensor([u], dtype=torch.float64), [top_k], [top_p], [min_p])
    assert int(got) == int(ids[min(position, keep - 1)])


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(1, 1200), u=st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(seed: int, vocab: int, u: float) -> None:
    probs = logits_of(1, seed, vocab, scale=4.0).softmax(-1)
    token = int(draw(probs, torch.tensor([u], dtype=torch.float64)))
    mass = probs[0].double().cumsum(0)
    mass /= mass[-1].clone()
    assert probs[0, token] > 0
    assert (float(mass[token - 1]) if token else 0.0) <= u + 1e-6
    assert float(mass[token]) >= u - 1e-6


def test_the_last_uniform_never_reaches_an_impossible_token() -> None:
    probs = torch.zeros(3, 1000)
    probs[0, 0] = 1
    probs[1, 500:502] = torch.tensor([0.9999999, 1e-7])
    probs[2, 10:20] = 0.1
    almost_one = torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)
    assert draw(probs, almost_one).tolist() == [0, 501, 19]
    assert draw_filtered(probs, almost_one, [7] * 3, [1.0] * 3, [0.0] * 3).tolist() == [0, 501, 16]


@pytest.mark.parametrize("given", [{}, {"top_p": 0.8}, {"top_k": 4}, {"temperature": 0.5}])
def test_frequencies_follow_the_distribution(given: dict[str, Any]) -> None:
    """20,000 draws with fixed seeds; chi-squared far inside what chance gives."""
    scores = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -torch.inf])
    draws, p = 20_000, params(**given)
    rows = [sampler(vocab=8, seed=seed, **given) for seed in range(draws)]
    tokens = Counter(sample(scores.expand(draws, -1), rows).tokens)
    weights = (scores / p.temperature).softmax(-1)
    if p.top_k:
        weights[p.top_k :] = 0
    if p.top_p < 1:
        weights[int((weights.cumsum(0) < p.top_p).sum()) + 1 :] = 0
    weights /= weights.sum().clone()
    assert set(tokens) == {i for i in range(8) if weights[i] > 0}
    chi = sum(
        (tokens[i] - draws * float(w)) ** 2 / (draws * float(w)) for i, w in enumerate(weights) if w > 0
    )
    assert chi < 25  # 6 degrees of freedom at most: one chance in 3,000, and the seeds are fixed


def test_uniforms_are_uniform_and_depend_on_seed_and_step() -> None:
    row = sampler(seed=5)
    numbers = []
    for _ in range(2000):
        numbers.append(row.uniform())
        row.advance(0)
    assert len(set(numbers)) == 2000
    assert sum(numbers) / 2000 == pytest.approx(0.5, abs=0.02)
    assert sampler(seed=5).uniform() == numbers[0] != sampler(seed=6).uniform()
    assert sampler(seed=-1).uniform() != sampler(seed=1).uniform()
    assert sampler().uniform() != sampler().uniform()


def test_top_k_of_one_is_greedy_also_among_equals() -> None:
    logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
    logits[0, [40, 300, 500]] = 4.0
    assert sample(logits, [sampler(temperature=0.0)]).tokens == [40]
    assert sample(logits.expand(30, -1), [sampler(top_k=1) for _ in range(30)]).tokens == [40] * 30
    assert set(sample(logits.expand(200, -1), [sampler(seed=s, top_k=2) for s in range(200)]).tokens) == {
        40,
        300,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"frequency_penalty": 1.0}])
def test_a_poisoned_row_fails_alone(dtype: torch.dtype, given: dict[str, Any]) -> None:
    logits = logits_of(5, 9).to(dtype)
    clean = sample(logits, [sampler(seed=i, logprobs=2, **given) for i in range(5)])
    poisoned = logits.clone()
    poisoned[1, 17] = math.nan
    poisoned[3, 0] = math.inf
    poisoned[4] = -math.inf
    rows = [sampler(seed=i, logprobs=2, **given) for i in range(5)]
    out = sample(poisoned, rows)
    assert out.failed == [1, 3, 4]
    assert [out.tokens[i] for i in (1, 3, 4)] == [-1, -1, -1]
    assert [out.logprobs[i] for i in (1, 3, 4)] == [None, None, None]
    for i in (0, 2):
        assert out.tokens[i] == clean.tokens[i]
        assert out.logprobs[i] == clean.logprobs[i]
    assert [row.step for row in rows] == [1, 0, 1, 0, 0]


def test_bans_that_leave_nothing_fail_the_row() -> None:
    row = RowSampler(params(min_tokens=1, temperature=0.0), [0], vocab=2, eos_token_ids=[0, 1])
    out = sample(torch.zeros(2, 2), [row, sampler(vocab=2)])
    assert out.failed == [0]
    assert out.tokens[1] in (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = logits_of(4, 2).to(dtype)
    rows = [
        sampler(seed=1, logprobs=0, temperature=0.2, logit_bias={8: 90.0}),
        sampler(seed=2),
        sampler(seed=3, logprobs=5, top_k=3),
        sampler(temperature=0.0, logprobs=1),
    ]
    out = sample(logits, rows)
    raw = logits.float().log_softmax(-1)
    assert out.tokens[0] == 8
    assert out.logprobs[1] is None
    for i, count in ((0, 0), (2, 5), (3, 1)):
        entry = out.logprobs[i]
        assert entry is not None
        assert entry.token == out.tokens[i]
        assert entry.logprob == float(raw[i, entry.token])
        values, ids = best(raw[i : i + 1], count)
        assert entry.top == list(zip(ids[0].tolist(), values[0].tolist(), strict=True))
    assert out.logprobs[3] is not None
    assert out.logprobs[3].top[0] == (out.tokens[3], out.logprobs[3].logprob)


def test_prompt_logprobs() -> None:
    logits = logits_of(150, 3)
    targets = [(7 * i) % VOCAB for i in range(150)]
    raw = logits.log_softmax(-1)
    entries = prompt_logprobs(logits, targets, 2)
    assert [entry.token for entry in entries] == targets
    assert [entry.logprob for entry in entries] == [float(raw[i, t]) for i, t in enumerate(targets)]
    assert all(entry.top[0][1] >= entry.top[1][1] and len(entry.top) == 2 for entry in entries)
    assert [entry.top for entry in prompt_logprobs(logits[:3], targets[:3], 0)] == [[], [], []]
    assert len(prompt_logprobs(logits[:1, :5], [2], 20)[0].top) == 5  # no more than there are
    assert prompt_logprobs(logits[:0], [], 3) == []


def test_a_bias_outside_the_vocabulary_is_the_callers_error() -> None:
    for token in (-1, VOCAB):
        with pytest.raises(InvalidRequest) as caught:
            sampler(logit_bias={token: 1.0})
        assert caught.value.param == "logit_bias"
    sampler(stop_token_ids=[VOCAB + 5], min_tokens=1)  # can never be sampled: nothing to ban


def test_many_different_tokens_are_counted() -> None:
    row = sampler([5, 500], frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    output = [i % 300 for i in range(700)]
    for token in output:
        row.advance(token)
    line = torch.ones(VOCAB)
    row.adjust(line)
    times = Counter(output)
    expected = torch.ones(VOCAB)
    for token in range(300):
        expected[token] = 0.5 - 0.5 * times[token] - 0.25
    expected[500] = 0.5  # in the prompt only: repeated, but neither present nor frequent
    assert torch.equal(line, expected)
