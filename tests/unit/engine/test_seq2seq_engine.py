"""The step loop over encoder-decoders, mostly a T5: each source is encoded once, and rows are Hugging Face's own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from deltas.delta import Component, Delta
from deltas.sites import BackboneSpec, SiteKind
from server.engine.messages import Cancel, Drop, Load
from server.errors import InvalidRequest
from tests.seq2seq import source_of, write_bart, write_t5
from tests.tiny import KINDS, random_delta
from tests.unit.engine.running import Harness, harnesses

START = [0]
LENGTHS = [3, 7, 500, 4, 31, 120, 3, 64, 250, 12, 5, 90]
Write = Callable[[Path], Path]
WRITERS: dict[str, tuple[Write, bool]] = {  # and whether the head is the embedding's
    "t5": (write_t5, True),
    "t5_gated": (partial(write_t5, family="t5_gated"), True),
    "t5_gated, untied": (partial(write_t5, family="t5_gated", untied=True), False),
    "bart": (write_bart, True),
}
POSITIONS, BART_START, BART_END = 48, [2], 2


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    """Over a T5 with a head of its own: a random one that is tied says the same word again and again."""
    with harnesses(tmp_path / "tiny", partial(write_t5, family="t5_gated", untied=True)) as start:
        yield start


def greedy(model: Any, source: list[int], steps: int) -> tuple[list[int], Tensor]:
    """Hugging Face's tokens, and the logits that chose each."""
    made = model.generate(
        torch.tensor([source]),
        do_sample=False,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[0, 1:].tolist(), torch.cat(made.logits)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_hugging_faces(name: str, tmp_path: Path) -> None:
    """More rows than slots: they join and leave, and a source longer than a step's budget goes alone."""
    write, tied = WRITERS[name]
    start_at, end, limit = (BART_START, BART_END, POSITIONS) if name == "bart" else (START, 1, 512)
    with harnesses(tmp_path / "tiny", write) as start:
        engine = start(max_model_len=limit, prefill_tokens=limit // 8)
        model = AutoModelForSeq2SeqLM.from_pretrained(engine.folder).eval()
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert engine.engine.info.decoder_start == start_at
        assert engine.engine.runner.backbone.spec.tied == tied
        sources = [source_of(row, min(length, limit), end) for row, length in enumerate(LENGTHS)]
        for row, source in enumerate(sources):
            engine.submit(row, start_at, source=source, max_tokens=5 + row % 7, ignore_eos=False, logprobs=3)
        engine.wait(*range(len(LENGTHS)))
        for row, source in enumerate(sources):
            tokens, logits = greedy(model, source, 5 + row % 7)
            assert engine.tokens(row) == tokens, row
            wanted = logits.log_softmax(-1)
            found = [entry for event in engine.events[row] for entry in event.logprobs or []]
            for line, entry in zip(wanted, found, strict=True):
                for token, logprob in entry.top:
                    assert abs(float(line[token]) - logprob) < 1e-4
        engine.engine.scheduler.check_integrity()


def test_answers_fill_barts_positions(tmp_path: Path) -> None:
    with harnesses(tmp_path / "tiny", write_bart) as start:
        engine = start()
        assert engine.engine.info.max_model_len == POSITIONS
        model = AutoModelForSeq2SeqLM.from_pretrained(engine.folder).eval()
        model.generation_config.eos_token_id = None
        source = source_of(1, POSITIONS, BART_END)
        engine.submit(1, BART_START, source=source, max_tokens=1000)
        engine.wait(1)
        assert engine.ends == {1: "length"}
        assert engine.tokens(1) == greedy(model, source, POSITIONS - 1)[0]
        with pytest.raises(InvalidRequest, match="beyond the backbone's 48 positions"):
            start(max_model_len=POSITIONS + 1)


def test_barts_forced_first_token(tmp_path: Path) -> None:
    """Checkpoints for summaries have one; ``generate`` counts it as an answer's first."""
    with harnesses(tmp_path / "tiny", partial(write_bart, forced_bos_token_id=0)) as start:
        engine = start()
        first = engine.engine.info.decoder_start
        assert first == [2, 0]
        model = AutoModelForSeq2SeqLM.from_pretrained(engine.folder).eval()
        for row in range(4):
            engine.submit(row, first, source=source_of(row, 20, BART_END), ignore_eos=False)
        engine.wait(*range(4))
        for row in range(4):
            assert [0, *engine.tokens(row)] == greedy(model, source_of(row, 20, BART_END), 9)[0]


def test_prompts_take_barts_positions(tmp_path: Path) -> None:
    """A source that does not fit behind its delta's prompt is refused, and so is a prompt that leaves no room."""
    with harnesses(tmp_path / "tiny", write_bart) as start:
        engine = start(max_model_len=40)
        hidden = engine.engine.runner.backbone.spec.hidden
        prompts = [Component("prompt", {}, {"embeddings": torch.randn(n, hidden)}) for n in (20, 40)]
        refs = [engine.save(Delta((prompt,))) for prompt in prompts]
        for load, ref in ((90, refs[0]), (91, refs[1])):
            engine.engine.receive(Load(load, ref))
        engine.wait(90, 91)
        assert engine.probes[90].outcome == "changes"
        assert engine.probes[91].outcome == "failed"
        assert "40 virtual tokens leave no room" in engine.probes[91].message
        for row, length, ref in ((1, 28, refs[0]), (2, 29, refs[0]), (3, 40, None), (4, 9, refs[1])):
            engine.submit(row, BART_START, ref, source_of(row, length, BART_END), max_tokens=50)
        engine.wait(1, 2, 3, 4)
        assert engine.ends == {
            90: "loaded",
            91: "loaded",
            1: "length",
            2: "context_length_exceeded",
            3: "length",
            4: "context_length_exceeded",
        }
        assert len(engine.tokens(1)) == len(engine.tokens(3)) == 39
        assert engine.messages[2] == "prompt and its delta's virtual tokens exceed 40 tokens"
        engine.engine.scheduler.check_integrity()


@pytest.mark.parametrize("name", ["bart", "t5_gated, untied"])
def test_mixed_kinds_equal_solo(name: str, tmp_path: Path) -> None:
    first, end = (BART_START, BART_END) if name == "bart" else (START, 1)
    with harnesses(tmp_path / "tiny", WRITERS[name][0]) as start:
        mixed = start()
        spec = mixed.engine.runner.backbone.spec
        refs = [None, *(mixed.save(random_delta(spec, kind, seed)) for kind in KINDS for seed in (1, 2, 3))]
        sources = [source_of(row, LENGTHS[row % 12] % 37 + 2, end) for row in range(len(refs))]
        for row, ref in enumerate(refs):
            mixed.submit(row, first, ref, sources[row])
        mixed.wait(*range(len(refs)))
        solo = start(max_rows=1, prefill_tokens=1000)
        for row, ref in enumerate(refs):
            solo.submit(row, first, ref, sources[row])
            solo.wait(row)
        answers = [tuple(mixed.tokens(row)) for row in range(len(refs))]
        assert answers == [tuple(solo.tokens(row)) for row in range(len(refs))]
        assert len(set(answers)) > len(refs) // 2, "deltas do not seem to matter"


def test_answers_are_scored(make: Callable[..., Harness]) -> None:
    """A decoder's prompt of several tokens, with their log-probabilities, in chunks."""
    engine = make()
    model = AutoModelForSeq2SeqLM.from_pretrained(engine.folder).eval()
    choices = [[9, 30, 1], [44, 1], [8, *range(5, 40), 1]]
    source = source_of(1, 20)
    for row, choice in enumerate(choices):
        engine.submit(row, START + choice, source=source, max_tokens=0, prompt_logprobs=0)
    engine.wait(0, 1, 2)
    for row, choice in enumerate(choices):
        (event,) = engine.events[row]
        found = [entry.logprob for entry in event.prompt_logprobs or [] if entry is not None]
        answer = torch.tensor([START + choice])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=answer).logits[0]
        wanted = logits.log_softmax(-1)[torch.arange(len(choice)), torch.tensor(choice)]
        assert torch.allclose(torch.tensor(found), wanted, atol=1e-4)


def test_limits(make: Callable[..., Harness]) -> None:
    engine = make(max_model_len=32)
    engine.submit(1, START, source=source_of(1, 33))
    engine.submit(2, START)
    engine.submit(3, START, source=source_of(3, 32), max_tokens=1000)
    engine.submit(4, list(range(32)), source=source_of(4, 5))
    engine.wait(1, 2, 3, 4)
    assert engine.ends == {
        1: "context_length_exceeded",
        2: "invalid_request",
        3: "length",
        4: "context_length_exceeded",
    }
    assert "33 tokens" in engine.messages[1]
    assert "empty" in engine.messages[2]
    assert len(engine.tokens(3)) == 31


def test_a_decoder_takes_no_source(tmp_path: Path) -> None:
    with harnesses(tmp_path / "llama") as start:
        engine = start()
        engine.submit(1, [5, 6], source=[7])
        engine.wait(1)
        assert engine.ends == {1: "context_length_exceeded"}


def test_a_context_beyond_what_it_was_trained_on(make: Callable[..., Harness]) -> None:
    """Relative positions have no table to run out of."""
    engine = make(max_model_len=1200)
    model = AutoModelForSeq2SeqLM.from_pretrained(engine.folder).eval()
    engine.submit(1, START, source=source_of(1, 1100), max_tokens=4, ignore_eos=False)
    engine.wait(1)
    assert engine.tokens(1) == greedy(model, source_of(1, 1100), 4)[0]


def test_too_little_memory_for_a_row_is_refused(make: Callable[..., Harness]) -> None:
    with pytest.raises(InvalidRequest, match="a source and an answer") as caught:
        make(kv_bytes=1 << 16)
    assert caught.value.param == "kv_bytes"


def test_cancel_frees_the_row(make: Callable[..., Harness]) -> None:
    engine = make(max_rows=1)
    engine.submit(1, START, source=source_of(1, 9), max_tokens=400)
    engine.submit(2, START, source=source_of(2, 9))
    engine.engine.receive(Cancel(1))
    engine.wait(2)
    assert 1 not in engine.ends
    engine.engine.scheduler.check_integrity()


def poisonous(spec: BackboneSpec, stack: str) -> Delta:
    """Finite numbers that overflow once multiplied, at every linear of one stack."""
    tensors = {}
    for site in spec.of_kind(SiteKind.LINEAR):
        if site.name.startswith(stack):
            tensors[f"{site.name}/A"] = torch.full((2, site.in_features), 1e25)
            tensors[f"{site.name}/B"] = torch.full((site.out_features, 2), 1e25)
    return Delta((Component("lora", {"scale": 1.0}, tensors),))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_poisoned_delta_leaves_its_neighbours_bit_identical(
    make: Callable[..., Harness], stack: str
) -> None:
    engine = make()
    spec = engine.engine.runner.backbone.spec
    good = engine.save(random_delta(spec, "lora", 1))
    poison = engine.save(poisonous(spec, stack))
    harmless = engine.save(random_delta(spec, "lora", 4))
    for load, ref in ((90, poison), (91, good), (92, harmless)):
        engine.engine.receive(Load(load, ref))
    engine.wait(90, 91, 92)
    assert engine.probes[90].outcome == "not_finite"
    assert engine.probes[91].outcome == engine.probes[92].outcome == "changes"
    for row, ref in ((1, good), (2, poison), (3, None)):
        engine.submit(row, START, ref, source_of(1, 8), logprobs=3)
    engine.wait(1, 2, 3)
    assert engine.ends[2] == "row_failed"
    for row, ref in ((11, good), (12, harmless), (13, None)):
        engine.submit(row, START, ref, source_of(1, 8), logprobs=3)
    engine.wait(11, 12, 13)
    for poisoned, clean in ((1, 11), (3, 13)):
        assert engine.events[poisoned][0] == engine.events[clean][0]
        assert engine.tokens(poisoned) == engine.tokens(clean)
    engine.wait_stats(lambda stats: list(stats.quarantined) == [poison.digest])


def shift_at(site: str, width: int, value: float) -> Delta:
    return Delta((Component("bitfit", {}, {f"{site}/beta": torch.full((width,), value)}),))


@pytest.mark.parametrize(
    "site", ["encoder.layers.0.mlp.up", "decoder.layers.1.cross.k", "decoder.layers.0.attn.q", "head"]
)
def test_probes(make: Callable[..., Harness], site: str) -> None:
    engine = make()
    width = engine.engine.runner.backbone.spec.sites[site].out_features
    engine.engine.receive(Load(1, engine.save(shift_at(site, width, 0.0))))
    engine.engine.receive(Load(2, engine.save(shift_at(site, width, 0.5))))
    engine.wait(1, 2)
    assert engine.probes[1].outcome == "nothing"
    assert site in engine.probes[1].message
    # a shift of all keys moves all of a query's scores alike, up to rounding
    assert engine.probes[2].outcome in (("changes", "rounding") if site.endswith(".k") else ("changes",))


def test_probes_of_prompts_and_trained_tokens(make: Callable[..., Harness]) -> None:
    engine = make(max_model_len=64)
    hidden = engine.engine.runner.backbone.spec.hidden
    deltas = {
        1: Component("prompt", {}, {"embeddings": torch.randn(60, hidden)}),
        2: Component("prompt", {}, {"embeddings": torch.randn(300, hidden)}),
        3: Component(
            "tokens",
            {},
            {"decoder.embed/indices": torch.tensor([60]), "decoder.embed/rows": torch.randn(1, hidden)},
        ),
    }
    for load, component in deltas.items():
        engine.engine.receive(Load(load, engine.save(Delta((component,)))))
    engine.wait(*deltas)
    assert engine.ends == {1: "loaded", 2: "invalid_delta", 3: "loaded"}
    assert "300 virtual tokens" in engine.messages[2]
    assert engine.probes[1].outcome == engine.probes[3].outcome == "changes"


def test_nothing_names_a_delta_that_was_dropped(make: Callable[..., Harness]) -> None:
    engine = make()
    ref = engine.save(random_delta(engine.engine.runner.backbone.spec, "prompt", 1))
    engine.engine.receive(Load(90, ref))
    engine.wait(90)
    engine.submit(1, START, ref, source_of(1, 8))
    engine.wait(1)
    seen = weakref.ref(engine.engine.residency.resident(ref))
    engine.engine.receive(Drop(ref.digest))
    engine.submit(2, START, None, source_of(2, 8))
    engine.wait(2)
    gc.collect()
    assert seen() is None


def test_a_row_that_was_preempted_reads_its_source_again(make: Callable[..., Harness]) -> None:
    """Short of memory, answers are those of plenty."""
    answers = []
    for bytes_ in (1 << 18, 1 << 24):
        engine = make(max_model_len=64, max_rows=8, kv_bytes=bytes_)
        ref = engine.save(random_delta(engine.engine.runner.backbone.spec, "lora", 1))
        for row in range(8):
            engine.submit(row, START, ref if row % 2 else None, source_of(row, 50 + row), max_tokens=60)
        engine.wait(*range(8))
        answers.append([engine.tokens(row) for row in range(8)])
        assert bool(engine.engine.scheduler.preemptions) == (bytes_ == 1 << 18)
        engine.engine.scheduler.check_integrity()
    assert answers[0] == answers[1]
    assert all(len(answer) == 60 for answer in answers[0])
