"""What a delta answers by itself, by training's own passes, is what Hugging Face's ``generate`` gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from deltas.tuned import tunable
from server.tuning import answers, scores
from server.tuning.answers import MOST_ROWS, MOST_TOKENS, greedy
from server.tuning.forward import Output, Part, Passes
from server.tuning.messages import Evaluated
from server.tuning.run import Run
from server.tuning.spec import Example
from tests import tuning
from tests.oracle.padded import BACKBONES

CLASSES = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}
ROOM = 20  # tokens of an answer here, so that every row has positions for as many


class Counting(Passes):
    """Passes that are counted."""

    made = 0

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        self.made += 1
        return super().__call__(parts)


def asked(family: str, answer: int, count: int = 9) -> list[Example]:
    """Rows of random tokens and random answers of so many."""
    make = torch.Generator().manual_seed(4)
    rows = []
    for number in range(count):
        tokens = torch.randint(5, 60, (4 + number % 5,), generator=make).tolist()
        wanted = torch.randint(5, 60, (answer,), generator=make).tolist()
        if family == "llama":
            rows.append(Example([*tokens, *wanted], learn=[(len(tokens), len(tokens) + answer)]))
        else:
            rows.append(Example(tokens, target=wanted))
    return rows


def generated(family: str, row: Example) -> list[int]:
    """``ROOM`` tokens by Hugging Face's model."""
    model: Any = CLASSES[family].from_pretrained(BACKBONES / family)
    given = row.tokens[: row.learn[-1][0]] if row.learn else row.tokens
    out = model.generate(
        torch.tensor([given]),
        attention_mask=torch.ones(1, len(given), dtype=torch.long),
        do_sample=False,
        eos_token_id=None,
        forced_bos_token_id=None,
        pad_token_id=0,
        max_new_tokens=ROOM,
    )[0].tolist()
    return list(out[len(given) if family == "llama" else 1 :][:ROOM])


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("answer", [1, 7, ROOM])
def test_greedy_decoding(family: str, answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_TOKENS", ROOM)
    passes, rows = tuning.passes_of(family), asked(family, answer)
    found = greedy(passes, rows, passes.bind([]), frozenset())
    for row, (wanted, given) in zip(rows, found, strict=True):
        assert given == generated(family, row)
        assert wanted == ([*row.tokens[-answer:]] if row.learn else row.target)
    ends = frozenset({found[0][1][3], 59})  # the first row's fourth token ends an answer
    for (_, whole), (_, given) in zip(found, greedy(passes, rows, passes.bind([]), ends), strict=True):
        cut = next((at for at, token in enumerate(whole) if token in ends), len(whole))
        assert given == whole[:cut]


def test_what_is_known_takes_one_pass() -> None:
    passes = Counting(tuning.load("llama"))
    rows = asked("llama", 12, MOST_ROWS + 3)
    first = greedy(passes, rows, passes.bind([]), frozenset())
    assert len(first) == MOST_ROWS
    assert 1 < passes.made <= MOST_TOKENS
    passes.made = 0
    known = [
        Example(
            [*row.tokens[:-12], *given], learn=[(len(row.tokens) - 12, len(row.tokens) - 12 + len(given))]
        )
        for row, (_, given) in zip(rows, first, strict=False)
    ]
    again = greedy(passes, known, passes.bind([]), frozenset())
    assert [given for _, given in again] == [given for _, given in first]
    assert passes.made == 1


def test_an_answer_stays_within_the_context() -> None:
    """Also behind virtual tokens."""
    passes = tuning.passes_of("llama")
    positions = passes.positions
    assert positions is not None
    row = Example([5] * (positions - 10), learn=[(positions - 13, positions - 10)])
    patches = tuning.method(passes, "prompt", length=6)
    delta = passes.bind(
        tunable("prompt").patches(
            {"embeddings": torch.randn(6, passes.backbone.spec.hidden)},
            patches.options,
            [passes.backbone.spec.sites[name] for name in patches.targets],
            passes.weights,
            None,
        )
    )
    ((_, found),) = greedy(passes, [row], delta, frozenset())
    assert len(found) == 13 - 6


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_job_that_asks_for_rouge_l_has_it(family: str, tmp_path: Path) -> None:
    passes = tuning.passes_of(family)
    kind = passes.backbone.spec.kind
    rows, valid = (tuning.examples("generate", 24, seed, kind=kind) for seed in (0, 1))
    found = {}
    for metric in ("rouge_l", "loss"):
        spec = tuning.job(
            tmp_path / metric,
            [tuning.method(passes, "lora")],
            "generate",
            rows,
            valid=valid,
            metric=metric,
            epochs=8,
            learning_rate=1e-2,
        )
        said = tuning.train(passes, Run.open(spec, tmp_path / metric, passes))
        found[metric] = [message for message in said if isinstance(message, Evaluated)]
    assert all("rouge_l" not in message.metrics for message in found["loss"])
    by_step = [message.metrics["rouge_l"] for message in found["rouge_l"]]
    assert by_step[-1] > by_step[0]
    best = max(by_step)
    assert [message.best for message in found["rouge_l"]].index(True) == 0
    assert next(m for m in reversed(found["rouge_l"]) if m.best).metrics["rouge_l"] == best


def test_the_score() -> None:
    assert scores.rouge_l([[1, 2, 3]], [[1, 3]]) == pytest.approx(0.8)
